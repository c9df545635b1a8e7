"""Weights from a message or a row to the batch; what is left out of rows is counted in the ledger, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.data.check import check_file
from llm_trainer.data.collate import collate_flat, collate_padded, take_rows
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.printed import ALL_CHARACTERS
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load as load_rows
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.read.messages import EMPTY_ANSWER

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def talk(*weights: Any, **row: Any) -> dict[str, Any]:
    """A conversation with an answer of each weight."""
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{number}", "weight": weight}]
    return {"messages": turns, **row}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, chat: ChatFormat, kind: str = "conversations", **options: Any) -> Any:
    return load_rows([str(path)], get_kind(kind), chat, DataOptions(**options), path.parent / "stores")


def read(chat: ChatFormat, ids: Any, weights: Any) -> dict[str, float]:
    """The weight of each answer, by its text; all its tokens must have the same."""
    found: dict[str, set[float]] = {}
    text: list[int] = []
    for token, weight in zip([*ids, 0], [*weights, 0.0], strict=True):
        if weight:
            text.append(int(token))
            found.setdefault("", set()).add(float(weight))
        elif text:
            found[str(chat.tokenizer.decode(text))] = found.pop("")
            text = []
    return {name: value.pop() for name, value in found.items() if len(value) == 1}


@pytest.mark.parametrize("template", [None, PLAIN])
def test_every_token_of_an_answer_has_its_weight(chat: ChatFormat, template: str | None) -> None:
    messages = [
        {**turn, "loss_weight": turn["weight"]} if "weight" in turn else turn
        for turn in talk(0.25, 0, 1, 3)["messages"]
    ]
    encoded = ChatFormat(chat.tokenizer, template).encode(messages)
    assert encoded.weights is not None
    expected = {"a0<|im_end|>": 0.25, "a2<|im_end|>": 1.0, "a3<|im_end|>": 3.0}
    assert read(chat, encoded.input_ids, encoded.weights) == expected
    assert [weight != 0 for weight in encoded.weights] == encoded.trained
    last = ChatFormat(chat.tokenizer, template, train_on="last").encode(messages)
    assert read(chat, last.input_ids, last.weights) == {"a3<|im_end|>": 3.0}
    every = ChatFormat(chat.tokenizer, template, train_on="all").encode(messages)
    assert every.weights is not None and sorted(set(every.weights)) == [0.0, 0.25, 1.0, 3.0]
    assert ChatFormat(chat.tokenizer, template).encode(talk(1, 0)["messages"]).weights is None


def test_weights_of_messages_and_rows_reach_the_batch(chat: ChatFormat, tmp_path: Path) -> None:
    rows = [talk(0.5, 2), talk(1, 1), talk(1, 0.5, loss_weight=0.5), talk(1, weight=0)]
    data = load(write(tmp_path / "a.jsonl", rows), chat)
    samples = [data[i] for i in range(len(data.lengths))]
    padded, flat = dict(collate_padded(samples)), dict(collate_flat(samples))
    answers = [{"a0<|im_end|>": 0.5, "a1<|im_end|>": 2}, {"a0<|im_end|>": 1, "a1<|im_end|>": 1}]
    answers.append({"a0<|im_end|>": 0.5, "a1<|im_end|>": 0.25})
    for row, expected in enumerate(answers):
        assert read(chat, padded["input_ids"][row].tolist(), padded["loss_weights"][row].tolist()) == expected
    assert padded["loss_weights"].dtype == flat["loss_weights"].dtype == torch.float32
    assert flat["loss_weights"].shape == flat["labels"].shape
    flat_weights = torch.cat([padded["loss_weights"][i, : data.lengths[i]] for i in range(3)])
    assert torch.equal(flat["loss_weights"][0], flat_weights)
    packed = load(tmp_path / "a.jsonl", chat, packing="bfd", block_size=200)
    assert sorted(packed[0]["loss_weights"].tolist()) == sorted(flat_weights.tolist())
    ledger = data.ledgers[0]
    assert ledger.dropped_rows == {"a row of weight 0": 1}
    per_answer = int((padded["labels"][0] != -100).sum()) // 2
    assert (ledger.weighted, ledger.weights) == (4 * per_answer, (0.25, 2.0))
    assert any("weights go from 0.25 to 2" in line for line in ledger.lines())
    light = load(write(tmp_path / "light.jsonl", [talk(0.5)]), chat).ledgers[0]
    plain = load(write(tmp_path / "plain.jsonl", [talk(1)]), chat).ledgers[0]
    assert light.weights == (0.5, 0.5) and plain.weights is None
    assert light.merge(plain).weights == (0.5, 1.0) and plain.merge(plain).weight_lines() == []
    report = check_file(tmp_path / "a.jsonl", chat)
    assert (report.account.weighted, report.trained, report.untrained) == (ledger.weighted, ledger.trained, 1)


def test_without_weights_there_is_no_column_of_them(chat: ChatFormat, tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [talk(1, 0), talk(None)]), chat)
    assert "loss_weights" not in data[0] and "loss_weights" not in collate_padded([data[0], data[1]])
    assert next(tmp_path.glob("stores/*/trained.values.npy")).stat().st_size < 300  # one byte per token
    assert data.parts[0].ledger.weighted == 0


def test_a_part_with_fractions_joins_one_without(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_trainer.data.encode.workers.ROWS_PER_PART", 1)
    data = load(write(tmp_path / "a.jsonl", [talk(0.5), talk(1)]), chat)
    assert [float(data[i]["loss_weights"].max()) for i in range(2)] == [0.5, 1.0]


def test_rows_of_other_batches_are_cut_with_their_weights() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "loss_weights": torch.tensor([[1.0, 0.5, 2], [3, 1, 1]])}
    assert take_rows([batch], [(0, 1, 2)])["loss_weights"].tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"text": "a b", "loss_weight": -2}, "text", "key 'loss_weight': found int -2; expected"),
        (
            {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "weight": 0.5}], "rejected": "b"},
            "pairs",
            "a message that weighs neither 0 nor 1",
        ),
        (
            {"messages": talk(0.5)["messages"], "label": True},
            "unpaired",
            "a message that weighs neither 0 nor 1",
        ),
        (
            {"instruction": "q", "output": "a", "image": "cat.png"},
            "conversations",
            "key 'image'.*image_columns: ignore",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "pairs", "key 'images'"),
    ],
)
def test_what_a_kind_of_rows_cannot_use_is_refused(
    chat: ChatFormat, tmp_path: Path, row: dict[str, Any], kind: str, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=f"a.jsonl:1.*{message}"):
        load(path, chat, kind, packing=get_kind(kind).packings[-1], block_size=8)
    assert [error.location.row for error in check_file(path, chat, kind=kind).problems] == [1]
    with pytest.raises(DataError, match=r"no row to train on \(1 row dropped: (loss_weight|images)"):
        load(path, chat, kind, packing="none", bad_rows="drop")


def test_texts_pairs_and_judged_answers_count_as_much_as_their_rows_weigh(chat: ChatFormat, tmp_path: Path) -> None:
    texts = [{"text": "one two three", "loss_weight": w} for w in (0.5, 0, 1, 2)]
    rows = load(write(tmp_path / "texts.jsonl", texts), chat, "text", packing="none")
    assert [sorted(set(rows[i]["loss_weights"].tolist())) for i in range(3)] == [[0.5], [1.0], [2.0]]
    assert rows.ledgers[0].dropped_rows == {"a row of weight 0": 1}
    length = int(rows.lengths[0])
    assert (rows.ledgers[0].weighted, rows.ledgers[0].weights) == (2 * (length - 1), (0.5, 2.0))
    # laid end to end and cut anywhere, every token keeps the weight of its document
    blocks = load(tmp_path / "texts.jsonl", chat, "text", packing="wrapped", block_size=length + 2)
    every = [weight for i in range(len(blocks.lengths)) for weight in blocks[i]["loss_weights"].tolist()]
    assert every == ([0.5] * length + [1.0] * length + [2.0] * length)[: len(every)]
    counted = [w for i in range(len(blocks.lengths)) for w in blocks[i]["loss_weights"][1:].tolist() if w != 1]
    assert blocks.ledgers[0].weighted == len(counted)
    packed = load(tmp_path / "texts.jsonl", chat, "text", packing="bfd_split", block_size=2 * length)
    assert sum(float(packed[i]["loss_weights"].sum()) for i in range(len(packed.lengths))) == 3.5 * length

    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", "loss_weight": w} for w in (0.5, 0, 3)]
    rows = load(write(tmp_path / "pairs.jsonl", pairs), chat, "pairs", packing="flat")
    batch = get_kind("pairs").collate([rows[0], rows[1]], collate_flat)
    assert batch["row_weights"].tolist() == [0.5, 3.0] and "loss_weights" not in batch
    plain = load(write(tmp_path / "plain.jsonl", [dict(pairs[0], loss_weight=1)]), chat, "pairs")
    assert "row_weights" not in get_kind("pairs").collate([plain[0]], collate_flat)

    judged = [{"prompt": f"q{w}", "completion": "a b", "label": True, "loss_weight": w} for w in (2, 1, 0)]
    rows = load(write(tmp_path / "judged.jsonl", judged), chat, "unpaired")
    batch = get_kind("unpaired").collate([rows[0], rows[1]], collate_flat)
    assert batch["row_weights"].tolist() == [2.0, 1.0]
    report = check_file(tmp_path / "pairs.jsonl", chat, kind="pairs")
    assert report.account.weights == (0.5, 3.0) and report.untrained == 1


def test_what_is_left_out_of_rows_is_counted(chat: ChatFormat, tmp_path: Path) -> None:
    """Unknown keys, empty answers, images that are to be ignored, a column that may mean anything."""
    turns = talk(1, 1)["messages"]
    turns[1] |= {"content": " ", "mood": "dry"}
    rows = [{"messages": turns}, {**talk(1), "mood": "dry"}, {"instruction": "q", "output": "a", "image": "x"}]
    data = load(write(tmp_path / "a.jsonl", rows[:2]), chat)
    assert read(chat, data[0]["input_ids"], data[0]["trained"]) == {"a1<|im_end|>": 1}  # not the end of an empty turn
    assert data.ledgers[0].lines()[1:] == [
        "columns that are not read: mood",
        "1 message: the key 'mood' is not known and left out",
        "1 turn: an empty answer inside a dialogue, read and not trained on",
    ]
    report = check_file(tmp_path / "a.jsonl", chat)
    assert report.account.notes == data.ledgers[0].notes and report.trained == data.ledgers[0].trained
    images = load(write(tmp_path / "b.jsonl", rows[2:] * 2), chat, image_columns="ignore")
    assert images.ledgers[0].lines()[1:] == ["2 rows: its column 'image' is left out, rows of conversations are text"]
    texts = load(write(tmp_path / "c.jsonl", [{"text": "a b c", "weight": 80}]), chat, "text", packing="none")
    assert texts.ledgers[0].lines()[1:] == [
        "1 row: its column 'weight' is not used; 'loss_weight' says how much a row counts"
    ]
    prompts = load(write(tmp_path / "p.jsonl", [{"prompt": "q", "weight": 80, "loss_weight": 2}]), chat, "prompts")
    assert prompts[0]["row"]["weight"] == 80 and prompts.ledgers[0].lines()[1:] == []
    grams = load(write(tmp_path / "d.jsonl", [{**talk(1), "weight": "80 g"}]), chat)
    assert grams.ledgers[0].lines()[1:] == ["1 row: its column 'weight' holds no weights and is not used"]
    sides: dict[str, Any] = {"prompt": "q"}
    sides["chosen"] = [{"role": "assistant", "content": ""}, turns[2], {"role": "assistant", "content": "yes"}]
    sides["rejected"] = [{"role": "assistant", "content": "x"}, turns[2], {"role": "assistant", "content": "no"}]
    pairs = load(write(tmp_path / "e.jsonl", [sides]), chat, "pairs")
    assert read(chat, pairs[0]["chosen"]["input_ids"], pairs[0]["chosen"]["trained"]) == {"yes<|im_end|>": 1}
    assert pairs.ledgers[0].notes[EMPTY_ANSWER] == 1


def test_notes_of_rows_that_are_read_again_are_counted_once(chat: ChatFormat, tmp_path: Path) -> None:
    refuses = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('bad') }}{% endif %}{% endfor %}"
    odd = talk(1, 1)
    odd["messages"][1]["content"] = ""
    bad = talk(1)
    bad["messages"][0]["content"] = "bad"
    strict = ChatFormat(chat.tokenizer, refuses + PLAIN)
    data = load(write(tmp_path / "a.jsonl", [odd, bad]), strict, bad_rows="drop")
    assert data.ledgers[0].notes == {EMPTY_ANSWER: 1, ALL_CHARACTERS: len("q" + "q" + "a1")}
    assert data.ledgers[0].dropped_rows == {"template": 1}


def test_tools_are_rendered_in_every_kind(chat: ChatFormat, tmp_path: Path) -> None:
    tools = [{"name": "add_up", "parameters": {}}]
    turn = {"role": "user", "content": "q"}
    rows = {
        "pairs": ({"prompt": [turn], "chosen": "a", "rejected": "b", "tools": tools}, ("chosen", "rejected")),
        "unpaired": ({"prompt": [turn], "completion": "a", "label": True, "tools": tools}, ("row",)),
        "prompts": ({"prompt": [turn], "tools": json.dumps(tools)}, ("",)),
        "process": ({"prompt": "q", "completions": ["a"], "labels": [True], "tools": tools}, ("row",)),
    }
    for kind, (row, parts) in rows.items():
        other = {**row, "prompt": "another question"}
        sample = load(write(tmp_path / f"{kind}.jsonl", [row, other]), chat, kind)[0]
        for part in parts:
            ids = (sample[part] if part else sample)["input_ids"]
            assert "add_up" in chat.tokenizer.decode(ids.tolist()), kind
        assert "add_up" in check_file(tmp_path / f"{kind}.jsonl", chat, kind=kind).examples[0][0][0]
