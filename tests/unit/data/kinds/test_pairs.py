"""Compared and judged answers: what is stored of them, what truncation leaves, and a ledger that balances."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.store import Part, TokenStore
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.encode.workers import build_store
from llm_trainer.data.kinds import DataOptions
from llm_trainer.data.kinds.pairs import EQUAL_AFTER_CUT, PAIRS, PairRows, collate_pairs
from llm_trainer.data.load import Joined
from llm_trainer.data.load import load as load_rows
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.windows import EMPTY_AFTER_CUT, TOO_LONG

Example = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def load(path: Path, chat: ChatFormat, **options):
    return load_rows([str(path)], PAIRS, chat, DataOptions(**options), path.parent / "cache")


def store_of(folder: Path, examples: list[Example]) -> TokenStore:
    def encode(chunk: list[Example]) -> Part:
        part = Part({name: [] for name in PAIRS.columns})
        for prompt, *sides in chunk:
            for side, answer in zip(("chosen", "rejected"), sides, strict=True):
                part.columns[side].append(np.array(prompt + answer, dtype=np.uint16))
                part.columns[f"{side}_trained"].append(np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8))
            part.columns["margin"].append(np.zeros(1, dtype=np.float32))
            part.columns["weight"].append(np.ones(1, dtype=np.float32))
        return part

    return build_store(folder, examples, encode, PAIRS.columns)


def test_a_pair_is_two_conversations_in_which_the_answer_is_trained_on(chat: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    asked = [*earlier, {"role": "user", "content": "2+2?"}]
    sides = {
        side: [*asked, {"role": "assistant", "content": text}] for side, text in (("chosen", "4"), ("rejected", "5 5"))
    }
    path.write_text(json.dumps(sides | {"score_chosen": 3.0, "score_rejected": 1.0}) + "\n")
    sample = load(path, chat)[0]
    assert sample["margin"] == 2.0
    prompt = chat.encode_prompt(asked)
    for side, text in (("chosen", "4"), ("rejected", "5 5")):
        row = sample[side]
        assert row["input_ids"][: len(prompt)].tolist() == prompt and not row["trained"][: len(prompt)].any()
        assert row["trained"][len(prompt) :].all()
        answer = chat.tokenizer.decode(row["input_ids"][len(prompt) :])
        assert answer.startswith(text) and answer != text  # the end of the turn is learnt too


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty_rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 1}, "tie"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: b"},
            "prompts_differ",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_dropped_by_name(row: dict, reason: str, chat: ChatFormat, tmp_path: Path) -> None:
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: and?"}
    good = good if "prompt" not in row else {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, row, good)))
    data = load(path, chat)
    assert data.ledgers[0].dropped_rows == {reason: 1} and data.file_sizes == [2]


@pytest.mark.parametrize(
    "name",
    [
        "dpo_en.json",
        "dpo_zh.json",
        "hh_strings.jsonl",
        "prompt_chosen_rejected_zh.jsonl",
        "stack_exchange_paired.json",
        "ultrafeedback_trl.jsonl",
    ],
)
def test_real_preference_files(name: str, shared_data: Path, chat: ChatFormat, tmp_path: Path) -> None:
    lines = (shared_data / "preference" / name).read_text()
    rows = json.loads(lines) if name.endswith("json") else [json.loads(line) for line in lines.splitlines()]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    data = load(path, chat, block_size=2048, truncation="keep_end")
    ledger = data.ledgers[0].check()
    assert ledger.rows + sum(ledger.dropped_rows.values()) == len(rows[:12])
    assert ledger.rows >= 6 and 0 < ledger.trained < ledger.read
    for i in range(ledger.rows):
        assert all(data[i][side]["trained"][1:].any() for side in ("chosen", "rejected"))


EXAMPLES: list[Example] = [
    ([1, 2, 3, 4], [5, 6], [7]),
    ([1, 2], [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 9]),
    ([1, 2, 3, 4, 5, 6, 7], [8, 9], [9, 8]),
]


@pytest.mark.parametrize(
    ("truncation", "kept", "dropped"),
    [
        ("keep_start", [[1, 2, 3, 4, 5, 6]], {EQUAL_AFTER_CUT: 1, EMPTY_AFTER_CUT: 1}),
        ("keep_end", [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9]], {}),
        ("drop", [[1, 2, 3, 4, 5, 6]], {TOO_LONG: 2}),
    ],
)
def test_truncation_keeps_the_stated_end(truncation: str, kept: list, dropped: dict, tmp_path: Path) -> None:
    rows = PairRows(store_of(tmp_path, EXAMPLES), "x", DataOptions(block_size=6, truncation=truncation))
    assert [rows[i]["chosen"]["input_ids"].tolist() for i in range(rows.ledger.rows)] == kept
    ledger = rows.ledger.check()
    assert dict(ledger.dropped_rows) == dropped
    assert ledger.read == sum(2 * len(p) + len(c) + len(r) for p, c, r in EXAMPLES)
    if truncation == "keep_end":
        assert (ledger.truncated, ledger.truncated_rows) == (2 + 1 + 3 + 3, 2)


def test_too_long_pairs_can_be_an_error_and_no_pair_left_always_is(tmp_path: Path) -> None:
    store = store_of(tmp_path, EXAMPLES)
    with pytest.raises(DataError, match="x:2: found 8 tokens; expected at most 6"):
        PairRows(store, "x", DataOptions(block_size=6, truncation="error"))
    with pytest.raises(DataError, match="no row to train on.*nothing to train on after truncation"):
        PairRows(store, "x", DataOptions(block_size=2))


@pytest.mark.parametrize("name", ["None_keep_start", "9_keep_start", "9_keep_end"])
def test_batches_are_those_of_trl(name: str, reference_dir: Path, tmp_path: Path) -> None:
    case = json.loads((reference_dir / "data" / "cases.json").read_text())["cases"][f"pref_collate_{name}"]
    examples = [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in case["examples"]]
    how = DataOptions(block_size=case["max_length"], truncation=case["truncation_mode"])
    rows = PairRows(store_of(tmp_path, examples), "x", how)
    batch = collate_pairs([rows[i] for i in range(len(examples))], collate_padded)
    for key in ("input_ids", "attention_mask"):
        assert batch[key].tolist() == case["batch"][key]
    mask = torch.tensor(case["batch"]["completion_mask"]).bool()
    assert torch.equal(batch["labels"], batch["input_ids"].where(mask, -100))


def test_a_flat_batch_holds_all_chosen_documents_before_all_rejected(tmp_path: Path) -> None:
    how = DataOptions(packing="flat")
    rows = PairRows(store_of(tmp_path, EXAMPLES), "x", how)
    rows.ref_logps = np.arange(6, dtype=np.float32).reshape(3, 2)
    batch = collate_pairs([rows[2], rows[0]], collate_flat)
    assert batch["document_lengths"].tolist() == [9, 6, 9, 5] and rows.lengths.tolist() == [11, 15, 18]
    assert batch["labels"][0, :9].tolist() == [-100] * 7 + [8, 9]
    assert batch["ref_chosen_logps"].tolist() == [4, 0] and batch["ref_rejected_logps"].tolist() == [5, 1]
    assert PairRows(store_of(tmp_path, EXAMPLES), "x", DataOptions()).lengths.tolist() == [
        12,
        16,
        18,
    ]  # as padded rows cost


def test_what_orders_follow_from_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    store = store_of(tmp_path, EXAMPLES)
    ways = ({"packing": "none"}, {"packing": "flat"}, {"packing": "flat", "share_prompts": True})
    rows = [PairRows(store, "x", DataOptions(**how)) for how in ways]
    assert not np.array_equal(rows[0].lengths, rows[1].lengths)
    for one in rows:
        assert Joined([one]).num_tokens.tolist() == rows[1].lengths.tolist()


def test_pairs_of_token_ids_are_those_of_text(chat: ChatFormat, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    row = {"prompt": "name a colour", "chosen": "blue", "rejected": "seven"}
    text.write_text(json.dumps(row) + "\n")
    turns = [{"role": "user", "content": row["prompt"]}]
    ids = {s: chat.encode([*turns, {"role": "assistant", "content": row[s]}]).input_ids for s in ("chosen", "rejected")}
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps([ids, {"chosen": ids["chosen"], "rejected": ids["chosen"]}]))
    expected, found = load(text, chat)[0], load(tmp_path / "ids.pkl", chat)
    for side in ("chosen", "rejected"):
        for key in ("input_ids", "trained"):
            assert np.array_equal(found[0][side][key], expected[side][key])
    assert found.ledgers[0].dropped_rows == {"identical": 1}


def test_a_row_that_the_template_refuses_is_named_or_dropped(tmp_path: Path, reference_dir: Path) -> None:
    template = "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('no x') }}{% endif %}"
    template += "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"), template)
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "chosen": "b", "rejected": r} for r in ("c", "x", "d")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"pairs.jsonl:2.*no x"):
        load(path, chat)
    data = load(path, chat, bad_rows="drop")
    assert data.file_sizes == [2] and data.ledgers[0].dropped_rows == {"template": 1}
