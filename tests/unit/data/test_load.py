"""One path from files to rows: which kind a file is, what it is refused for, and a kind of one's own."""

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_trainer import Trainer
from llm_trainer.builder.objects import Builder
from llm_trainer.data import cache as cache_module
from llm_trainer.data import ids as ids_module
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import KINDS, DataOptions, get_kind
from llm_trainer.data.load import Joined, choose_kind, find_schema, load, open_stream
from llm_trainer.data.packing import Blocks
from llm_trainer.data.read.errors import DataError
from llm_trainer.train_configs import DataLoaderConfig, ModelConfig, PretrainConfig, RunConfig, TrainConfig

HH = "\n\nHuman: q\n\nAssistant: "


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_joined_finds_samples_by_file(tmp_path):
    joined = Joined([Blocks(np.arange(8), "a", 4), Blocks(np.arange(100, 108), "b", 4)])
    assert joined.file_sizes == [2, 2] and joined[2]["input_ids"].tolist() == [100, 101, 102, 103]


def test_every_kind_can_be_found_by_name_and_an_unknown_one_names_the_nearest():
    assert [get_kind(name).name for name in KINDS] == list(KINDS)
    with pytest.raises(ValueError, match="unknown kind of rows 'pair'; did you mean 'pairs'"):
        get_kind("pair")


