"""Datasets by name: one message without the library; with it, every row of the split that was named, and of no other."""

import json
import sys
from pathlib import Path

import pytest

from llm_trainer.data.read.errors import DataError
from llm_trainer.data.read.files import files_of, read_rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the library loads as a dataset of two splits, without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    (tmp_path / "rows").mkdir()
    for split, number in (("train", 300), ("test", 3)):
        lines = [json.dumps({"prompt": f"{split} {i}", "completion": str(i)}) for i in range(number)]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows"


def test_a_split_is_named(folder: Path) -> None:
    rows = [row for path in files_of(Path(f"hf:{folder}:train")) for _, row in read_rows(path)]
    assert [row["prompt"] for row in rows] == [f"train {i}" for i in range(300)]
    assert len(list(read_rows(f"hf:{folder}:default:test"))) == 3
    with pytest.raises(
        DataError, match=rf"found the splits train, test; expected one of them; fix: .*hf:{folder}:train"
    ):
        list(read_rows(f"hf:{folder}"))
    (folder / "test.jsonl").unlink()
    assert len(list(read_rows(f"hf:{folder}"))) == 300
    with pytest.raises(DataError, match="a dataset that `datasets` cannot load"):
        list(read_rows(f"hf:{folder}/nothing:train"))


def test_folders_that_the_library_saves(folder: Path, tmp_path: Path) -> None:
    import datasets

    saved = datasets.load_dataset(str(folder))
    saved["train"].select(range(10, 20)).save_to_disk(tmp_path / "part")
    saved.save_to_disk(tmp_path / "all")
    assert [row["completion"] for _, row in read_rows(tmp_path / "part")] == [str(i) for i in range(10, 20)]
    assert len(list(read_rows(tmp_path / "all" / "test"))) == 3
    with pytest.raises(DataError, match="a saved dataset with the splits train, test"):
        files_of(tmp_path / "all")


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"hf:a/b:train: found .* without `datasets`; .*pip install 'llm_trainer\[datasets\]'"
    ):
        files_of(Path("hf:a/b:train"))


@pytest.mark.parametrize("source", ["hf:", "hf:a/b:train[:10%]", "hf:a:b:c:d"])
def test_what_is_no_name_of_a_split(source: str) -> None:
    with pytest.raises(
        DataError, match=r"expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; fix: name a whole split"
    ):
        files_of(Path(source))
