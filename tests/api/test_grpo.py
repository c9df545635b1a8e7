"""GRPO from a configuration: the same curve as with the same objects, evaluation by reward, what is refused at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from described import SHAPE, curve, describe, logged, prompt_batches, write_rows
from llm_trainer import GRPOTrainer, configure_optimizer
from llm_trainer.builder.model import make_model
from llm_trainer.checkpoint import write_model
from llm_trainer.checkpoint.manager import CheckpointManager
from llm_trainer.checkpoint.valid import read_manifest
from llm_trainer.config.load import load_config
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.rollouts import Rollout
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import load_judge, process_reward_model, reward_model
from llm_trainer.train_configs import ConfigError, DataLoaderConfig, EvalConfig, GRPOConfig, TrainConfig
from llm_trainer.trainers.judging import StepEnds

ROWS = [{"question": f"count to {n}", "answer": "x" * n, "level": n} for n in range(1, 7)]


def shorter(prompts: list[str], completions: list[str], answers: list[str], level: list[int]) -> list[float]:
    """Minus the distance from the answer's length, times a column of the data."""
    return [-abs(len(c) - len(a)) * number for c, a, number in zip(completions, answers, level, strict=True)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", ROWS)


def config(path: Path, reference_dir: Path, save_dir: Path, **changes: Any) -> TrainConfig:
    section = GRPOConfig(group_size=3, gen_max_seq_len=12, loss_beta=0.05, grpo_steps=2)
    return describe(path, reference_dir, save_dir, **({"grpo_config": section} | changes))


def test_the_two_styles_give_the_same_curve(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    described = config(prompts, reference_dir, tmp_path / "described")
    GRPOTrainer(train_config=described, reward_func=shorter).train()

    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    model = make_model(described, tokenizer, torch.device("cpu"))
    GRPOTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=prompt_batches(tokenizer, ROWS, 2),
        max_epochs=1,
        num_samples_per_prompt=3,
        kl_coef=0.05,
        grpo_steps=2,
        gen_max_seq_len=12,
        reward_func=shorter,
        tokenizer=tokenizer,
        stop_token_ids=ChatFormat(tokenizer).stop_token_ids(),
        log_interval=1,
        progress=False,
        save_dir=str(tmp_path / "explicit"),
        save_interval=0,
    ).train()
    found = curve(tmp_path / "described")
    assert len(found) == 6 and found == curve(tmp_path / "explicit")


def test_evaluation_is_by_reward(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS)
    overlong = {"name": "overlong", "weight": 0.5, "max_tokens": 12, "buffer": 6}
    described = config(
        prompts,
        reference_dir,
        tmp_path / "run",
        eval_dataset=str(held_out),
        eval_config=EvalConfig(eval_batch_interval=2, temperature=0.0),
        grpo_config=GRPOConfig(
            group_size=3,
            gen_max_seq_len=12,
            rewards=["exact_match", overlong],
        ),
        eval_prompts=["count to 3"],
    )
    last = GRPOTrainer(train_config=described).train()
    assert {"eval_reward", "eval_completions/mean_length", "rewards/exact_match"} <= set(last)


PLANNED = '''
from pathlib import Path

def planned(prompts, completions, answers, wanted=None):
    """Of held-out prompts a reward per evaluation, one after another; of the others their lengths."""
    if wanted is None:
        return [float(len(one)) for one in completions]
    count = Path(__file__).with_name("evaluations")
    count.write_text((count.read_text() if count.exists() else "") + "x")
    return [wanted[0][len(count.read_text()) - 1]] * len(completions)
'''
BY_REWARD = """
model_config: {vocab_size: 512, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
tokenizer: %(tokenizer)s
file_dataset: %(folder)s/prompts.jsonl
eval_dataset: %(folder)s/held_out.jsonl
n_epochs: 4
batch_size: 2
optim_config: {initial_lr: 1.0e-2}
eval_config: {eval_batch_interval: 1, max_seq_len: 4}
run_config: {save_dir: %(folder)s/run, progress: false, checkpoints_to_keep: 1, save_interval_steps: 1, resume: auto}
grpo_config: {group_size: 2, gen_max_seq_len: 4, rewards: ["%(folder)s/own.py:planned"], reward_in_process: true}
"""


def test_the_best_checkpoint_is_that_of_the_highest_reward_over_all_lives_of_a_run(
    prompts: Path, reference_dir: Path, tmp_path: Path
) -> None:
    rewards = [0.2, 0.9, 0.4, 0.5, 0.6, 0.8, 0.95, 0.1, 0.3]
    write_rows(tmp_path / "held_out.jsonl", [{"question": "count to 3", "answer": "xxx", "wanted": rewards}])
    (tmp_path / "own.py").write_text(PLANNED)
    path = tmp_path / "run.yaml"
    path.write_text(BY_REWARD % {"tokenizer": reference_dir / "tokenizer", "folder": tmp_path})
    run = tmp_path / "run"
    for last, best in ((3, 2), (6, 2), (9, 7)):  # the second life is worse than the first one's best, and gets better
        trainer = GRPOTrainer(train_config=load_config(path, [f"run_config.max_steps={last}"]))
        trainer.train()
        assert [row["eval_reward"] for row in logged(run, "eval_reward")] == pytest.approx(rewards[:last])
        left = [checkpoint.name for checkpoint in sorted(run.glob("checkpoint-*"))]
        assert left == [f"checkpoint-{step:08d}" for step in (best, last)]
        found = CheckpointManager(run).best()
        assert found is not None and found.name == f"checkpoint-{best:08d}"
        assert read_manifest(found)["metric"] == pytest.approx(max(rewards[:last])) == trainer.run.progress.best_loss
        assert (run / "model").resolve() == (found / "model").resolve()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "nothing judges completions: expected rewards"),
        ({"rewards": ["exact"]}, "got 'exact', expected one of exact_match"),
        ({"rewards": ["exact_match"], "loss_type": "dap"}, "loss_type: got 'dap', expected one of grpo"),
        ({"rewards": ["exact_match"], "group_size": 1}, "group_size"),
        (
            {"rewards": ["exact_match"], "group_size": 3, "rows_per_update": 4},
            "got 4, which does not divide the 6 completions",
        ),
        (
            {"reward_model_checkpoint": "judge", "max_resamplings": 1},
            "max_resamplings: got 1, but a reward model judges",
        ),
        ({"rewards": ["exact_match"], "gen_repetition_penalty": 1.2}, "off_policy_correction"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    section: dict[str, Any], message: str, prompts: Path, reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(train_config=config(prompts, reference_dir, tmp_path, grpo_config=GRPOConfig(**section)))


def test_rewards_that_apply_to_nothing_stop_the_run(reference_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "count"}]}) + "\n")
    described = config(
        path, reference_dir, tmp_path, grpo_config=GRPOConfig(rewards=["exact_match"], gen_max_seq_len=4)
    )
    with pytest.raises(ValueError, match="no completion of rollout 00000000 has a reward.* answer"):
        GRPOTrainer(train_config=described).train()


