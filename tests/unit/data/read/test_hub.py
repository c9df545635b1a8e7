"""Datasets by name: one message without the library; with it, every row of the split that was named, and of no other.

As files that the library keeps, and as a stream of which nothing is kept but the token store.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.data.read import files as reading
from llm_trainer.data.read import hub
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


def test_a_stream_has_the_same_rows_and_leaves_nothing_beside_the_store(
    folder: Path, tmp_path: Path, reference_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))

    def stores(source: str) -> Any:
        (store,) = load([source], get_kind("conversations"), chat, DataOptions(), tmp_path / "stores").stores
        return store

    # 1. a stream that breaks off is an error and no store
    def broken(path: Path) -> Any:
        for number, batch in enumerate(hub.stream(path)):
            if number:
                raise DataError(reading.Location(path), "the stream broke off", "all rows", "start again")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(reading, "stream", broken)
        with pytest.raises(DataError, match="broke off"):
            stores(f"hf-stream:{folder}:train")
    assert not list((tmp_path / "stores").glob("*/meta.json")) and not list((tmp_path / "stores").glob("*building*"))
    # 2. the rows are those of the files, which are not there
    streamed = stores(f"hf-stream:{folder}:train")
    assert streamed.is_new and not list((tmp_path / "cache").rglob("*.arrow"))
    kept = stores(f"hf:{folder}:train")
    assert [ids.tolist() for ids in streamed["input_ids"]] == [ids.tolist() for ids in kept["input_ids"]]
    assert len(streamed) == 300
    # 3. it is found again until its source changes
    assert not stores(f"hf-stream:{folder}:train").is_new
    os.utime(folder / "train.jsonl", (1, 1))
    assert stores(f"hf-stream:{folder}:train").is_new


def test_what_is_wrong_with_a_stream_is_one_message(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"found the splits train, test; .*such as hf-stream:{folder}:train"):
        list(read_rows(f"hf-stream:{folder}"))
    with pytest.raises(DataError, match="a dataset that `datasets` cannot load"):
        list(read_rows(f"hf-stream:{folder}/nothing:train"))
    with pytest.raises(DataError, match=r"expected hf-stream:NAME, hf-stream:NAME:SPLIT or"):
        list(read_rows("hf-stream:a:b:c:d"))
    rows = read_rows(f"hf-stream:{folder}:train")
    assert next(rows)[1] == {"prompt": "train 0", "completion": "0"}
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"the stream broke off behind row 0|cannot load"):
        list(read_rows(f"hf-stream:{folder}:train"))


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
    with pytest.raises(DataError, match=r"hf-stream:a/b:train: found .* without `datasets`"):
        list(read_rows("hf-stream:a/b:train"))


@pytest.mark.parametrize("source", ["hf:", "hf:a/b:train[:10%]", "hf:a:b:c:d"])
def test_what_is_no_name_of_a_split(source: str) -> None:
    with pytest.raises(
        DataError, match=r"expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; fix: name a whole split"
    ):
        files_of(Path(source))
