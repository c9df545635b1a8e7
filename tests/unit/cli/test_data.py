"""`llm-trainer data check` and `llm-trainer data prepare`."""

import json
import pickle
import subprocess
import sys
from threading import Timer

import numpy as np
import pytest

from llm_trainer.cli.main import main
from llm_trainer.data.encode import workers
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.lock import Lock


@pytest.fixture(scope="module")
def tokenizer(request):
    return str(request.config.rootpath / "tests" / "reference" / "tokenizer")


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(load_tokenizer(tokenizer))


def run(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(question, answer, **extra):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def test_check_shows_facts_and_marks_what_is_trained_on(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", [conversation("hello", "good day")] * 2)
    assert run("data", "check", path, "--tokenizer", tokenizer, "--block-size", 8) == 1  # not a row fits
    assert run("data", "check", path, "--tokenizer", tokenizer) == 0
    shown = capsys.readouterr().out
    assert "messages (rows of kind 'chat', for conversations)" in shown
    assert "2, 2 samples, 1 exact duplicates" in shown
    assert "[[good day<|im_end|>]]" in shown
    assert "█" in shown


def test_check_names_the_first_problems_and_fails(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [*[{"text": 3}] * 12, *[{"text": "fine"}] * 13])
    assert run("data", "check", path) == 1
    shown = capsys.readouterr().out
    assert f"{path}:10: key 'text': found int 3" in shown
    assert f"{path}:11:" not in shown
    assert "... and 2 more" in shown


def test_check_of_a_model_that_sees_opens_the_images(tmp_path, capsys):
    pytest.importorskip("PIL")
    from vision_data import file_of, llava_processor, picture

    llava_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(file_of(picture(20, 30)))
    good = conversation("<image>What?", "A cat.") | {"image": "a.png"}
    path = write(tmp_path / "a.jsonl", [good, good, conversation("Nothing?", "No.")])
    how = ("--tokenizer", tmp_path / "model", "--image-root", tmp_path / "pictures")
    assert run("data", "check", path, *how) == 0
    shown = capsys.readouterr().out
    assert "images  2, 1 distinct, opened; heights 20 to 20, widths 30 to 30 pixels" in shown
    assert "image tokens  32; of an image 16 to 16, median 16" in shown
    assert run("data", "check", path, *how[:2]) == 1  # they are not beside the file
    assert f"{path}:1: key 'images': found no file at" in capsys.readouterr().out


def test_prepare_pretraining_data_is_one_flat_memory_mapped_array(tmp_path, tokenizer, chat, capsys):
    texts = ["First line", "Second, longer line", "third"]
    path, out = write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path / "out"
    assert run("data", "prepare", path, "--tokenizer", tokenizer, "--out", out) == 0
    ids = np.load(out / "a.npy", mmap_mode="r")
    expected = [chat.encode_text(text).input_ids for text in texts]
    assert ids.dtype == np.uint16
    assert ids.tolist() == sum(expected, [])
    assert [entry.name for entry in out.iterdir()] == ["a.npy"]
    assert f"3 rows, {len(ids)} tokens read = {len(ids) - 3} trained on" in capsys.readouterr().out
    options = DataOptions(block_size=4, packing="wrapped")
    blocks = load([str(out / "a.npy")], get_kind("text"), chat, options, tmp_path)
    assert blocks[0]["input_ids"].tolist() == ids[:4].tolist()


def test_prepare_sft_data_trains_on_the_same_tokens_as_the_text(tmp_path, tokenizer, chat, capsys):
    rows = [conversation("hello", "good day"), conversation("and?", "that is all")]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    assert run("data", "prepare", path, "--tokenizer", tokenizer, "--out", out, "--kind", "conversations") == 0
    assert "finds it again from the ids" in capsys.readouterr().out
    expected = [chat.encode(row["messages"]) for row in rows]
    assert pickle.loads((out / "a.pkl").read_bytes()) == [one.input_ids for one in expected]
    loaded = load([str(out / "a.pkl")], get_kind("conversations"), chat, DataOptions(block_size=64), tmp_path)
    assert [loaded[i]["trained"].tolist() for i in range(2)] == [one.trained for one in expected]


def test_prepare_says_where_ids_alone_do_not_suffice(tmp_path, tokenizer, capsys):
    twice = conversation("q", "a", loss_weight=0)["messages"] + conversation("r", "b")["messages"]
    half = conversation("q", "a", loss_weight=0.5)
    path, out = write(tmp_path / "a.jsonl", [{"messages": twice}, conversation("q", "a"), half]), tmp_path / "out"
    sft = ("--tokenizer", tokenizer, "--out", out, "--kind", "conversations")
    assert run("data", "prepare", path, *sft) == 0
    assert "WARNING: in 2 of 3 rows" in capsys.readouterr().out
    assert run("data", "prepare", write(tmp_path / "b.jsonl", [{"prompt": "1+1=", "completion": "2"}]), *sft) == 2
    assert "sample 1 cannot be kept as ids alone" in capsys.readouterr().err


def test_prepare_goes_on_after_a_kill(tmp_path, tokenizer, chat, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(9)])
    command = ("data", "prepare", path, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    monkeypatch.setattr(workers, "ROWS_PER_PART", 2)
    write_part, saved = workers.write_part, []

    def write_until_killed(folder, number, part):
        if number == 3:
            raise SystemExit("killed")
        saved.append(number)
        write_part(folder, number, part)

    monkeypatch.setattr(workers, "write_part", write_until_killed)
    assert run(*command) == "killed"
    assert not (tmp_path / "out" / "a.npy").exists()
    monkeypatch.setattr(workers, "write_part", lambda *part: (saved.append(part[1]), write_part(*part)))
    assert run(*command) == 0
    assert sorted(saved) == [0, 1, 2, 3, 4]  # nothing twice
    ids = np.load(tmp_path / "out" / "a.npy").tolist()
    assert ids == [token for i in range(9) for token in chat.encode_text(f"document {i}").input_ids]


def test_prepare_waits_for_another_one_in_the_same_folder(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}] * 3)
    other = Lock(tmp_path / "out" / ".prepare.lock", "x")
    other.acquire()
    Timer(0.3, other.release).start()
    assert run("data", "prepare", path, "--tokenizer", tokenizer, "--out", tmp_path / "out") == 0
    assert f"the folder '{tmp_path / 'out'}' is in use by process" in caplog.text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.npy"]