def test_rows_of_another_kind_are_refused_with_the_section_that_takes_them(tmp_path: Path):
    pairs = write(tmp_path / "pairs.jsonl", [{"chosen": HH + "a", "rejected": HH + "b"}])
    found = r"rows of kind 'preference' \(format 'hh'\); expected rows of kind chat or completion for conversations; "
    with pytest.raises(DataError, match=found + "fix: train on it with dpo_config or reward_config or kto_config"):
        find_schema(pairs, get_kind("conversations"), DataOptions())
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="expected rows of kind preference for pairs; fix: train on it with pretrain"):
        find_schema(text, get_kind("pairs"), DataOptions(schema="text"))
    odd = write(tmp_path / "odd.jsonl", [{"prompt": "q", "chosen": "a", "rejected": ["b"]}])
    with pytest.raises(
        DataError, match=r"key 'rejected': found list \['b'\]; expected text, a turn or a list of turns"
    ):
        find_schema(odd, get_kind("pairs"), DataOptions())
    images = [{"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}]
    seen = write(tmp_path / "seen.jsonl", [row | {"images": ["a.png"]} for row in images])
    with pytest.raises(DataError, match="rows of kind 'vision'"):  # never trained on without their images
        find_schema(seen, get_kind("conversations"), DataOptions())


def test_the_first_kind_that_fits_the_first_file_is_chosen(tmp_path: Path, chat: ChatFormat):
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    judged = write(tmp_path / "judged.jsonl", [{"prompt": "a", "completions": ["b"], "labels": [True]}])
    names = ("pairs", "process")
    for paths, expected in (([pairs, judged], "pairs"), ([judged, pairs], "process"), ([], "pairs")):
        assert choose_kind(names, map(str, paths), DataOptions()).name == expected
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    chosen = choose_kind(names, [str(text)], DataOptions())
    assert chosen.name == "pairs"  # which then says what is wrong with the file
    with pytest.raises(DataError, match="expected rows of kind preference"):
        load([str(text)], chosen, chat, DataOptions(), tmp_path)
    with pytest.raises(ValueError, match="file_dataset: no file was given"):
        load([], chosen, chat, DataOptions(), tmp_path)
    assert choose_kind(("text",), ["/nowhere"], DataOptions()).name == "text", "a single kind reads no file"


def test_a_packing_that_makes_no_sense_is_refused(tmp_path: Path, chat: ChatFormat):
    with pytest.raises(ValueError, match="got 'wrapped', expected 'none' or 'flat' or .* for conversations"):
        load(["a.jsonl"], get_kind("conversations"), chat, DataOptions(packing="wrapped"), tmp_path)


def test_what_a_curriculum_sorts_by_goes_with_its_rows(tmp_path: Path, chat: ChatFormat):
    levels = [3, 1.5, 2, -1, 10**20]
    rows = [{"prompt": "p", "chosen": f"a{n}", "rejected": "b", "meta": {"level": n}} for n in levels]
    rows.insert(1, {"prompt": "p", "chosen": "same", "rejected": "same", "meta": {"level": 7}})  # a tie is left out
    path = str(write(tmp_path / "rows.jsonl", rows))
    cache, harder = tmp_path / "cache", {"curriculum": "meta.level"}

    def found(kind: str, **options: str) -> Joined:
        return load([path], get_kind(kind), chat, DataOptions(**options), cache)  # type: ignore[arg-type]

    pairs = found("pairs", **harder)
    assert pairs.hardness.tolist() == levels and "meta" not in pairs.ledgers[0].unread
    assert found("unpaired", packing="flat", **harder).hardness.tolist() == np.repeat(levels, 2).tolist()
    assert found("pairs", duplicates="near", **harder).hardness.tolist() == levels
    with_it = set(cache.iterdir())
    for plain in (found("pairs"), found("pairs", curriculum="length")):
        assert "meta" in plain.ledgers[0].unread and list(plain.stores[0].columns) == list(get_kind("pairs").columns)
        assert plain.stores[0].folder not in with_it
    assert found("pairs").stores[0].folder == found("pairs", curriculum="length").stores[0].folder
    for value, says in (
        ({}, "nothing"), ({"level": None}, "null"), ({"level": "3"}, "str '3'"), ({"level": float("nan")}, "float nan"),
        ({"level": True}, "bool True"),
    ):  # fmt: skip
        write(Path(path), [*rows, {**rows[0], "meta": value}])
        with pytest.raises(
            DataError, match=rf"rows.jsonl:7: key 'meta.level': found {says}; expected a number"
        ) as error:
            found("pairs", **harder)
        dropped = found("pairs", bad_rows="drop", **harder)
        assert dropped.hardness.tolist() == levels and dropped.ledgers[0].dropped_rows[error.value.reason] == 1


def test_a_curriculum_by_a_column_needs_rows_that_have_one(tmp_path: Path, chat: ChatFormat):
    path = write(tmp_path / "rows.jsonl", [{"text": "a b c", "level": n} for n in range(3)])
    np.save(tmp_path / "flat.npy", np.array([1, 2, 3]))
    for packing in ("bfd", "bfd_split", "wrapped"):
        options = DataOptions(packing=packing, block_size=8, curriculum="level")
        with pytest.raises(
            ValueError, match=rf"'level' is .* but packing '{packing}' .* expected packing none or flat"
        ):
            load([str(path)], get_kind("text"), chat, options, tmp_path)
    with pytest.raises(
        DataError, match=r"flat.npy: found token ids, which have no columns; expected .*'level'; fix: give"
    ):
        load([str(tmp_path / "flat.npy")], get_kind("text"), chat, DataOptions(curriculum="level"), tmp_path)
    foreign = replace(get_kind("text"), rows=lambda store, name, how: Blocks(store["input_ids"].values, name, 2))
    with pytest.raises(ValueError, match=r"kind 'text': got Blocks, expected a subclass of .*Rows, for a curriculum"):
        load([str(path)], foreign, chat, DataOptions(curriculum="level"), tmp_path / "cache")


def test_token_files_of_another_kind_or_tokenizer_are_refused(tmp_path: Path, chat: ChatFormat):
    np.save(tmp_path / "flat.npy", np.array([1, 2, 512]))
    options = DataOptions(block_size=4, packing="wrapped")
    with pytest.raises(DataError, match="token id 512; expected ids below 512"):
        load([str(tmp_path / "flat.npy")], get_kind("text"), chat, options, tmp_path)
    np.save(tmp_path / "flat.npy", np.arange(10))
    rows = load([str(tmp_path / "flat.npy")], get_kind("text"), chat, options, tmp_path)
    assert isinstance(rows.parts[0], Blocks) and rows.file_sizes == [3]
    with pytest.raises(DataError, match="token rows of kind 'sequences'; expected text, or .* 'preference', for pairs"):
        load([str(tmp_path / "flat.npy")], get_kind("pairs"), chat, DataOptions(), tmp_path)


def test_every_id_of_a_token_file_is_looked_at_once(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, where the quick look does not come to; an array in place, rows of an array, and lists."""
    monkeypatch.setattr(ids_module, "QUICK_LOOK", 2)
    monkeypatch.setattr(ids_module, "AT_ONCE", 7)
    in_place = DataOptions(block_size=4, packing="wrapped")
    for wrong, dtype in ((600, np.uint16), (-3, np.int64)):
        ids = np.full(100, 5, dtype=dtype)
        ids[50] = wrong
        np.save(tmp_path / "flat.npy", ids)
        with pytest.raises(DataError, match=rf"flat.npy: found token id {wrong}; expected ids"):
            load([str(tmp_path / "flat.npy")], get_kind("text"), chat, in_place, tmp_path / "cache")
    np.save(tmp_path / "rows.npy", ids.reshape(10, 10))
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps([[5, 5]] * 5 + [[5, 5, 600, 5, 5]] + [[5, 5]] * 4))
    for name, row in (("rows.npy", 6), ("rows.pkl", 6)):
        with pytest.raises(DataError, match=rf"{name}:{row}: found token id (-3|600); expected ids"):
            load([str(tmp_path / name)], get_kind("text"), chat, DataOptions(), tmp_path / "cache")
    # what was found good is not read again
    np.save(tmp_path / "flat.npy", np.full(100, 5))
    for _ in range(2):
        load([str(tmp_path / "flat.npy")], get_kind("text"), chat, in_place, tmp_path / "cache")
        monkeypatch.setattr(ids_module, "_blocks", lambda ids: pytest.fail("checked twice"))


def test_an_edit_that_leaves_size_and_time_as_they_were_is_seen(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = write(tmp_path / "a.jsonl", [{"text": "one"}] * 3), DataOptions()
    before = path.stat()

    def first_row() -> list[int]:
        rows = load([str(path)], get_kind("text"), chat, options, tmp_path / "cache")
        return rows[0]["input_ids"].tolist()

    assert first_row() == chat.encode_text("one").input_ids
    write(path, [{"text": "two"}] * 3)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert first_row() == chat.encode_text("two").input_ids
    # of a large file: head, tail and blocks in between
    monkeypatch.setattr(cache_module, "HASHED_WHOLE", 1000)
    monkeypatch.setattr(cache_module, "SAMPLED_BLOCK", 10)
    monkeypatch.setattr(cache_module, "SAMPLED_BLOCKS", 11)
    large = bytearray(5000)
    found = set()
    for position in (None, 0, 2500, 4999, 700):
        edited = large.copy()
        if position is not None:
            edited[position] = 1
        path.write_bytes(edited)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        found.add(cache_module.hash_of_content(path))
    assert len(found) == 4, "700 lies between two blocks"


def test_files_of_several_schemas_are_mixed_into_one_kind(tmp_path: Path, chat: ChatFormat):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "1.jsonl", [{"instruction": "q", "output": "a"}])
    write(
        tmp_path / "2.jsonl",
        [{"query": "q", "response": "a"}, {"query": "q", "response": "a", "history": [["q", "a"]]}],
    )
    write(tmp_path / "3.jsonl", [{"messages": turns}])
    write(tmp_path / "4.jsonl", [{"prompt": "q", "completion": "a"}])
    rows = load([str(tmp_path)], get_kind("conversations"), chat, DataOptions(), tmp_path / "cache")
    assert rows.file_sizes == [1, 2, 1, 1]
    ids = [rows[i]["input_ids"].tolist() for i in range(5)]
    assert ids[0] == ids[1] == ids[3] and len(ids[2]) > len(ids[0]) > len(ids[4])


OWN = """
import numpy as np
import torch
from llm_trainer.data.kinds import Kind
from llm_trainer.data.kinds.language import Documents

def encode(chat, samples):
    for sample in samples:
        one = chat.encode(sample.values["messages"])
        if sample.row["stars"] == 0:
            yield "no stars"
            continue
        columns = {"input_ids": np.array(one.input_ids), "trained": np.array(one.trained, dtype=np.uint8)}
        yield columns | {"stars": np.array([sample.row["stars"]])}

class StarredRows(Documents):
    def __getitem__(self, index):
        return {"row": super().__getitem__(index), "stars": int(self.store["stars"][self.stored[index]][0])}

def collate(samples, lay):
    return lay([sample["row"] for sample in samples]) | {"stars": torch.tensor([s["stars"] for s in samples])}

STARRED = Kind("starred", ("chat",), ("input_ids", "trained", "stars"), encode, StarredRows, collate)
"""


def test_a_kind_of_ones_own_is_a_file_and_a_line(tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rows.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(KINDS, "starred", "my_rows:STARRED")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns, "stars": stars} for stars in (5, 0, 3)])
    kind, options = get_kind("starred"), DataOptions(packing="flat")
    dataset = load([str(path)], kind, chat, options, tmp_path / "cache")
    assert dataset.ledgers[0].check().dropped_rows == {"no stars": 1}
    stream = open_stream(dataset, kind, options, 0, rows_per_step=2, batch_size=2, shuffle=False)
    (micro_batch,), position = next(stream.steps(0))
    batch = micro_batch.batch
    assert (batch["stars"].tolist(), position) == ([5, 3], 2)
    assert batch["document_lengths"].tolist() == dataset.lengths.tolist() and batch["input_ids"].shape[0] == 1
    sys.modules.pop("my_rows")


def test_texts_end_where_they_say_so(chat, tmp_path):
    """`<|endoftext|>` inside a row is a document's end on request, and said to be text otherwise."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one<|endoftext|>\ntwo<|endoftext|>"}) + "\n")
    texts, stores = get_kind("text"), tmp_path / "stores"
    cut = load([str(path)], texts, chat, DataOptions(packing="none", text_unit="endoftext"), stores)
    eos = chat.tokenizer.eos_token_id
    assert [chat.tokenizer.decode(cut[i]["input_ids"][:-1].tolist()) for i in range(2)] == ["one", "two"]
    assert {int(cut[i]["input_ids"][-1]) for i in range(2)} == {eos} and not cut.ledgers[0].notes
    whole = load([str(path)], texts, chat, DataOptions(packing="none"), stores)
    assert len(whole.lengths) == 1
    assert "1 text: it holds <|endoftext|> as plain text; text_unit: endoftext" in whole.ledgers[0].lines()[1]


def test_special_tokens_are_parsed_by_the_word_of_a_configuration(chat, tmp_path, reference_dir):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one</s>two"}) + "\n")
    found = []
    for parse in (False, True):
        config = TrainConfig(
            model_config=ModelConfig(vocab_size=512, hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
            tokenizer=str(reference_dir / "tokenizer"),
            file_dataset=str(path),
            data_loader_config=DataLoaderConfig(parse_special_tokens=parse, packing="none"),
            run_config=RunConfig(save_dir=str(tmp_path)),
            pretrain_config=PretrainConfig(),
        )
        (train,) = Builder(config, Trainer).streams
        found.append(train.dataset[0]["input_ids"].tolist().count(chat.tokenizer.eos_token_id))
    assert found == [1, 2]
