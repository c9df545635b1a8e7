"""Every python and shell block of the documentation runs, in order, in a new folder per page; its links lead somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_trainer.data.read.schemas import SCHEMAS
from llm_trainer.losses.preference import PAIR_LOSSES
from llm_trainer.optim.optimizers import OPTIMIZERS
from llm_trainer.optim.schedules import SHAPES
from llm_trainer.trainers import TRAINERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
CHINESE = {page: ROOT / "docs" / "zh" / page.name for page in PAGES} | {PAGES[0]: ROOT / "README.zh-CN.md"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN, FILE = "# not run: ", "# file: "


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """`(line, language, code)` of each block."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text[: match.start(2)].count("\n"), match[1], match[2]


def run_shell(code: str, commands: Path) -> None:
    batch_script = code.startswith("#!")  # for a cluster: only parsed
    folders = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    path = {"PATH": os.pathsep.join(folders)}
    command = ["bash", *(["-n"] if batch_script else []), "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, tmp_path: Path, warm_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    for line, language, code in blocks(page):
        if code.startswith(NOT_RUN):
            continue
        if code.startswith(FILE):
            name, _, content = code.removeprefix(FILE).partition("\n")
            Path(name).write_text(content, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), names)  # newlines: tracebacks show the page's lines
        elif language in ("sh", "bash"):
            run_shell(code, warm_commands)
        else:
            assert language in ("text", "yaml"), f"{page.name}, line {line}: a block of {language} is not understood"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_chinese_page_has_the_same_blocks_and_headings(page: Path) -> None:
    """So that what runs in one language runs in the other, and no section is missing."""
    other = CHINESE[page]
    assert [block[1:] for block in blocks(other)] == [block[1:] for block in blocks(page)]
    assert headings(other) == headings(page)


def headings(page: Path) -> list[str]:
    """The levels of a page's headings, in order."""
    return re.findall("^#+(?= )", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [*PAGES, *CHINESE.values(), ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", BLOCK.sub("", page.read_text(encoding="utf-8")))
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ("trainers", TRAINERS),
        ("pair losses", PAIR_LOSSES),
        ("optimizers", OPTIMIZERS),
        ("schedules", SHAPES),
        ("schemas, recognised by themselves", SCHEMAS),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_the_readme_lists_exactly_what_exists(row: str, known: dict[str, object]) -> None:
    line = re.search(rf"^\| {row} \| (.*) \|$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None and sorted(re.findall("`([a-z_0-9]+)`", line[1])) == sorted(known)
