"""`llm-trainer plot`."""

import json


def test_a_run_or_its_log_folder_becomes_a_picture(run, tmp_path, capsys):
    logs = tmp_path / "run" / "log"
    logs.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 4 - step / 2}) + "\n" for step in (1, 2, 3)]
    (logs / "metrics.jsonl").write_text("".join(lines))
    assert run("plot", tmp_path / "run", "--smooth", 0.5) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'plot.png'}\n"
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", logs, "-o", tmp_path / "curves.svg") == 0
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_folder_without_curves_is_one_message(run, tmp_path, capsys):
    assert run("plot", tmp_path) == 2
    assert f"error: {tmp_path}: found no metrics.jsonl; expected the save_dir of a run" in capsys.readouterr().err