def test_prepare_counts_bad_rows_only_when_told_to(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}] * 3 + [{"text": 3}])
    command = ("data", "prepare", path, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert run(*command) == 2
    assert f"error: {path}:4: key 'text'" in capsys.readouterr().err
    assert run(*command, "--drop-bad-rows") == 0
    assert "1 row dropped: wrong_type" in capsys.readouterr().out


def test_prepare_refuses_what_it_cannot_write(tmp_path, tokenizer, capsys):
    for name in ("a.jsonl", "a.txt"):
        write(tmp_path / name, [{"text": "fine"}])
    both = (tmp_path / "a.jsonl", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", tmp_path)
    assert run("data", "prepare", *both) == 2
    assert "several files would be written to the same name" in capsys.readouterr().err
    assert run("data", "prepare", *both, "--kind", "dpo") == 2


def test_prepared_prompts_are_those_of_the_text(tmp_path, tokenizer, chat, capsys):
    rows = [{"prompt": "2+2?", "answer": "4", "level": 1}, {"prompt": "and?"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    assert run("data", "prepare", path, "--tokenizer", tokenizer, "--out", out, "--kind", "prompts") == 0
    assert "train on the text where a reward reads other columns" in capsys.readouterr().out
    kind = get_kind("prompts")
    text, ids = (load([str(file)], kind, chat, DataOptions(), tmp_path / "c") for file in (path, out / "a.pkl"))
    for i in range(2):
        assert ids[i]["input_ids"].tolist() == text[i]["input_ids"].tolist()
        assert ids[i]["answer"] == text[i]["answer"]
    assert text[0]["row"] == rows[0]


def test_rows_cannot_steer_the_terminal(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", [conversation("hello \x1b[2J", "good\x9b31m")])
    assert run("data", "check", path, "--tokenizer", tokenizer) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x9b" not in shown and r"hello \x1b[2J" in shown


def test_prepare_never_imports_torch(tmp_path, chat):
    """It would take 170 MB and two seconds of a process that has no use for it."""
    chat.tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", [conversation("hello", "good day")])
    code = f"""
import sys
from llm_trainer.cli.main import main
try:
    main(["data", "prepare", {str(path)!r}, "--tokenizer", {str(tmp_path / "tokenizer")!r}, "--out", {str(tmp_path)!r},
          "--kind", "conversations"])
except SystemExit as ended:
    assert ended.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.pkl").exists()


def test_check_says_what_of_a_row_is_weighted_unknown_or_left_out(tmp_path, tokenizer, capsys):
    row = conversation("q", "a", weight=0.5, mood="dry")
    path = write(tmp_path / "a.jsonl", [row, {"instruction": "q", "output": "a", "image": "cat.png"}])
    assert run("data", "check", path, "--tokenizer", tokenizer) == 1
    path = write(tmp_path / "b.jsonl", [row, row | {"image": "cat.png"}])
    assert run("data", "check", path, "--tokenizer", tokenizer, "--ignore-images", "--schema", "messages") == 0
    shown = capsys.readouterr().out
    assert "with another weight than 1; weights go from 0.5 to 0.5" in shown
    assert "2 messages: the key 'mood' is not known and left out" in shown
    assert "1 row: its column 'image' is left out, rows of conversations are text" in shown