def test_prompts_that_leave_no_room(reference_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question": "word " * 200, "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="no room for a completion of up to 4 .*dataset_block_size to 60"):
        GRPOTrainer(
            train_config=config(
                path,
                reference_dir,
                tmp_path,
                grpo_config=GRPOConfig(gen_max_seq_len=4),
                data_loader_config=DataLoaderConfig(truncation="keep_end"),
            ),
            reward_func=shorter,
        ).train()


def test_a_model_that_judges_steps(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    write_model(process_reward_model(build_model(SHAPE)), tmp_path / "judge", tokenizer)
    values = {}
    for style, steps in (("folder", {"reward_model_checkpoint": str(tmp_path / "judge")}), ("object", {})):
        section = GRPOConfig(reward_model_steps="e", gen_max_seq_len=12, group_size=2, keep_rollouts=True, **steps)
        described = config(prompts, reference_dir, tmp_path / style, grpo_config=section)
        given = {}
        if style == "object":
            given["reward_model"] = load_judge(tmp_path / "judge", judges_steps=True)
        values[style] = GRPOTrainer(train_config=described, **given).train()
    assert 0 < values["folder"]["rewards/model_reward"] < 1  # probabilities
    assert values["folder"]["loss"] == values["object"]["loss"]
    rollout = Rollout(next((tmp_path / "folder" / "rollouts").glob("[0-9]" * 8)))
    ends = StepEnds("e", tokenizer)
    for row in range(len(rollout)):
        begin, ids = int(rollout.store["versions"][row][0]), rollout.store["input_ids"][row]
        known = np.flatnonzero(~np.isnan(rollout.store["step_rewards"][row]))
        assert (known - begin).tolist() == ends(ids[begin:].tolist())
    for changes, said in (
        ({"reward_model_steps": None}, "judges the steps of an answer.* expected reward_model_steps"),
        (
            {"reward_model_checkpoint": None, "rewards": ["exact_match"]},
            "reward_model_steps: got 'e', but there is no model",
        ),
    ):
        own = {
            "reward_model_checkpoint": str(tmp_path / "judge"),
            "reward_model_steps": "e",
            "group_size": 2,
            **changes,
        }
        with pytest.raises(ValueError, match=said):
            GRPOTrainer(train_config=config(prompts, reference_dir, tmp_path / "run", grpo_config=GRPOConfig(**own)))
    with pytest.raises(ConfigError, match="reward_model_steps"):
        GRPOConfig(reward_model_steps="")


def test_a_reference_of_another_tokenizer(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    """Tokens that one of them has more are none of the other's; a folder without a tokenizer is named by its key."""
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    tokenizer.add_tokens(["<b>"])
    write_model(build_model(replace(SHAPE, vocab_size=520)), tmp_path / "reference", tokenizer)
    changes: dict[str, Any] = {"model_config": replace(SHAPE, vocab_size=520)}
    section = GRPOConfig(
        ref_model_checkpoint=str(tmp_path / "reference"), loss_beta=0.1, gen_max_seq_len=4, group_size=2
    )
    described = config(prompts, reference_dir, tmp_path / "run", grpo_config=section, **changes)
    GRPOTrainer(train_config=described, reward_func=shorter)
    described.vocabulary_config.add_tokens = ["<a>"]
    with pytest.raises(
        ConfigError, match="reference has another tokenizer than the policy: id 512 is '<a>' here and '<b>'"
    ):
        GRPOTrainer(train_config=described, reward_func=shorter)
    (tmp_path / "none").mkdir()
    section = GRPOConfig(reward_model_checkpoint=str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"reward_model_checkpoint: .*none: no tokenizer in this folder .* with its token"
    ):
        GRPOTrainer(train_config=config(prompts, reference_dir, tmp_path / "run", grpo_config=section))


def test_a_model_that_is_not_there_is_named_by_its_key(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    described = config(prompts, reference_dir, tmp_path / "run", model_config=absent, tokenizer=absent)
    with pytest.raises(
        ConfigError, match=r"model_config: .*absent: no such file or folder, .* expected the folder of a mo"
    ):
        GRPOTrainer(train_config=described, reward_func=shorter)


def test_a_reward_model_of_another_tokenizer(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    write_model(reward_model(build_model(SHAPE)), tmp_path / "judge", tokenizer)
    section = GRPOConfig(reward_model_checkpoint=str(tmp_path / "judge"), gen_max_seq_len=4, group_size=2)
    values = GRPOTrainer(train_config=config(prompts, reference_dir, tmp_path / "run", grpo_config=section)).train()
    assert "rewards/model_reward" in values
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ConfigError, match="judge has another tokenizer than the policy, so its ids mean other tokens"):
        GRPOTrainer(train_config=config(prompts, reference_dir, tmp_path / "run", grpo_config=section))
