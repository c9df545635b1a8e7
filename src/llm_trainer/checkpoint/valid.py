"""What is valid: the manifest of a checkpoint folder, and the newest checkpoint that it vouches for."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_trainer.cores import usable_cores
from llm_trainer.disk import flush

FOLDER = re.compile(r"checkpoint-(\d+)")
THREADS = min(8, usable_cores())  # that hash or write a file each


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    size: int
    sha256: str


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or applied; the message says which, why and what is still valid."""


def valid_checkpoints(
    folder: Path, verify: str = "full", warn: Callable[[str], object] = lambda problem: None
) -> Iterator[Path]:
    """The checkpoint folders whose manifest holds, newest step first; `warn` hears about the others on the way."""
    for path in step_folders(folder):
        problem = find_damage(path, verify)
        if problem:
            warn(f"checkpoint skipped: {problem}")
        else:
            yield path


def find_damage(path: Path, verify: str = "full") -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is compared with the manifest.

    Args:
        verify: `"full"` compares sizes and hashes, `"sizes"` only sizes.
    """
    try:
        files = read_manifest(path)["files"]
    except FileNotFoundError:
        return f"'{path}' is not a complete checkpoint: it has no manifest.json"
    except ValueError as error:
        return f"'{path / 'manifest.json'}' is damaged ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"'{file}' is missing"
        size = file.stat().st_size
        if size != expected["size"]:
            return f"'{file}' is damaged: {size} bytes instead of {expected['size']}"
    if verify == "full":
        hashes = _hashes([path / name for name in files])
        for (name, expected), found in zip(files.items(), hashes, strict=True):
            if found != expected["sha256"]:
                return f"'{path / name}' is damaged: its hash differs from the manifest"
    return None


def step_folders(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first."""
    found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which vouches for itself too."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _json_hash(manifest):
        raise ValueError("its own hash differs")
    return manifest


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_manifest(folder: Path, facts: dict[str, Any], written: Mapping[str, Written] | None = None) -> None:
    """List everything under `folder` and flush it: first the files, then the manifest, then the folders that name them.

    Args:
        written: files by their path in `folder` that are flushed already, and need not be read again.
    """
    listed = dict(written or {})
    found = sorted(folder.rglob("*"))
    files = [path for path in found if path.is_file() and path.relative_to(folder).as_posix() not in listed]
    for file, sha256 in zip(files, _hashes(files), strict=True):
        listed[file.relative_to(folder).as_posix()] = Written(file.stat().st_size, sha256)
    content = {**facts, "files": {name: asdict(listed[name]) for name in sorted(listed)}}
    sealed = json.dumps({"sha256": _json_hash(content), **content}, indent=1)
    (folder / "manifest.json").write_text(sealed, encoding="utf-8")
    folders = [path for path in found if path.is_dir()]
    for path in [*files, folder / "manifest.json", *folders, folder]:
        flush(path)


def link_files(folder: Path, links: Mapping[str, Path]) -> dict[str, Written]:
    """Let files of an earlier checkpoint be in this one too; of those that take no space for it, what is known of them.

    Args:
        links: the files, by what they are called in both.
    """
    known = {}
    for name, path in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, folder / name)
        except OSError:  # a file system without links, or another one
            shutil.copyfile(path, folder / name)
            continue
        earlier = path.parents[len(Path(name).parts) - 1]
        known[name] = Written(**read_manifest(earlier)["files"][name])
    return known


def _hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_sha256, files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_valid_neighbour(path: Path) -> str:
    """One sentence that names the newest valid checkpoint in the folder of `path`."""
    if path.parent.is_dir():
        files = sorted(path.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime, reverse=True)
        valid_files = (file for file in files if not is_damaged_zip(file))
        valid = next(valid_checkpoints(path.parent), None) or next(valid_files, None)
        if valid is not None:
            return f"The newest valid checkpoint there is '{valid}'"
    return "There is no valid checkpoint beside it"


def is_damaged_zip(path: Path) -> bool:
    """torch.load does not notice a flipped byte; the checksums inside the zip file do."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return True
