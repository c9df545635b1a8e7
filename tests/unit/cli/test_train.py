"""`llm-trainer train`: one YAML in, a model out."""

import json
from pathlib import Path

import pytest
import yaml

from llm_trainer.cli import launch
from llm_trainer.cli.executable import typed
from llm_trainer.cli.main import main


def test_train_leaves_a_model_at_a_stable_path(run, run_yaml, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", run_yaml) == 0
    shown = capsys.readouterr().out
    assert f"model  {out}/model (of checkpoint-00000002)" in shown
    assert f"chat   {typed()} chat {out}/model --raw" in shown
    assert (out / "model").readlink() == Path("checkpoint-00000002/model")
    assert (out / "model" / "config.json").is_file()
    assert run("train", run_yaml, "run_config.max_steps=3", f"eval_dataset={tmp_path / 'a.jsonl'}") == 0
    shown = capsys.readouterr().out
    assert "step 3/3" in shown
    assert f"continuing from {out}/checkpoint-00000002: step 2" in shown
    assert "(of checkpoint-00000003)" in shown
    assert (out / "model").readlink() == Path("checkpoint-00000003/model")
    assert run("plot", out) == 0
    assert (out / "plot.png").stat().st_size > 1000


def test_failed_and_interrupted_runs_have_their_own_codes(run, run_yaml, monkeypatch, capsys):
    from llm_trainer.checkpoint import CheckpointError
    from llm_trainer.train.guards import NonFiniteError
    from llm_trainer.train.signals import EXIT_INTERRUPTED, TrainingInterrupted
    from llm_trainer.trainers.base import BaseTrainer

    for error, code in (
        (NonFiniteError("the gradient is not finite"), 1),
        (CheckpointError("the disk is full"), 1),
        (TrainingInterrupted(EXIT_INTERRUPTED), 75),
    ):

        def train(self, error=error):
            raise error

        monkeypatch.setattr(BaseTrainer, "train", train)
        assert run("train", run_yaml) == code
        assert code == 75 or f"error: {error}\n" == capsys.readouterr().err


def test_train_starts_itself_once_per_gpu(run, run_yaml, monkeypatch, capsys):
    class Started(Exception):
        pass

    def start(plan):
        raise Started(plan.kind, plan.command[3:])

    monkeypatch.delenv("PARALLEL_TYPE", raising=False)
    monkeypatch.setattr(launch.Machine, "look", lambda: launch.Machine(4, 32, False))
    monkeypatch.setattr(launch, "start", start)
    arguments = ["train", str(run_yaml), "run_config.device=null", "--traceback"]
    with pytest.raises(Started) as started:
        main(arguments)
    workers = ["--nproc-per-node=4", "--standalone", "-m", "llm_trainer.cli.main", *arguments]
    assert started.value.args == ("ddp", workers)
    assert "found 4 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("PARALLEL_TYPE", "none")
    assert run("train", run_yaml, "run_config.device=null", "batch_size=1") == 0


QUESTIONS = [
    {"question": "Ann has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 apples.\n#### 7"},
    {"question": "A box has 12 pens. How many in 90?", "answer": "12 * 90 = <<12*90=1080>>1,080\n#### 1,080"},
    {"question": "and another one " * 40, "answer": "#### 2"},
]


def test_rewards_on_rows_of_questions_and_what_a_stranger_is_told(run, run_yaml, tmp_path, capsys):
    """Rows like gsm8k's, with what is built in; each mistake is answered by what was found, where, and the fix."""
    data = tmp_path / "questions.jsonl"
    values = yaml.safe_load(run_yaml.read_text())
    del values["pretrain_config"]
    values["model_config"]["max_position_embeddings"] = 96
    values["grpo_config"] = {"rewards": ["numeric", "exact_match"], "group_size": 2, "gen_max_seq_len": 4}
    values |= {"file_dataset": str(data), "batch_size": 1, "grpo_config": values["grpo_config"]}
    run_yaml.write_text(yaml.safe_dump(values))

    def write(rows):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(QUESTIONS)
    assert run("train", run_yaml) == 0
    shown = capsys.readouterr().out
    assert "step 2/2" in shown and "1 row dropped: longer than the context" in shown
    unanswered = [QUESTIONS[0], {"question": "2 + 2?"}]
    renamed = [{"problem": row["question"], "solution": row["answer"]} for row in QUESTIONS[:2]]
    prompts = [{"prompt": row["question"]} for row in QUESTIONS[:2]]
    grpo = "grpo_config"
    for rows, override, said in (
        (QUESTIONS, f"{grpo}.rewards=[math]", "rewards: got 'math', expected one of exact_match, numeric, math_verify"),
        (QUESTIONS, f"{grpo}.rewards=numeric", f"{grpo}.rewards: got 'numeric', expected a list of values: [numeric]"),
        (QUESTIONS, f"{grpo}.groupsize=4", f"{grpo}.groupsize is not a known key; did you mean group_size?"),
        (QUESTIONS, f"{grpo}.num_generations=4", f"{grpo}.num_generations is not a known key; it is group_size here"),
        (QUESTIONS, f"{grpo}.rewards=[]", f"{grpo}: nothing judges completions: expected rewards"),
        (unanswered, "batch_size=1", f"{data}:2: found the columns question; expected a known format"),
        (renamed, "batch_size=1", f"{data}:1: found the columns problem, solution; expected a known format"),
        (prompts, "batch_size=1", "2 of 2 have no reference answer in the data; expected an answer where"),
        (QUESTIONS[2:], "batch_size=1", "no row to train on (1 row dropped: longer than the context"),
    ):
        write(rows)
        assert run("train", run_yaml, override, f"run_config.save_dir={tmp_path}/bad") == 2
        assert said in capsys.readouterr().err, said
    columns = "data_loader_config.columns={question: problem, answer: solution}"
    write(renamed)
    assert run("train", run_yaml, columns, f"run_config.save_dir={tmp_path}/renamed") == 0
