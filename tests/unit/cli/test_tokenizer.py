"""`llm-trainer tokenizer`."""

from llm_trainer.data.encode.tokenizer import load_tokenizer


def test_tokenizer_train(run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good day good day"}\n')
    assert run("tokenizer", "train", tmp_path / "a.jsonl", "--vocab-size", 280, "--out", tmp_path / "t") == 0
    assert f"tokens in {tmp_path / 't'}" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer("good day").input_ids) == "good day"
    assert len(tokenizer("good day").input_ids) < 8  # it has learned pairs
    assert run("tokenizer", "train", tmp_path / "a.jsonl", "--vocab-size", 100, "--out", tmp_path / "t") == 2
