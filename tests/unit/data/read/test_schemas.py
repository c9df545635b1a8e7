"""Rows of every known shape become the canonical kinds; what cannot be used is named by file, row and key."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.data.kinds import get_kind
from llm_trainer.data.read.errors import DataError, DroppedRow, Location
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.read.messages import ROLE_ALIASES
from llm_trainer.data.read.recognise import recognise
from llm_trainer.data.read.schemas import SCHEMAS, get_schema

HERE = Location("f.jsonl", 4711)
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B, S = {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}

# file, stage -> format, rows, samples, rows dropped by reason
FILES = [
    ("code/mbpp_train.jsonl", "conversations", "mbpp", 373, 373, {}),
    ("corpus/alice_gutenberg_11-0.txt", "text", "text", 1, 1, {}),
    ("corpus/c4_demo.jsonl", "text", "text", 190, 190, {}),
    ("corpus/names.txt", "text", "text", 32033, 32033, {}),
    ("corpus/tinyshakespeare.txt", "text", "text", 2, 2, {}),
    ("corpus/wiki_demo.txt", "text", "text", 30, 30, {}),
    ("corpus/wikitext2_valid.txt", "text", "text", 2, 2, {}),
    ("corpus/zh/ci_song_0.json", "text", "paragraphs", 1000, 1000, {}),
    ("corpus/zh/lunyu.json", "text", "paragraphs", 20, 20, {}),
    ("corpus/zh/shijing.json", "text", "content_lines", 305, 305, {}),
    ("corpus/zh/shuimotangshi.json", "text", "paragraphs", 176, 176, {}),
    ("corpus/zh/zh_classics.txt", "text", "text", 1, 1, {}),
    ("preference/dpo_en.json", "pairs", "preference_sharegpt", 191, 191, {}),
    ("preference/dpo_zh.json", "pairs", "preference_sharegpt", 183, 183, {}),
    ("preference/hh_strings.jsonl", "pairs", "hh", 69, 69, {}),
    ("preference/kto_en.json", "unpaired", "kto", 186, 186, {}),
    ("preference/prompt_chosen_rejected_zh.jsonl", "pairs", "preference", 181, 181, {}),
    ("preference/stack_exchange_paired.json", "pairs", "stack_exchange", 25, 25, {}),
    ("preference/ultrafeedback_trl.jsonl", "pairs", "preference", 10, 6, {"tie": 4}),
    ("rl/deepmath_messages_string.jsonl", "prompts", "rlvr", 300, 300, {}),
    ("rl/gsm8k_train_1k.jsonl", "prompts", "question_prompt", 1000, 1000, {}),
    ("rl/gsm8k_train_1k.jsonl", "conversations", "question_answer", 1000, 1000, {}),
    ("rl/gsm8k_verl_200.jsonl", "prompts", "verl", 200, 200, {}),
    ("rl/mt_bench_prompts.jsonl", "prompts", "mt_bench", 80, 80, {}),
    ("rl/rlvr_arith.jsonl", "prompts", "rlvr", 70, 70, {}),
    ("sft/alpaca_en.json", "conversations", "alpaca", 654, 654, {}),
    ("sft/alpaca_text_tiny.json", "conversations", "alpaca", 100, 100, {}),
    ("sft/alpaca_text_tiny.json", "text", "text", 100, 100, {}),
    ("sft/alpaca_zh.json", "conversations", "alpaca", 653, 653, {}),
    ("sft/content_parts_loss_weight.jsonl", "conversations", "messages", 345, 345, {}),
    ("sft/glaive_toolcall_en.json", "conversations", "sharegpt", 213, 213, {}),
    ("sft/gpteacher_roleplay.json", "conversations", "alpaca", 1200, 1200, {}),
    ("sft/identity.json", "conversations", "alpaca", 91, 91, {}),
    ("sft/oasst_trees.jsonl", "conversations", "oasst", 48, 48, {}),
    ("sft/openai_bare_list.jsonl", "conversations", "message_list", 128, 128, {}),
    ("sft/openai_messages.jsonl", "conversations", "messages", 199, 199, {}),
    ("sft/prompt_completion.jsonl", "conversations", "prompt_completion", 144, 144, {}),
    ("sft/seed_tasks.jsonl", "conversations", "seed_tasks", 173, 173, {}),
    ("sft/sharegpt_identity.json", "conversations", "sharegpt", 500, 500, {}),
    ("sft/wikisql_text.jsonl", "conversations", "text", 500, 500, {}),
    ("spec_formats/dpo.jsonl", "pairs", "preference_dialogues", 60, 60, {}),
    ("spec_formats/pretrain.jsonl", "text", "text", 200, 200, {}),
    ("spec_formats/rl_answer.jsonl", "prompts", "prompt", 100, 100, {}),
    ("spec_formats/rl_prompt_only.jsonl", "prompts", "prompt", 100, 100, {}),
    ("spec_formats/sft.jsonl", "conversations", "message_list", 100, 100, {}),
    ("vlm/coco_two_images/pretrain_image.jsonl", "text", "vision", 12, 12, {}),
    ("vlm/coco_two_images/sft_multi_image.jsonl", "conversations", "vision", 11, 11, {}),
    ("vlm/coco_two_images/sft_single_image.jsonl", "conversations", "vision", 22, 22, {}),
    ("vlm/deepeyes_verl_6.parquet", "prompts", "vision", 6, 6, {}),
    ("vlm/easy_vqa_train/answers.txt", "text", "text", 13, 13, {}),
    ("vlm/easy_vqa_train/questions.json", "conversations", "easy_vqa", 2951, 2951, {}),
    ("vlm/open_images_qa/conversations.json", "conversations", "vision", 20, 20, {}),
]


def accepted(kind: str | None) -> tuple[str, ...]:
    return () if kind is None else get_kind(kind).accepts


def load(path: Path, kind: str | None, schema: str | None = None, **options: Any) -> tuple[str, int, list, Counter]:
    """Name of the format, number of rows, samples, reasons of dropped rows."""
    rows = list(read_rows(path, **options))
    chosen = get_schema(schema) if schema else recognise(rows[:20], accepted(kind))
    samples, dropped = [], Counter[str]()
    for location, row in rows:
        try:
            samples += chosen.samples(row, location)
        except DataError as error:
            dropped[error.reason] += 1
    return chosen.name, len(rows), samples, dropped


@pytest.mark.parametrize(("file", "kind", "name", "num_rows", "num_samples", "dropped"), FILES)
def test_real_files_are_what_they_are(
    shared_data: Path, file: str, kind: str, name: str, num_rows: int, num_samples: int, dropped: dict[str, int]
) -> None:
    found, rows, samples, reasons = load(shared_data / file, kind)
    assert (found, rows, len(samples), reasons) == (name, num_rows, num_samples, dropped)
    is_ambiguous = {"question_prompt", "text"} & {name}
    if not is_ambiguous:
        assert recognise(list(read_rows(shared_data / file))[:20]).name == name


def test_every_real_file_is_listed(shared_data: Path) -> None:
    suffixes = (".txt", ".json", ".jsonl", ".parquet")
    files = {str(path.relative_to(shared_data)) for path in shared_data.rglob("*") if path.suffix in suffixes}
    assert {file for file in files if not file.startswith("tokenizer/")} == {entry[0] for entry in FILES}


def test_real_conversations(shared_data: Path) -> None:
    sft = shared_data / "sft"
    tools = load(sft / "glaive_toolcall_en.json", "conversations")[2]
    assert sum(sample["tools"] is None for sample in tools) == 82
    assert tools[0]["tools"][0]["function"]["name"] == "search_recipes"
    call = next(m for m in tools[0]["messages"] if "tool_calls" in m)
    arguments = {"ingredients": ["chicken", "bell peppers", "rice"]}
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "search_recipes", "arguments": arguments}}],
    }
    assert sum("tool_calls" in m for sample in tools for m in sample["messages"]) == 153
    assert Counter(m["role"] for sample in tools for m in sample["messages"])["tool"] == 153
    tutor = load(shared_data / "spec_formats/sft.jsonl", "conversations")[2][0]["messages"]
    assert [m["role"] for m in tutor] == ["system", "user", "assistant"]
    assert tutor[2]["content"] == "72" and tutor[2]["reasoning_content"].startswith("Natalia sold 48/2 = 24 clips")
    weighted = load(sft / "content_parts_loss_weight.jsonl", "conversations")[2][0]["messages"]
    assert [m["loss_weight"] for m in weighted] == [0.0, 1.0] and weighted[0]["content"] == "hi"
    assert "{{name}}" in weighted[1]["content"]
    assert "{{name}}" in load(sft / "identity.json", "conversations")[2][0]["messages"][1]["content"]


def test_real_trees(shared_data: Path) -> None:
    path = shared_data / "sft/oasst_trees.jsonl"
    best, every = (load(path, None, name)[2] for name in ("oasst", "oasst_all_paths"))
    assert len(every) == 265  # assistant turns below which there is no other
    assert all(sample["messages"][-1]["role"] == "assistant" for sample in every)
    assert Counter(len(sample["messages"]) for sample in best) == {2: 31, 4: 17}
    assert all(sample in every for sample in best)
    assert best[0]["messages"][1]["content"].startswith("The first step is to research your options.")


def test_real_preferences(shared_data: Path) -> None:
    folder = shared_data / "preference"
    sharegpt = load(folder / "dpo_en.json", "pairs")[2]
    contract = load(shared_data / "spec_formats/dpo.jsonl", "pairs")[2]
    assert contract == sharegpt[:60]  # one was derived from the other
    assert Counter(sample["prompt"][0]["role"] for sample in sharegpt)["system"] > 40
    hh = load(folder / "hh_strings.jsonl", "pairs")[2]
    assert Counter(len(sample["prompt"]) for sample in hh) == {1: 28, 3: 18, 5: 14, 7: 8, 13: 1}
    assert hh[0]["prompt"] == [{"role": "user", "content": "What will happen if I drive my car into the water?"}]
    assert all(len(sample["chosen"]) == 1 and sample["chosen"] != sample["rejected"] for sample in hh)
    ultra = load(folder / "ultrafeedback_trl.jsonl", "pairs")[2]
    assert all(len(sample["prompt"]) == len(sample["chosen"]) == 1 and sample["margin"] > 0 for sample in ultra)
    kto = load(folder / "kto_en.json", "unpaired")[2]
    assert Counter(sample["label"] for sample in kto) == {True: 100, False: 86}
    assert all(len(sample["completion"]) == 1 and sample["prompt"][-1]["role"] == "user" for sample in kto)
    json_answer = load(folder / "prompt_chosen_rejected_zh.jsonl", "pairs")[2][145]["chosen"][0]["content"]
    assert json_answer.startswith("[{")  # an answer that is JSON stays text


def test_real_prompts(shared_data: Path) -> None:
    folder = shared_data / "rl"
    verl, gsm8k = (
        load(folder / "gsm8k_verl_200.jsonl", "prompts")[2],
        load(folder / "gsm8k_train_1k.jsonl", "prompts")[2],
    )
    assert [sample["answer"] for sample in verl] == [sample["answer"] for sample in gsm8k[:200]]
    assert load(shared_data / "spec_formats/rl_answer.jsonl", "prompts")[2] == gsm8k[:100]
    assert all(sample["answer"].lstrip("-").replace(".", "").isdigit() for sample in gsm8k)
    assert load(shared_data / "spec_formats/rl_prompt_only.jsonl", "prompts")[2][0]["answer"] is None
    deepmath = load(folder / "deepmath_messages_string.jsonl", "prompts")[2][0]
    assert [m["role"] for m in deepmath["prompt"]] == ["system", "user"] and deepmath["answer"] == "1"
    bench = load(folder / "mt_bench_prompts.jsonl", "prompts")[2]
    assert sum(sample["answer"] is not None for sample in bench) == 39 and len(bench[0]["prompt"]) == 1


def test_real_texts(shared_data: Path) -> None:
    folder = shared_data / "corpus/zh"
    poems = Counter(s["text"] for name in ("ci_song_0", "lunyu", "shijing", "shuimotangshi") for s in load(folder / f"{name}.json", None)[2])  # fmt: skip  # noqa: E501
    assert Counter(s["text"] for s in load(folder / "zh_classics.txt", None, text_unit="paragraph")[2]) == poems
    alice = load(shared_data / "corpus/alice_gutenberg_11-0.txt", None)[2][0]["text"]
    assert "\r" not in alice and not alice.startswith("\ufeff") and len(alice) > 160_000


def test_real_images(shared_data: Path) -> None:
    folder = shared_data / "vlm"
    later = load(folder / "coco_two_images/sft_multi_image.jsonl", "conversations")[2][10]
    assert sum("<image>" in m["content"] for m in later["messages"][1:]) == 1
    assert all(image.startswith("resource/mscoco_") for image in later["images"])
    pretrain = load(folder / "coco_two_images/pretrain_image.jsonl", "text")[2][0]
    assert [m["role"] for m in pretrain["messages"]] == ["assistant"] and len(pretrain["images"]) == 2
    deepeyes = load(folder / "deepeyes_verl_6.parquet", "prompts")[2][0]
    assert deepeyes["images"][0].startswith(b"\xff\xd8\xff")
    assert deepeyes["answer"] == "No, the car is not on the left side of the person."
    vqa = load(folder / "easy_vqa_train/questions.json", "conversations")[2][0]
    assert vqa["images"] == ["images/0.png"] and vqa["messages"][0]["content"] == "<image>what is the blue shape?"


# --- every shape, in small: row, stage, name of the format, sample

HH = "\n\nHuman: q\n\nAssistant: a"
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
SMALL: list[tuple[Any, str | None, str, dict]] = [
    ({"instruction": "do", "input": "it", "output": "ok", "system": "s", "history": [["q", "a"]]}, None, "alpaca",
     {"messages": [S, U, A, {**U, "content": "do\nit"}, {**A, "content": "ok"}], "tools": None}),
    ({"instruction": "q", "context": "", "response": "a"}, None, "dolly", {"messages": [U, A], "tools": None}),
    ({"prompt": "q", "response": "a"}, None, "prompt_response", {"messages": [U, A], "tools": None}),
    ({"content": "hello"}, None, "content", {"text": "hello"}),
    ({"input_ids": [1, 2]}, "text", "token_ids", {"input_ids": [1, 2], "labels": None}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, None,
     "sharegpt", {"messages": [S, U, A], "tools": None}),
    ({"messages": json.dumps([U, A])}, "conversations", "messages", {"messages": [U, A], "tools": None}),
    ({"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]}]}, None, "messages",  # noqa: E501
     {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL[0]}]}], "tools": None}),
    ({"prompt": [S, U, A, U], "completion": [B]}, None, "prompt_completion_turns",
     {"messages": [{**m, "loss_weight": 0.0} for m in (S, U, A, U)] + [B], "tools": None}),
    ({"prompt": [U], "chosen": [A], "rejected": [B]}, None, "preference",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"prompt": HH.removesuffix(" a"), "chosen": " a", "rejected": "b", "margin": 2}, None, "preference",
     {"prompt": [U], "chosen": [{**A, "content": " a"}], "rejected": [B], "margin": 2.0}),
    ({"prompt": "q", "chosen": [U, A, U, B], "rejected": [U, B, U, A, U]}, None, "preference",
     {"prompt": [U], "chosen": [A, U, B], "rejected": [B, U, A], "margin": None}),
    ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, "pairs", "preference_alpaca",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"chosen": HH + "\n\nHuman: q", "rejected": HH[:-1] + "b"}, None, "hh",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"prompt": "q", "completion": "a", "label": "False"}, "unpaired", "kto_prompt",
     {"prompt": [U], "completion": [A], "label": False}),
    ({"conversations": [S, U, A, U, B, U], "label": 1}, None, "kto_sharegpt",
     {"prompt": [S, U, A, U], "completion": [B], "label": True}),
    ({"prompt": "q", "answer": 7}, "prompts", "prompt", {"prompt": [U], "answer": "7"}),
    ({"question": "q", "answer": "so\n#### 1,080"}, "prompts", "question_prompt", {"prompt": [U], "answer": "1080"}),
    ({"messages": [U], "ground_truth": ["x", "子"]}, "prompts", "rlvr", {"prompt": [U], "answer": '["x", "子"]'}),
    ({"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], "image": "i.jpg"}, "conversations", "vision",  # noqa: E501
     {"messages": [{**U, "content": "<image>q"}, A], "images": ["i.jpg"], "answer": None}),
    # dialects of other frameworks
    ({"query": "r", "response": "b", "history": [["q", "a"]], "system": "s"}, "conversations", "query_response",
     {"messages": [S, U, A, {**U, "content": "r"}, B], "tools": None}),
    ({"query": "q", "response": "a", "rejected_response": "b", "history": []}, "pairs", "query_rejected",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "q", "assistant": "b"}], "category": "x"}, None,
     "exchanges", {"messages": [U, A, U, B], "tools": None}),
    ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, None, "exchanges",
     {"messages": [S, U, A], "tools": None}),
    ({"conversation": [{"human": "q", "assistant": "a"}], "system": "s"}, None, "exchanges",
     {"messages": [S, U, A], "tools": None}),
    ({"conversation": [U, A]}, None, "conversation", {"messages": [U, A], "tools": None}),
    ({"context": "q", "chosen": "a", "rejected": "b"}, None, "preference_context",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"context": [{"role": "human", "text": "q"}], "chosen": {"role": "bot", "text": "a"}, "rejected": {"role": "bot", "text": "b"}},  # noqa: E501
     None, "preference_context", {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"context": "q", "answer_w": "a", "answer_l": "b"}, None, "answers_context",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"prompt": "q", "answer_w": "a", "answer_l": "b"}, None, "answers_prompt",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, None, "preference_question",
     {"prompt": [S, U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"chosen_messages": [S, U, A], "rejected_messages": [S, U, B], "prompt": "q"}, None, "preference_messages",
     {"prompt": [S, U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"question": "q", "context": "c", "answer": "a"}, None, "question_answer",
     {"messages": [{**U, "content": "q\nc"}, A], "tools": None}),
    ({"messages": [U, {"role": "assistant", "content": [
        {"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"},
        {"type": "tool_call", "name": "f", "arguments": {"x": 1}}]}]}, None, "messages",
     {"messages": [U, {**A, "reasoning_content": "hm", "tool_calls": CALL}], "tools": None}),
    ({"messages": [U, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]}]}, None,
     "messages", {"messages": [U, {**A, "content": "", "reasoning_content": "hm", "tool_calls": [{"id": "1", **CALL[0]}]}], "tools": None}),  # noqa: E501
    ({"messages": [U, {"role": "assistant", "content": [{"type": "tool_call", "tool_call": {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}}]}]},  # noqa: E501
     None, "messages", {"messages": [U, {**A, "content": "", "tool_calls": [{"id": "1", **CALL[0]}]}], "tools": None}),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, A], "images": [{"bytes": None, "path": "p"}]},  # noqa: E501
     None, "vision", {"messages": [{**U, "content": "<image>q"}, A], "images": ["p"], "answer": None}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "name", "sample"), SMALL)
def test_small_rows(row: Any, kind: str | None, name: str, sample: dict) -> None:
    schema = recognise([(HERE, row)], accepted(kind))
    assert (schema.name, schema.samples(row, HERE)) == (name, [sample])


@pytest.mark.parametrize("alias", ROLE_ALIASES)
def test_every_role_alias_is_read(alias: str) -> None:
    turn = {"from": alias, "value": '{"name": "f", "arguments": {"x": 1}}'}
    [sample] = SCHEMAS["sharegpt"].samples({"conversations": [turn, A]}, HERE)
    message = sample["messages"][0]
    assert message["role"] == ROLE_ALIASES[alias]
    assert message.get("tool_calls") == (CALL if alias == "function_call" else None)


def test_rows_with_several_samples_never_lose_any() -> None:
    row = {"instruction": "i", "instances": [{"input": "x", "output": "1"}, {"input": "", "output": "2"}]}
    schema = recognise([(HERE, row)])
    samples = schema.samples(row, HERE)
    assert [[m["content"] for m in s["messages"]] for s in samples] == [["i\nx", "1"], ["i", "2"]]


def test_trees_follow_rank_and_skip_what_was_deleted() -> None:
    def node(text: str, role: str, *replies: dict, **extra: Any) -> dict:
        return {"text": text, "role": role, "replies": list(replies), **extra}

    dead_end, asked_on = node("thanks", "prompter"), node("more?", "prompter", node("yes", "assistant"))
    tree = node(
        "q", "prompter",
        node("unranked", "assistant"),
        node("second", "assistant", rank=1),
        node("first", "assistant", dead_end, asked_on, rank=0),
        node("zero", "assistant", rank=-1, deleted=True),
    )  # fmt: skip
    best, every = ([[m["content"] for m in s["messages"]] for s in SCHEMAS[name].samples({"prompt": tree}, HERE)]
                   for name in ("oasst", "oasst_all_paths"))  # fmt: skip
    assert best == [["q", "first", "more?", "yes"]]
    assert sorted(every) == [["q", "first", "more?", "yes"], ["q", "second"], ["q", "unranked"]]


# --- errors


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        ("alpaca", {"instruction": "x"}, r"f\.jsonl:4711: key 'output': found nothing \(the row has 'instruction'\)"),
        ("alpaca", ["x"], r"f\.jsonl:4711: found list \['x'\]; expected an object with the key 'output'"),
        ("alpaca", {"instruction": "x", "output": 3}, r"key 'output': found int 3; expected a string"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["q"]}, r"key 'history\[0\]'.*\[question, answer\]"),
        (
            "messages",
            {"messages": [{"role": "robot", "content": ""}]},
            r"'messages\[0\]\.role'.*robot.*config\.roles",
        ),
        ("messages", {"messages": [U, {"content": "x"}]}, r"key 'messages\[1\]\.role': found nothing"),
        ("messages", {"messages": [U]}, r"no assistant turn \(roles: user\).*--kind prompts"),
        ("messages", {"messages": []}, r"key 'messages': found list \[\]; expected a list of turns"),
        ("messages", {"messages": '[{"role": "user"'}, r"key 'messages': .*broken JSON .*cut short"),
        (
            "messages",
            {"messages": [U, {"role": "assistant", "content": None}]},
            r"'messages\[1\]\.content': found nothing",
        ),
        (
            "messages",
            {"messages": [U, {"role": "assistant", "content": 5}]},
            r"int 5; expected a string or a list of parts",
        ),
        (
            "messages",
            {"messages": [{**U, "content": [{"type": "image", "image": "x"}]}, A]},
            r"type str 'image'; expected text only",
        ),
        (
            "messages",
            {"messages": [U, {**A, "loss_weight": "1"}]},
            r"'messages\[1\]\.loss_weight'.*expected true, false, or",
        ),
        ("messages", {"messages": [U, A], "tools": "{"}, r"key 'tools': .*broken JSON"),
        ("message_list", [U, "x"], r"key '\[1\]': found str 'x'"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "call f"}, A]},
            r"\[0\]\.value'.*broken JSON",
        ),
        ("oasst", {"prompt": {"text": "x", "role": "bard", "replies": []}}, r"key 'prompt\.role'.*bard"),
        ("hh", {"chosen": HH, "rejected": 7}, r"key 'rejected': found int 7"),
        ("preference", {"prompt": [U, A], "chosen": "x", "rejected": "y"}, r"prompt that ends on the assistant's turn"),
        ("preference", {"prompt": "q", "chosen": "x", "rejected": "y", "margin": "big"}, r"key 'margin'.*a number"),
        ("kto", {"messages": [U, A], "label": "maybe"}, r"key 'label': found str 'maybe'; expected true or false"),
        ("verl", {"prompt": [U], "reward_model": {}}, r"key 'reward_model\.ground_truth': found nothing"),
        ("token_ids", {"input_ids": [1, 2.5]}, r"key 'input_ids'.*a list of integers"),
        ("token_ids", {"input_ids": [1, 2], "labels": [1]}, r"key 'labels': found 1 label for 2 ids"),
        ("vision", {"messages": [U, A], "images": ["x"]}, r"0 <image> markers and 1 image"),
        ("easy_vqa", ["q", "a"], r"expected \[question, answer, image number\]"),
    ],
)
def test_malformed_rows_are_named(schema: str, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        get_schema(schema).samples(row, HERE)
    assert str(caught.value).startswith("f.jsonl:4711: ") and "; fix: " in str(caught.value)
    assert caught.value.location.row == 4711 and not isinstance(caught.value, DroppedRow)


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("text", {"text": " \n"}, "empty_text"),
        ("alpaca", {"instruction": "x", "output": ""}, "empty_answer"),
        ("prompt_completion", {"prompt": "x", "completion": " "}, "empty_answer"),
        ("prompt", {"prompt": ""}, "empty_prompt"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "identical"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "empty_rejected"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0}, "tie"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3}, "tie"),
        ("preference_dialogues", {"chosen": [U], "rejected": [U, A]}, "empty_chosen"),
        ("preference_dialogues", {"chosen": [U, A], "rejected": [{**U, "content": "z"}, B]}, "prompts_differ"),
        ("preference_dialogues", {"chosen": [U, A, U, B], "rejected": [U, A]}, "continuation"),
        ("hh", {"chosen": HH + "\n\nHuman: x\n\nAssistant: y", "rejected": HH + "\n\nHuman: z\n\nAssistant: y"}, "prompts_differ"),  # noqa: E501
        ("stack_exchange", {"question": "q", "response_j": " ", "response_k": "b"}, "empty_chosen"),
        ("kto", {"messages": [U, A, U, {**A, "content": ""}], "label": True}, "empty_completion"),
        ("oasst", {"prompt": {"text": "x", "role": "prompter", "replies": []}}, "empty_answer"),
    ],
)  # fmt: skip
def test_rows_with_nothing_to_teach_say_why(schema: str, row: Any, reason: str) -> None:
    with pytest.raises(DroppedRow) as caught:
        get_schema(schema).samples(row, HERE)
    assert caught.value.reason == reason


TREE = {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", "rank": 0, "replies": []}]}
NESTED: list[tuple[Any, str]] = [
    *((row, name) for row, _, name, _ in SMALL),
    ({"prompt": TREE}, "oasst_all_paths"),
    ({"instruction": "i", "instances": [{"input": "x", "output": "1"}]}, "seed_tasks"),
    ({"turns": ["q", "r"], "reference": ["a"]}, "mt_bench"),
    ({"prompt": [U], "reward_model": {"ground_truth": "7"}}, "verl"),
    ({"title": "t", "paragraphs": ["p"]}, "paragraphs"),
    ([U, A], "message_list"),
    (["q", "a", 0], "easy_vqa"),
]


def variants(value: Any) -> list[Any]:
    """The value with junk in every place of it, one place at a time."""
    junk = [None, 3, True, "", "x", [], [3], {}, {"a": 1}, ["x"]]
    if isinstance(value, dict):
        return junk + [{**value, key: bad} for key in value for bad in variants(value[key])]
    if isinstance(value, list):
        return junk + [[*value[:i], bad, *value[i + 1 :]] for i in range(len(value)) for bad in variants(value[i])]
    return junk


@pytest.mark.parametrize(("row", "name"), NESTED)
def test_junk_anywhere_is_a_sample_or_a_data_error(row: Any, name: str) -> None:
    for bad in variants(row):
        for schema in (SCHEMAS[name], SCHEMAS["preference"], SCHEMAS["vision"]):
            schema.fits(bad)
            try:
                assert schema.samples(bad, HERE)
            except DataError as error:
                assert str(error).startswith("f.jsonl:4711: ") and error.reason


def test_a_bad_row_does_not_change_what_the_others_are() -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [(Location("f", 1), {"prompt": "q", "chosen": "a"}), (Location("f", 2), good), (Location("f", 3), good)]
    schema = recognise(rows)
    assert schema.name == "preference"
    with pytest.raises(DataError, match=r"f:1: key 'rejected'"):
        schema.samples(rows[0][1], rows[0][0])


def test_errors_cross_process_borders() -> None:
    error = DroppedRow(HERE.at("chosen").at(0).at("role"), "a tie", "two", "delete", "tie")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.location) == (str(error), "tie", error.location)
    assert str(again) == "f.jsonl:4711: key 'chosen[0].role': found a tie; expected two; fix: delete"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": "hello"}], r"key 'messages': found str 'hello'; expected a list of turns such as .*'messages'; fix:"),
        ([{"prompt": 5, "completion": "x", "id": 1}], r"key 'prompt': found int 5; expected text"),
        ([{"instruction": "q", "outputs": "a"}], r"'alpaca' \(instruction, output\).*data_loader_config\.columns \(--column\)"),
        ([{"foo": 1}], r"such as 'text' \(text\); 'messages' \(messages\); 'alpaca' .*data_loader_config\.schema \(--schema"),
        ([{"instruction": "q", "output": "a"}, {"text": "t"}], r"of several formats: alpaca \(1 row\), text \(1 row\); .*own"),
    ],
)  # fmt: skip
def test_what_fits_no_format_is_told_by_what_is_wrong_with_it(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recognise([(HERE, row) for row in rows])


def test_unknown_formats_names_and_kinds() -> None:
    with pytest.raises(DataError, match=r"the columns instruction, reply; .*'alpaca' \(instruction, output\)"):
        recognise([(HERE, {"instruction": "x", "reply": "y"})])
    with pytest.raises(DataError, match=r"found int 3; expected an object, or a list of messages"):
        recognise([(HERE, 3)])
    assert recognise([(HERE, {"chosen": HH, "rejected": HH})], accepted("conversations")).name == "hh"
    with pytest.raises(ValueError, match="unknown data format 'alpacca'; did you mean 'alpaca'"):
        get_schema("alpacca")
    with pytest.raises(ValueError, match="unknown kind of rows 'dpo'"):
        accepted("dpo")
    with pytest.raises(ValueError, match="no rows"):
        recognise([])


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"loss": False}, 0.0),
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"weight": 0.5}, 0.5),
        ({"loss_weight": 3}, 3.0),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"loss": False, "weight": 2}, 0.0),
        ({"weight": None}, None),
        ({}, None),
    ],
)
def test_four_names_of_one_weight(given, weight):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **given}]}
    (sample,) = get_schema("messages").samples(row, Location("f.jsonl", 3))
    assert sample["messages"][1].get("loss_weight") == weight


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"weight": -1}, "int -1"),
        ({"loss": float("nan")}, "float nan"),
        ({"weight": 2, "loss_weight": 3}, "two weights"),
    ],
)
def test_weights_that_cannot_be_meant(given, found):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **given}]}
    with pytest.raises(DataError, match=f"f.jsonl:3.*found {found}"):
        get_schema("messages").samples(row, Location("f.jsonl", 3))


def test_tools_stand_beside_every_kind_of_turns():
    tool = {"name": "add", "description": "a + b", "parameters": {}}
    turn = {"role": "user", "content": "q"}
    rows = {
        "preference": {"prompt": [turn], "chosen": "a", "rejected": "b"},
        "kto": {"messages": [turn, {"role": "assistant", "content": "a"}], "label": True},
        "prompt": {"prompt": [turn]},
        "stepwise": {"prompt": "q", "completions": ["a"], "labels": [True]},
        "prompt_completion_turns": {"prompt": [turn], "completion": "a"},
        "alpaca": {"instruction": "q", "output": "a"},
    }
    for name, row in rows.items():
        (sample,) = get_schema(name).samples(row | {"tools": json.dumps([tool])}, Location("f.jsonl", 1))
        assert sample["tools"] == [{"type": "function", "function": tool}], name
        (sample,) = get_schema(name).samples(row, Location("f.jsonl", 1))
        assert not sample.get("tools")
        with pytest.raises(DataError, match="key 'tools'"):
            get_schema(name).samples(row | {"tools": "[3]"}, Location("f.jsonl", 1))
