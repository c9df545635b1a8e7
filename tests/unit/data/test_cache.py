"""A store is found again by what it was made of, whoever asks for it; and what is kept can be listed and removed."""

import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from llm_trainer.cli.main import main
from llm_trainer.config.env import environment
from llm_trainer.data import cache as cache_module
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.rows import RowEncoder
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.ids import check_ids
from llm_trainer.data.kinds import KINDS, DataOptions, get_kind
from llm_trainer.data.load import load, store_of
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.unused import refuse_unused
from llm_trainer.train.preflight import screen

FOREIGN = """
import numpy as np
from dataclasses import replace
from llm_trainer.data.kinds.language import TEXT

def encode(chat, samples):
    for sample in samples:
        yield {"input_ids": np.full(3, NUMBER, dtype=np.uint16)}

MINE = replace(TEXT, name="mine", encode=encode)
"""


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)))
    return path


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment({}).cache_dir == "~/.cache/llm_trainer"
    assert environment({"XDG_CACHE_HOME": "/caches"}).cache_dir == "/caches/llm_trainer"
    assert environment({"XDG_CACHE_HOME": "relative"}).cache_dir == "~/.cache/llm_trainer"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LLM_TRAINER_CACHE", "~/data")
    assert cache_module.default_folder() == Path("/home/me/data/stores")


def test_a_store_is_found_by_what_it_was_made_of(tmp_path: Path, texts: Path, chat: ChatFormat) -> None:
    def is_new(path: Path = texts, chat: ChatFormat = chat, **options: str) -> bool:
        return store_of(path, get_kind("text"), chat, DataOptions(**options), tmp_path / "cache").is_new

    assert is_new() and not is_new()
    os.utime(texts, (1, 1))
    elsewhere = Path(shutil.copytree(tmp_path, tmp_path / "mount", ignore=lambda *_: ["cache"])) / "a.jsonl"
    assert not is_new() and not is_new(elsewhere), "neither the time nor the place of a file is its content"
    as_text = shutil.copyfile(texts, tmp_path / "a.txt")
    assert is_new(as_text) and not is_new(as_text), "its suffix says how it is read"
    assert is_new(bad_rows="drop") and not is_new(bad_rows="drop")
    # what is put after every text is no part of the tokenizer's own description
    other = load_tokenizer(chat.tokenizer.name_or_path)
    other.eos_token = other.convert_ids_to_tokens(5)
    assert is_new(chat=ChatFormat(other)) and is_new(chat=ChatFormat(chat.tokenizer, template="x"))


def test_code_of_ones_own_counts_and_so_does_ours(
    tmp_path: Path, texts: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "foreign_kind.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(KINDS, "mine", "foreign_kind:MINE")
    for number in (7, 8):
        module.write_text(FOREIGN.replace("NUMBER", str(number)))
        monkeypatch.delitem(sys.modules, "foreign_kind", raising=False)
        for file in (tmp_path / "__pycache__").glob("*"):
            file.unlink()
        store = store_of(texts, get_kind("mine"), chat, DataOptions(), tmp_path / "cache")
        assert store["input_ids"][0].tolist() == [number] * 3


def test_all_code_that_a_row_goes_through_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides about a row is hashed, and each pattern of files adds something."""
    before = cache_module.hash_of_our_code()
    hashed = {file for pattern in cache_module.ENCODERS for file in cache_module.PACKAGE.glob(pattern)}
    for named in (RowEncoder, check_ids, refuse_unused, ChatFormat, get_kind, read_rows):
        assert Path(inspect.getfile(named)) in hashed, named
    try:
        for pattern in cache_module.ENCODERS:
            cache_module.hash_of_our_code.cache_clear()
            others = tuple(other for other in cache_module.ENCODERS if other != pattern)
            monkeypatch.setattr(cache_module, "ENCODERS", others)
            assert cache_module.hash_of_our_code() != before
            monkeypatch.undo()
    finally:
        cache_module.hash_of_our_code.cache_clear()


def test_the_screen_says_where_tokens_lie_and_the_command_removes_them(
    texts: Path, chat: ChatFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in ("made now", "found there"):
        ledgers = load([str(texts)], get_kind("text"), chat, DataOptions(), cache_module.default_folder()).ledgers
        shown = screen({}, ledgers)
        assert f"tokens in {cache_module.default_folder()}/a-" in shown and f"({how})" in shown
        assert "kept_in" not in ledgers[0].as_dict()
    [entry] = cache_module.entries(cache_module.default_folder())
    os.utime(entry.folder, (1, 1))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["data", "cache", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert str(texts) in run() and entry.folder.exists()
    load([str(texts)], get_kind("text"), chat, DataOptions(), cache_module.default_folder())
    assert "0 bytes removed" in run("--clear", "--unused-days", "1"), "it was used just now"
    assert f"{entry.bytes} bytes removed" in run("--clear")
    assert list(cache_module.default_folder().iterdir()) == []
