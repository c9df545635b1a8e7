"""Rollouts as steps of a run: positions, updates, resume, evaluation, signals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.data.rollouts import Rollout, Used
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from writers import BigramTrainer, make_trainer, prompts


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds but times."""
    found = []
    for line in (folder / "log" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "choices" not in values:  # every life says them
            found.append({name: value for name, value in values.items() if "second" not in name and name != "time"})
    return found


def weights(trainer: BigramTrainer) -> torch.Tensor:
    return trainer.base_model.table.weight.detach().clone()  # type: ignore[union-attr, operator]


def test_every_rollout_is_updated_on_as_often_as_was_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.run.source.num_steps() is None  # a list of batches does not say how many prompts they hold
    trainer.train()
    progress = trainer.run.progress
    assert (progress.step, progress.epoch, progress.rollout, progress.updates) == (24, 2, 6, 0)
    assert trainer.maker.begun == [0, 1, 2, 3, 4, 5]
    rewards = [line["reward"] for line in lines(tmp_path) if "reward" in line]
    assert len(rewards) == 6  # a rollout's metrics are those of the line of its first update


def test_a_rollout_on_disk_has_its_columns_and_a_ledger_that_balances(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.masks_cut = True
    trainer.train()
    rollout = Rollout(tmp_path / "rollouts" / "00000002")
    assert len(rollout) == 8 and rollout.column("group").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.facts(7)["answer"] == "answer 11"
    row = rollout[0]
    assert row["trained"].shape == row["sampled_logprobs"].shape == row["advantages"].shape == row["input_ids"].shape
    cut = rollout.column("finish") == 1
    ledger = rollout.ledger
    assert cut.any() and not cut.all() and rollout.used.tolist() == list(range(8))
    masked = sum(int(rollout.store["trained"][i].sum()) for i in np.flatnonzero(cut))
    assert ledger["masked"] == {"cut": masked} and ledger["sampled"] == ledger["trained"] + masked
    assert not rollout[int(np.flatnonzero(cut)[0])]["trained"].any()


def test_rows_of_a_group_begin_with_their_prompt_and_a_budget_counts_it_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.train()
    rollout = Rollout(tmp_path / "rollouts" / "00000002")
    shared = Used(rollout).shared()
    own = np.array([int(rollout[i]["trained"].argmax()) for i in range(8)]) - 1  # but the last token of the prompt
    assert shared.tokens.tolist() == own.tolist() and shared.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    source: Any = trainer.run.source
    source.shares_prompts, source.micro_batch_tokens = True, int(rollout.lengths.sum() - own[::2].sum())
    assert len(source._stream(2, rollout, None)._micro_batches(np.arange(8))) == 1
    source.shares_prompts = False
    assert len(source._stream(2, rollout, None)._micro_batches(np.arange(8))) == 2


def test_a_run_that_was_interrupted_at_any_update_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()

    def ask(run: Any) -> None:
        if run.progress.step % 5 == 3:
            run.signals.received = 15

    for _ in range(9):
        trainer = make_trainer(tmp_path / "cut", hooks=[Hook("ask", ask, every_steps=1)])
        try:
            trainer.train()
            break
        except TrainingInterrupted as stop:
            assert stop.code == 75
    assert trainer.run.progress.step == 24 and torch.equal(weights(trainer), weights(whole))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_rollout_made_after_the_last_checkpoint_is_found_again(tmp_path: Path) -> None:
    """Though its reward would be another one if it were made anew."""

    class Noisy(BigramTrainer):
        noisy_reward = True

    first = make_trainer(tmp_path, kind=Noisy, max_steps=14, save_interval_steps=6)
    first.train()
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, kind=Noisy, max_steps=14, resume=str(tmp_path / "checkpoint-00000012"))
    trainer.train()
    assert trainer.maker.begun == [] and torch.equal(weights(trainer), weights(first))


def test_prompts_of_a_batch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [{"questions": [1]}], grad_accum_steps=1)
    with pytest.raises(ValueError, match=r"a batch of prompts: found questions; expected prompts \[B, L\]"):
        trainer.train()
    batch = prompts(2)[0]
    batch["prompt_attention_mask"][1] = 0
    trainer = make_trainer(tmp_path / "empty", [batch], grad_accum_steps=1)
    with pytest.raises(ValueError, match="prompt 1 of a rollout has no token; expected at least one"):
        trainer.train()


def test_evaluation_is_by_reward_and_the_best_model_is_the_one_with_the_highest(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, val_loader=prompts(4), eval_interval=4, save_interval=0)
    trainer.train()
    found = [line["eval_reward"] for line in lines(tmp_path) if "eval_reward" in line]
    assert len(found) == 6 and trainer.run.progress.best_loss == max(found) != min(found)
    assert all("eval_length" in line for line in lines(tmp_path) if "eval_reward" in line)
