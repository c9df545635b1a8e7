"""Columns and roles under a user's own names: mapped, checked, listed; and messages that speak the file's language."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import Reading
from llm_trainer.data.check import check_file
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.read.recognise import recognise, schema_of
from llm_trainer.data.read.renaming import check_named_files, reading_of
from llm_trainer.train_configs import DataLoaderConfig

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(path: Path, **reading: Any) -> tuple[str, list]:
    """Name of the format, and the samples of all rows."""
    schema = schema_of(path, Reading(**reading))
    found = []
    for location, row in read_rows(path):
        found += schema.samples(row, location)
    return schema.name, found


MAPPED: list[tuple[dict, dict, str, dict]] = [  # row, options, name of the format, sample
    ({"ask": "q", "reply": "a", "past": [["q", "a"]], "id": 7},
     {"columns": {"query": "ask", "response": "reply", "history": "past"}}, "query_response",
     {"messages": [U, A, U, A], "tools": None}),
    ({"prompt": "a template", "q": "q", "a": "a"}, {"columns": {"prompt": "q", "completion": "a"}}, "prompt_completion",
     {"prompt": "q", "completion": "a"}),
    ({"data": {"ask": "q"}, "answers": [{"text": "a"}, {"text": "b"}], "data.ask": "q"},
     {"columns": {"prompt": "data.ask", "chosen": "answers.0.text", "rejected": "answers.1.text"}}, "preference",
     {"prompt": [U], "chosen": [A], "rejected": [B], "margin": None}),
    ({"dialogue": [{"speaker": "customer", "says": "q", "role": "x"}, {"speaker": "agent", "says": "a"}]},
     {"columns": {"messages": "dialogue", "messages.role": "speaker", "messages.content": "says"},
      "roles": {"user": "customer", "assistant": ["agent", "bot"]}}, "messages", {"messages": [U, A], "tools": None}),
    ({"messages": json.dumps([{"role": "问", "content": "q"}, {"role": "答", "content": "a"}])},
     {"roles": {"user": "问", "assistant": "答"}}, "messages", {"messages": [U, A], "tools": None}),
    ({"instruction": "x", "output": "y", "body": "t"}, {"columns": {"text": "body"}}, "text", {"text": "t"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reading", "name", "sample"), MAPPED)
def test_rows_under_other_names(tmp_path: Path, row: dict, reading: dict, name: str, sample: dict) -> None:
    assert samples(write(tmp_path / "a.jsonl", row), **reading) == (name, [sample])


def test_a_column_that_is_not_there_is_one_message_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"query": "q", "response": "a", "id": i} for i in range(3)])
    says = r"a\.jsonl: found no column 'responce', which is to be 'completion'; expected one of query, response, id; "
    with pytest.raises(DataError, match=says + r"fix: did you mean 'response'\?"):
        schema_of(path, Reading(columns={"prompt": "query", "completion": "responce"}, bad_rows="drop"))
    late = write(tmp_path / "b.jsonl", *[{"q": "q", "a": "a"}] * 60, {"q": "q", "a": "b", "past": [["q", "a"]]})
    found = samples(late, columns={"query": "q", "response": "a", "history": "past"})[1]
    assert len(found[0]["messages"]) == 2 and len(found[60]["messages"]) == 4


def test_a_name_that_no_format_knows_is_one_message_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "q", "a": "a", "past": [], "id": 1})
    report = check_file(path, columns={"query": "q", "response": "a", "histroy": "past"})
    (error,) = report.problems
    assert "columns.histroy (the file's 'past')" in str(error) and "did you mean 'history'?" in str(error)
    partly = check_file(path, columns={"prompt": "q"}, kind="pairs").problems
    assert "prompt" in str(partly[0])
    with pytest.raises(
        DataError, match=r"the columns chosen \(the file's 'a'\), the only ones that are mapped; .*rejected"
    ):
        schema_of(path, Reading(columns={"chosen": "a"}))


def test_errors_call_columns_as_the_file_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "q", "a": "a"}, {"q": "q", "a": "a"}, {"q": "q", "a": 5})
    problems = check_file(path, columns={"prompt": "q", "completion": "a"}).problems
    assert str(problems[0]).startswith(f"{path}:3: key 'a': found int 5; expected a string")


def test_wrong_roles_and_values_are_refused_in_both_styles() -> None:
    for options in (DataLoaderConfig, DataOptions):
        with pytest.raises(ConfigError, match="roles: got the role 'human' on the left, expected system or user or"):
            options(roles={"human": "H"})
        with pytest.raises(ConfigError, match="columns.*: got .*expected a mapping"):
            options(columns="query")


def test_what_is_not_read_is_listed(tmp_path: Path, reference_dir: Path) -> None:
    rows = [{"q": "count", "a": "one two", "id": i, "source": "s"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", *rows)
    columns = {"prompt": "q", "completion": "a"}
    assert check_file(path, columns=columns).unread == ["id", "source"]
    plain = write(tmp_path / "b.jsonl", {"instruction": "q", "output": "a", "input": "", "id": 1, "system": "s"})
    assert check_file(plain).unread == ["id"]
    chat: ChatFormat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    kind = get_kind("conversations")
    dataset = load([str(path)], kind, chat, DataOptions(columns=columns), tmp_path / "cache")
    assert len(dataset.lengths) == 4
    assert "columns that are not read: id, source" in dataset.ledgers[0].lines()
    other = {"prompt": "a", "completion": "q"}
    turned = load([str(path)], kind, chat, DataOptions(columns=other), tmp_path / "cache")
    assert turned[0]["input_ids"].tolist() != dataset[0]["input_ids"].tolist(), "another mapping is another store"


def test_prompts_keep_the_columns_of_the_file(tmp_path: Path, reference_dir: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"task": "2 + 2", "truth": "4", "level": 3})
    chat: ChatFormat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    options = DataOptions(columns={"prompt": "task", "answer": "truth"})
    sample = load([str(path)], get_kind("prompts"), chat, options, tmp_path / "cache")[0]
    row = {"task": "2 + 2", "truth": "4", "level": 3, "prompt": "2 + 2", "answer": "4"}
    assert (sample["answer"], sample["row"]) == ("4", row)


RENAMED = [  # file, kind, our columns under new names, our roles under new names
    ("sft/alpaca_en.json", "conversations", {"instruction": "task", "input": "given", "output": "gold"}, {}),
    ("sft/openai_messages.jsonl", "conversations", {"messages": "dialogue"}, {"user": "ask", "assistant": "say"}),
    ("preference/ultrafeedback_trl.jsonl", "pairs",
     {"prompt": "ask", "chosen": "good", "rejected": "bad", "score_chosen": "a", "score_rejected": "b"}, {}),
    ("rl/gsm8k_train_1k.jsonl", "prompts", {"question": "problem", "answer": "solution"}, {}),
    ("corpus/c4_demo.jsonl", "text", {"text": "page"}, {}),
]  # fmt: skip


def renamed(value: Any, names: dict[str, str], roles: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [renamed(item, {}, roles) for item in value]
    if not isinstance(value, dict):
        return value
    return {names.get(k, k): roles.get(v, v) if k == "role" else renamed(v, {}, roles) for k, v in value.items()}


@pytest.mark.parametrize(("file", "kind", "names", "roles"), RENAMED)
def test_a_renamed_file_is_read_as_the_original(
    shared_data: Path, tmp_path: Path, file: str, kind: str, names: dict[str, str], roles: dict[str, str]
) -> None:
    accepts = get_kind(kind).accepts
    original = list(read_rows(shared_data / file))
    path = write(tmp_path / "renamed.jsonl", *[renamed(row, names, roles) for _, row in original])
    assert check_file(path, kind=kind).problems, "under the new names nobody knows it, or its roles"
    expected, schema = recognise(original[:20], accepts), schema_of(path, Reading(columns=names, roles=roles), accepts)
    assert schema.name == expected.name
    for (location, row), (_, again) in zip(original, read_rows(path), strict=True):
        try:
            samples = expected.samples(row, location)
        except DataError as error:
            with pytest.raises(type(error)):
                schema.samples(again, location)
        else:
            assert schema.samples(again, location) == samples


# --- per file


def per_file(folder: Path) -> dict[str, Path]:
    """Files of three languages, one of them in a folder."""
    (folder / "more").mkdir()
    row = {"q": "q", "a": "a"}
    return {
        "a": write(folder / "a.jsonl", row),
        "b": write(folder / "b.jsonl", {"ask": "q", "reply": "a"}),
        "c": write(folder / "more" / "c.jsonl", {"turns": [{"role": "customer", "content": "q"}, A]}),
        "ours": write(folder / "ours.jsonl", {"prompt": "q", "completion": "a"}),
    }


def test_names_may_be_said_per_file(tmp_path: Path, reference_dir: Path) -> None:
    """By path, by the folder that was given, by a pattern; who has no entry speaks our language. Each store is its own."""
    files = per_file(tmp_path)
    columns = {
        str(files["a"]): {"prompt": "q", "completion": "a"},  # its path comes before a pattern
        "[ab].jsonl": {"prompt": "ask", "completion": "reply"},
        str(tmp_path / "more"): {"messages": "turns"},
    }
    how = DataOptions(columns=columns, roles={"c.jsonl": {"user": "customer"}}, workers=1)
    chat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    paths = [str(files["a"]), str(tmp_path / "b*"), str(tmp_path / "more"), str(files["ours"])]
    data = load(paths, get_kind("conversations"), chat, how, tmp_path / "cache")
    texts = [chat.tokenizer.decode(data[i]["input_ids"]) for i in range(4)]
    assert texts[0] == texts[1] == texts[3] != texts[2] and "customer" not in texts[2]
    alone = DataOptions(columns=columns[str(files["a"])])
    (again,) = load(paths[:1], get_kind("conversations"), chat, alone, tmp_path / "cache").stores
    assert not again.is_new


def test_what_is_said_per_file_must_be_clear(tmp_path: Path) -> None:
    files = per_file(tmp_path)
    pairs = [(path, path) for path in files.values()]
    names = {"prompt": "q", "completion": "a"}
    with pytest.raises(
        DataError, match=r"a\.jsonl: found 2 entries of data_loader_config.columns \(\*\.jsonl, a\.\*\)"
    ):
        reading_of(Reading(columns={"*.jsonl": names, "a.*": names}), *pairs[0])
    unknown = Reading(columns={"*.jsonl": names, "x/a.json": names})
    with pytest.raises(
        ValueError, match=r"columns: got 'x/a\.json', which is no file of this run; expected one of .*a\.jsonl"
    ):
        check_named_files(unknown, pairs)
    with pytest.raises(ValueError, match=r"roles: got .*; did you mean '.*a\.jsonl'\?"):
        check_named_files(Reading(roles={f"{files['a']}l": {"user": "x"}}), pairs)
    check_named_files(Reading(columns={"more/*": names}, roles={str(files["b"]): {"user": "x"}}), pairs)
    check_named_files(Reading(columns=names), pairs)
    with pytest.raises(ConfigError, match=r"columns: got names \(prompt\) beside mappings of single files"):
        Reading(columns={"prompt": "q", "a.jsonl": names})
    with pytest.raises(ConfigError, match=r"roles: got the role 'robot' on the left"):
        DataLoaderConfig(roles={"a.jsonl": {"robot": "x"}})
