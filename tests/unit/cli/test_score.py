"""Scoring files with a saved reward model."""

import json
import shutil

import pytest
import torch

from llm_trainer import RewardTrainer
from llm_trainer.cli.main import main
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import process_reward_model, reward_model
from llm_trainer.train_configs import RewardConfig, RunConfig, TrainConfig

SHAPE = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = [
    {"prompt": f"count to {n}", "chosen": "one two three"[: 3 + n], "rejected": "no " * (1 + n % 3)} for n in range(10)
]


@pytest.fixture(scope="module")
def tokenizer(request):
    return request.config.rootpath / "tests" / "reference" / "tokenizer"


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tokenizer):
    """A reward model whose head was drawn at random: it agrees with about half of all pairs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    shape = ModelConfig(**SHAPE, max_position_embeddings=64, initializer_range=0.5)
    reward_model(build_model(shape), pad_token_id=0).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(["score", *map(str, arguments)])
    return exit.value.code


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_judged_as_the_trainer_judges_them(judge, tokenizer, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    assert run(judge, pairs, "--out", tmp_path / "scores.jsonl", "--batch-size", 3) == 0
    said = capsys.readouterr().out
    scores = read(tmp_path / "scores.jsonl")
    described = TrainConfig(
        model_config=ModelConfig(**SHAPE, max_position_embeddings=64),
        tokenizer=str(tokenizer),
        file_dataset=str(pairs),
        eval_dataset=str(pairs),
        n_epochs=1,
        batch_size=4,
        reward_config=RewardConfig(),
        run_config=RunConfig(save_dir=str(tmp_path / "run"), precision="fp32", progress=False),
    )
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(judge)
    values = RewardTrainer(train_config=described, model=model).evaluate()
    assert 0 < values["eval_accuracy"] < 1
    margins = [one["chosen"] - one["rejected"] for one in scores]
    assert [one["row"] for one in scores] == list(range(1, 11))
    assert sum(margin > 0 for margin in margins) / 10 == pytest.approx(values["eval_accuracy"])
    assert sum(margins) / 10 == pytest.approx(values["eval_margin"], abs=1e-5)
    expected = f"10 pairs: accuracy {values['eval_accuracy']:.1%}, margin mean {values['eval_margin']:.4f}"
    assert said.startswith(expected)


def test_single_answers_have_the_scores_of_the_pairs_sides(judge, tmp_path, capsys):
    run(judge, write(tmp_path / "pairs.jsonl", PAIRS), "--out", tmp_path / "pairs.out")
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] for row in PAIRS
    ]
    run(judge, write(tmp_path / "chat.jsonl", [{"messages": turns} for turns in chats]), "--out", tmp_path / "chat.out")
    judged = [{"prompt": row["prompt"], "completion": row["rejected"], "label": n < 4} for n, row in enumerate(PAIRS)]
    run(judge, write(tmp_path / "kto.jsonl", judged), "--out", tmp_path / "kto.out")
    pairs = read(tmp_path / "pairs.out")
    alone = [one["score"] for one in read(tmp_path / "chat.out")]
    assert alone == pytest.approx([one["chosen"] for one in pairs], abs=1e-5)  # other rows share its batch
    scores = [one["score"] for one in read(tmp_path / "kto.out")]
    assert scores == pytest.approx([one["rejected"] for one in pairs], abs=1e-5)
    said = capsys.readouterr().out.splitlines()[2]
    assert f"4 good ones {sum(scores[:4]) / 4:.4f}; 6 bad ones {sum(scores[4:]) / 6:.4f}" in said


def test_steps_are_judged_as_the_trainer_judges_them(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "judge"
    model = process_reward_model(build_model(ModelConfig(**SHAPE, max_position_embeddings=64, initializer_range=0.5)))
    model.save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    rows = [{"prompt": f"{n}?", "completions": ["one", "two"], "labels": [n > 3, n < 6]} for n in range(8)]
    steps = write(tmp_path / "steps.jsonl", rows)
    assert run(folder, steps, "--out", tmp_path / "scores.jsonl") == 0
    said = capsys.readouterr().out
    described = TrainConfig(
        model_config=str(folder),
        tokenizer=str(tokenizer),
        file_dataset=str(steps),
        eval_dataset=str(steps),
        n_epochs=1,
        batch_size=4,
        reward_config=RewardConfig(),
        run_config=RunConfig(save_dir=str(tmp_path / "run"), precision="fp32", progress=False),
    )
    accuracy = RewardTrainer(train_config=described).evaluate()["eval_accuracy"]
    scores = [one["steps"] for one in read(tmp_path / "scores.jsonl")]
    both = zip(scores, (row["labels"] for row in rows), strict=True)
    agree = [[(p > 0.5) is label for p, label in zip(*pair, strict=True)] for pair in both]
    assert accuracy == pytest.approx(sum(map(sum, agree)) / 16) and 0 < accuracy < 1
    assert said.startswith(
        f"8 answers, 16 steps: accuracy {accuracy:.1%}, every step of {sum(map(all, agree)) / 8:.1%}"
    )
    assert run(folder, write(tmp_path / "pairs.jsonl", PAIRS)) == 2
    assert "expected what this model judges: process rows" in capsys.readouterr().err


def test_rows_that_cannot_be_scored_are_counted(judge, tmp_path, capsys):
    rows = [PAIRS[0], PAIRS[1] | {"rejected": "no " * 200}, PAIRS[2] | {"chosen": PAIRS[2]["rejected"]}]
    assert run(judge, write(tmp_path / "pairs.jsonl", rows), "--out", tmp_path / "scores.jsonl") == 0
    said = capsys.readouterr().out
    assert [one["row"] for one in read(tmp_path / "scores.jsonl")] == [1]
    assert said.startswith("1 pair:") and "left out: 1 row (longer than the model's context)" in said
    assert said.count("left out: 1 row ") == 2


def test_other_models_and_files_are_refused(judge, tokenizer, tmp_path, capsys):
    pairs, texts = write(tmp_path / "pairs.jsonl", PAIRS), write(tmp_path / "texts.jsonl", [{"text": "hello"}])
    asks, mute = [{"role": "user", "content": "hi"}], {"role": "assistant", "content": "hello", "weight": 0}
    shape = ModelConfig(**SHAPE, max_position_embeddings=64)
    build_model(shape).save_pretrained(tmp_path / "writes")
    (tmp_path / "classifies").mkdir()
    config = json.loads((judge / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "classifies" / "config.json").write_text(json.dumps(config))
    strict = shutil.copytree(judge, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('too polite') }}")
    for folder, file, found in (
        (strict, pairs, "pairs.jsonl:1: found what the chat template cannot render"),
        (tmp_path / "writes", pairs, "found Qwen3ForCausalLM, expected a reward model"),
        (tmp_path / "classifies", pairs, "found a classifier with 2 labels, expected one"),
        (tmp_path / "nowhere", pairs, "nowhere: no such folder"),
        (judge, texts, "found rows of kind 'text'; expected what this model judges: chat or"),
        (judge, write(tmp_path / "asks.jsonl", [{"messages": asks}]), "asks.jsonl:1: found no assistant turn"),
        (judge, write(tmp_path / "mute.jsonl", [{"messages": [*asks, mute]}]), "mute.jsonl:1: found no answer in it"),
    ):
        assert run(folder, file) == 2
        assert found in capsys.readouterr().err
