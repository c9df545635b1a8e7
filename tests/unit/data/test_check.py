"""What `llm-trainer data check` knows about a file."""

import json

import numpy as np
import pytest

from llm_trainer.data.check import FileReport, check_file, read_texts
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def chat(request):
    folder = request.config.rootpath / "tests" / "reference" / "tokenizer"
    return ChatFormat(load_tokenizer(folder))


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_counts_lengths_duplicates_and_problems_by_row(tmp_path):
    good = {"messages": turns("hello", "good day")}
    rows = [good, {"messages": turns("a", 7)}, "{broken", good, {"messages": turns("hi", "there")}]
    report = check_file(write(tmp_path / "chat.jsonl", rows))
    assert (report.schema, report.kind, list(report.usable_as), report.unit) == (
        "messages",
        "chat",
        ["conversations"],
        "characters",
    )
    assert (report.rows, report.lengths, report.duplicates) == (4, [13, 13, 7], 1)
    assert [(error.location.row, error.reason) for error in report.problems] == [(3, "bad_json"), (2, "wrong_type")]
    assert report.stops_training
    assert (report.trained, report.examples) == (0, [])


def test_what_is_trained_on_is_the_answer_and_its_end(tmp_path, chat):
    report = check_file(write(tmp_path / "a.jsonl", [{"messages": turns("say it", "I said it")}]), chat)
    (pieces,) = report.examples
    end = chat.tokenizer.convert_ids_to_tokens(chat.stop_token_ids()[0])
    assert [text for text, trained in pieces if trained] == [f"I said it{end}"]
    encoded = chat.encode(turns("say it", "I said it"))
    assert "".join(text for text, _ in pieces) == chat.tokenizer.decode(encoded.input_ids)
    assert (report.lengths, report.trained) == ([len(encoded.input_ids)], sum(encoded.trained))
    assert not report.stops_training


def test_of_a_pair_only_the_answers_are_trained_on(tmp_path, chat):
    row = {"prompt": turns("one", "two", "three"), "chosen": "yes", "rejected": "no, " * 20}
    report = check_file(write(tmp_path / "a.jsonl", [row]), chat, kind="pairs")
    (pieces,) = report.examples
    assert [text.startswith("yes") for text, trained in pieces if trained] == [True]
    rejected = chat.encode([*row["prompt"], {"role": "assistant", "content": row["rejected"]}])
    assert report.lengths == [len(rejected.input_ids)]  # the longer of the two


def test_block_size_says_what_truncation_would_do(tmp_path, chat):
    rows = [{"messages": turns("w " * 40, "never reached")}, {"messages": turns("q", "a")}]
    path = write(tmp_path / "a.jsonl", rows)
    whole, cut = check_file(path, chat), check_file(path, chat, block_size=20)
    assert (whole.untrained, whole.too_long) == (0, (0, 0))
    assert (cut.untrained, cut.too_long) == (1, (1, whole.lengths[0] - 20))
    assert not cut.stops_training
    assert check_file(write(path, rows[:1]), chat, block_size=20).stops_training  # not a row is left


def test_documents_are_cut_into_blocks_and_lose_nothing(tmp_path, chat):
    report = check_file(write(tmp_path / "a.jsonl", [{"text": "many words " * 30}]), chat, block_size=8)
    assert (report.too_long, report.untrained) == ((0, 0), 0)
    assert report.trained == report.lengths[0] - 1  # nothing predicts the first token


def test_prompts_have_nothing_to_train_on_and_that_is_no_problem(tmp_path, chat):
    report = check_file(write(tmp_path / "a.jsonl", [{"prompt": "2 + 2?", "answer": "4"}]), chat, kind="prompts")
    assert (report.kind, report.trained, report.untrained, report.stops_training) == ("prompt", 0, 0, False)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"text": "a"}], "conversations", "expected rows of kind chat or completion"),
        ([{"text": "a"}], "pairs", "expected rows of kind preference"),
        ([{"colour": "red"}], None, "expected a known format"),
        ([""], None, "no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_problem(tmp_path, rows, kind, message):
    report = check_file(write(tmp_path / "a.jsonl", rows), kind=kind)
    assert message in str(report.problems[0])
    assert report.stops_training


def test_token_files(tmp_path, chat):
    np.save(tmp_path / "flat.npy", np.arange(500, dtype=np.uint16))
    flat = check_file(tmp_path / "flat.npy", chat)
    assert (flat.kind, flat.unit, flat.lengths, flat.trained, list(flat.usable_as)) == (
        "tokens", "tokens", [500], 499, ["text", "conversations"],
    )  # fmt: skip
    np.save(tmp_path / "flat.npy", np.array([1, 2, 512]))
    assert "token id 512; expected ids below 512" in str(check_file(tmp_path / "flat.npy", chat).problems[0])
    conversation = chat.encode(turns("q", "an answer"))
    np.save(tmp_path / "ids.npy", np.array([conversation.input_ids]))
    found_again = check_file(tmp_path / "ids.npy", chat, kind="conversations")
    assert found_again.trained == sum(conversation.trained)
    assert "expected rows for pairs" in str(check_file(tmp_path / "ids.npy", kind="pairs").problems[0])


def test_histogram_counts_every_sample_between_powers_of_two(tmp_path):
    report = FileReport(tmp_path, lengths=[1, 2, 3, 4, 5, 33, 64, 65])
    assert report.histogram() == [
        (0, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 1), (9, 16, 0), (17, 32, 0), (33, 64, 2), (65, 128, 1),
    ]  # fmt: skip
    assert report.percentiles() == {"shortest": 1, "median": 4, "95 %": 64, "longest": 65}


def test_unknown_names_are_the_users_mistake(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="unknown kind of rows 'txt'; did you mean 'text'"):
        check_file(path, kind="txt")
    with pytest.raises(ValueError, match="unknown data format 'txt'"):
        check_file(path, schema="txt")


def test_texts_for_a_tokenizer_are_everything_that_is_read_or_written(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": turns("hello", "good day")}])
    write(tmp_path / "b.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert list(read_texts(tmp_path)) == ["hello", "good day", "1 + 1 =", " 2"]


def test_every_shared_file_is_understood(shared_data):
    kinds = {
        "corpus/c4_demo.jsonl": "text", "corpus/names.txt": "text", "corpus/zh/lunyu.json": "text",
        "sft/alpaca_en.json": "chat", "sft/oasst_trees.jsonl": "chat", "sft/prompt_completion.jsonl": "completion",
        "sft/glaive_toolcall_en.json": "chat", "sft/openai_bare_list.jsonl": "chat", "code/mbpp_train.jsonl": "chat",
        "preference/dpo_zh.json": "preference", "preference/kto_en.json": "unpaired",
        "preference/hh_strings.jsonl": "preference", "rl/gsm8k_verl_200.jsonl": "prompt",
        "rl/mt_bench_prompts.jsonl": "prompt", "spec_formats/sft.jsonl": "chat",
        "vlm/coco_two_images/sft_single_image.jsonl": "vision",
    }  # fmt: skip
    for name, kind in kinds.items():
        report = check_file(shared_data / name)
        assert (name, report.kind, report.problems, report.stops_training) == (name, kind, [], False)
