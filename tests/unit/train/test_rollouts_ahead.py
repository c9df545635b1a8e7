"""Rollouts that are made while the one before is learned from: weights, kills, signals, errors, evaluation."""

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.data.rollout_making import TOO_OLD, staleness
from llm_trainer.data.rollouts import Rollout
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from writers import BigramTrainer, lines, make_trainer, prompts, weights

PATIENCE_S = 20


class Ahead(BigramTrainer):
    """4 updates per rollout, of which the last two are taken while the next one is made."""

    max_staleness = 2


def versions(folder: Path, number: int) -> set[int]:
    """Which weights have written a rollout."""
    rollout = Rollout(folder / "rollouts" / f"{number:08d}")
    return {int(rollout.store["versions"][row][1]) for row in range(len(rollout))}


def keeping(**options: Any) -> dict[str, Any]:
    return {"passes": 2, "rows_per_update": 4, "prompts_per_part": 1, "keep_rollouts": True, **options}


def test_the_weights_are_as_old_as_they_may_be(tmp_path: Path) -> None:
    """Rollouts 0 and 3 begin an epoch; 1, 2, 4 and 5 are made by the weights of two updates before they are learned from."""
    trainer = make_trainer(tmp_path, kind=Ahead, source_options=keeping())
    trainer.train()
    assert [versions(tmp_path, number) for number in range(6)] == [{0}, {2}, {6}, {12}, {14}, {18}]
    assert trainer.run.progress.step == 24 and trainer.maker.begun == [0, 1, 2, 3, 4, 5]
    ages = [(line["staleness/mean"], line["staleness/max"]) for line in lines(tmp_path) if "staleness/mean" in line]
    assert ages == [(0, 0), (2, 2), (2, 2), (0, 0), (2, 2), (2, 2)]


def test_it_is_the_same_twice_and_without_an_update_the_same_as_in_turns(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_trainer(tmp_path / name, kind=Ahead).train()
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    for name, kind in (("ahead", Ahead), ("turns", BigramTrainer)):
        made = make_trainer(tmp_path / name, kind=kind, source_options=keeping(), max_epochs=1)
        made.optimizer.param_groups[0]["lr"] = 0.0
        made.train()
    for number in range(3):
        pair = [Rollout(tmp_path / name / "rollouts" / f"{number:08d}") for name in ("ahead", "turns")]
        assert np.array_equal(pair[0].store["input_ids"].values, pair[1].store["input_ids"].values)
        assert np.array_equal(pair[0].store["advantages"].values, pair[1].store["advantages"].values)


class Meets(BigramTrainer):
    """The next rollout is begun before this one is learned from, and is not finished before that: each waits for the other."""

    max_staleness = 4

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_made, self.is_learned = threading.Event(), threading.Event()
        self.order: list[str] = []
        super().__init__(*args, **kwargs)

    def passes(self, phase: str) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if phase == "generating" and not is_main:
            self.is_made.set()
            assert self.is_learned.wait(PATIENCE_S), "the rollout before was not learned from meanwhile"
        if phase == "updating":
            assert self.run.progress.rollout == 2 or self.is_made.wait(PATIENCE_S), "nothing was made meanwhile"
            self.is_learned.set()
        if phase == "scoring":
            assert is_main


def test_one_is_made_while_another_is_learned_from(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, kind=Meets, max_epochs=1)
    trainer.train()
    assert trainer.run.progress.step == 12 and trainer.is_made.is_set()
    assert threading.active_count() == 1 or "rollout-ahead" not in {one.name for one in threading.enumerate()}


def test_nothing_is_made_ahead_that_will_not_be_learned_from(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "steps", kind=Ahead, max_steps=8, source_options=keeping())
    trainer.train()
    assert trainer.maker.begun == [0, 1] and not list((tmp_path / "steps" / "rollouts").glob("*.building"))
    further = make_trainer(tmp_path / "steps", kind=Ahead, max_steps=9, source_options=keeping())
    further.train()
    assert further.maker.begun == [2]


def test_a_run_that_is_extended_says_what_a_longer_one_would_have_made_earlier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it ended between two rollouts or in the middle of one; the first rollout of an epoch is the same anyway."""
    made: dict[int, bool] = {}
    for ended in (6, 7, 8, 12):
        options: dict[str, Any] = {"kind": Ahead, "source_options": keeping()}
        make_trainer(tmp_path / f"{ended}", max_steps=ended, **options).train()
        assert "bit-identical" not in capsys.readouterr().out
        make_trainer(tmp_path / f"{ended}", max_steps=13, **options).train()
        said = capsys.readouterr().out
        made[ended] = "bit-identical" in said
        if ended in (7, 8):
            number = 2
            assert (
                f"rollout {number} is made with the weights of step {ended}; a run that did not end by max_steps"
                in said
            )
            assert "would have begun it with those of step 6" in said and versions(tmp_path / f"{ended}", number) == {
                ended
            }
    assert made == {6: False, 7: True, 8: True, 12: False}
    make_trainer(tmp_path / "whole", max_steps=13, **options).train()
    for ended in (6, 12):
        assert lines(tmp_path / f"{ended}") == lines(tmp_path / "whole")
    assert lines(tmp_path / "8") != lines(tmp_path / "whole")


def test_what_is_too_old_is_dropped_and_counted(tmp_path: Path) -> None:
    class Old(Ahead):
        """Whoever samples says of one row that older weights have written its first token."""

        def spoil(self, number: int, row: dict[str, np.ndarray], sample: int) -> None:
            if number == 1 and row["group"][0] == 0 and sample == 0:
                start = int(row["versions"][0])
                row["versions"] = np.array([start, 0, start + 1, 2])

    trainer = make_trainer(tmp_path, kind=Old, max_epochs=1, source_options=keeping())
    trainer.train()
    rollout = Rollout(tmp_path / "rollouts" / "00000001")
    assert staleness(rollout, 4).tolist() == [4] + [2] * 7 and rollout.used.tolist() == [1, 2, 3, 4, 5, 6, 7]
    dropped = rollout.ledger["dropped"]
    assert dropped == {TOO_OLD: int(rollout.store["trained"][0].sum())}
    assert rollout.ledger["sampled"] == rollout.ledger["trained"] + dropped[TOO_OLD]


def ask(run: Any) -> None:
    """Ask a run to stop when what it makes is made: nothing of it is lost."""
    run.trainer.ahead.wait()
    if run.progress.step % 5 in (1, 3, 4):
        run.signals.received = signal.SIGTERM


class Dies(Ahead):
    """Is asked to stop when the thread has begun its n-th completion of a rollout."""

    asked = (1, 3)  # rollout, completion

    def passes(self, phase: str) -> None:
        if phase == "generating" and threading.current_thread() is not threading.main_thread():
            self.asked = (self.asked[0], self.asked[1] - 1)
            if self.asked[1] == 0:
                self.run.signals.received = signal.SIGTERM


def test_a_signal_ends_both_and_what_was_made_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The missing parts are made with the weights of the checkpoint, which is said, and which the rows say."""
    asked = make_trainer(tmp_path, kind=Dies, source_options=keeping())
    with pytest.raises(TrainingInterrupted) as stop:
        asked.train()
    step = asked.run.progress.step
    assert stop.value.code == 75 and step in (3, 4)
    assert asked.maker.made[4:] == [(1, 0, 0)]
    again = make_trainer(tmp_path, kind=Ahead, source_options=keeping())
    again.train()
    said = capsys.readouterr().out
    assert (
        f"rollout 1 was being made with the weights of step 2 when the run was stopped; 3 of its 4 parts are made with those "
        f"of step {step}" in said
    )
    assert again.maker.made[:3] == [(1, 1, 1), (1, 2, 2), (1, 3, 3)] and again.run.progress.step == 24
    assert versions(tmp_path, 1) == {2, step}


def test_a_run_that_was_stopped_where_everything_was_made_ends_in_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path / "whole", kind=Ahead).train()

    for _ in range(15):
        trainer = make_trainer(tmp_path / "cut", kind=Ahead, hooks=[Hook("ask", ask, every_steps=1)])
        try:
            trainer.train()
            break
        except TrainingInterrupted:
            pass
    assert trainer.run.progress.step == 24 and lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert "bit-identical" not in capsys.readouterr().out


def test_a_rollout_that_was_made_ahead_after_the_last_checkpoint_is_found_again(tmp_path: Path) -> None:
    """From a checkpoint before it was begun, and from one after that; though its reward would be another one."""
    noisy = type("Noisy", (Ahead,), {"noisy_reward": True})
    options: dict[str, Any] = {"kind": noisy, "source_options": keeping(), "checkpoints_to_keep": 20}
    first = make_trainer(tmp_path, max_steps=11, save_interval_steps=1, **options)
    first.train()
    for step in (7, 4, 3, 1):  # later ones are moved away
        trainer = make_trainer(tmp_path, max_steps=11, resume=str(tmp_path / f"checkpoint-{step:08d}"), **options)
        trainer.train()
        assert trainer.maker.begun == [] and torch.equal(weights(trainer), weights(first))


def test_the_rollout_of_another_run_is_not_taken_for_one_that_was_begun(tmp_path: Path) -> None:
    for seed in (0, 1):
        asked = make_trainer(tmp_path / f"{seed}", kind=Dies, seed=seed, source_options=keeping())
        with pytest.raises(TrainingInterrupted):
            asked.train()
    for folder in sorted((tmp_path / "0" / "rollouts").glob("*1.building")):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "1" / "rollouts" / folder.name, folder)
    trainer = make_trainer(tmp_path / "0", kind=Ahead, max_steps=6, source_options=keeping())
    trainer.train()
    assert trainer.maker.made == [(1, number, number) for number in range(4)]


def test_weights_are_brought_in_flight_to_what_can_take_them(tmp_path: Path) -> None:
    """After every update, as long as anything is made."""

    class InFlight(Ahead):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.brought = threading.Event()
            super().__init__(*args, **kwargs)
            self.maker.updates_in_flight = True

        def passes(self, phase: str) -> None:
            if phase == "syncing":
                begun = self.maker.begun
                again = begun.count(begun[-1]) > 1
                (self.brought.set if again else self.brought.clear)()
            if phase == "generating" and threading.current_thread() is not threading.main_thread():
                assert self.brought.wait(PATIENCE_S), "no newer weights came"

    trainer = make_trainer(tmp_path, kind=InFlight, max_epochs=1)
    trainer.train()
    assert trainer.maker.begun == [0, 1, 1, 2, 2]


def test_an_error_in_the_thread_ends_the_run(tmp_path: Path) -> None:
    class Fails(Ahead):
        def passes(self, phase: str) -> None:
            if phase == "rewarding" and threading.current_thread() is not threading.main_thread():
                raise ValueError("the judge is out of its mind")

    trainer = make_trainer(tmp_path, kind=Fails)
    with pytest.raises(ValueError, match="the judge is out of its mind"):
        trainer.train()
    assert trainer.run.progress.step == 4  # what was there is learned from
    again = make_trainer(tmp_path, kind=Ahead)
    again.train()
    assert again.run.progress.step == 24


def test_an_error_in_the_training_ends_the_thread(tmp_path: Path) -> None:
    class Breaks(Ahead):
        def passes(self, phase: str) -> None:
            if phase == "updating" and self.run.progress.step == 3:
                raise RuntimeError("the training breaks")

    with pytest.raises(RuntimeError, match="the training breaks"):
        make_trainer(tmp_path, kind=Breaks).train()
    assert "rollout-ahead" not in {thread.name for thread in threading.enumerate()}


def test_an_evaluation_waits_for_what_is_made(tmp_path: Path) -> None:
    """It brings other weights: none of a rollout's tokens are theirs, and its rollouts are those of its own weights."""
    release = threading.Event()

    class Slow(Ahead):
        def passes(self, phase: str) -> None:
            if phase == "generating" and threading.current_thread() is not threading.main_thread():
                release.wait(0.05)  # still busy when the evaluation begins

    options: dict[str, Any] = {"val_loader": prompts(4), "eval_interval": 1, "max_epochs": 1}
    slow = make_trainer(tmp_path / "slow", kind=Slow, source_options=keeping(), **options)
    slow.train()
    assert [versions(tmp_path / "slow", number) for number in range(3)] == [{0}, {2}, {6}]
    quick = make_trainer(tmp_path / "quick", kind=Ahead, source_options=keeping(), **options)
    quick.train()
    assert lines(tmp_path / "slow") == lines(tmp_path / "quick")


def test_prompts_taken_early_leave_the_position_of_a_loader_as_it_is(tmp_path: Path) -> None:
    """A checkpoint in between says what was learned from: another loader is noticed, and the same one goes on."""
    ids = [batch["prompts"][0].clamp(min=1) for batch in prompts(12)]

    def loader(rows: list[torch.Tensor]) -> Any:
        return torch.utils.data.DataLoader(
            rows, batch_size=1, shuffle=True, collate_fn=lambda batch: {"prompts": torch.stack(batch)}
        )

    whole = make_trainer(tmp_path / "whole", loader(ids), kind=Ahead, max_steps=9)
    whole.train()
    with pytest.raises(TrainingInterrupted):
        make_trainer(
            tmp_path / "cut", loader(ids), kind=Ahead, max_steps=9, hooks=[Hook("ask", ask, every_steps=4)]
        ).train()
    again = make_trainer(tmp_path / "cut", loader(ids), kind=Ahead, max_steps=9)
    again.train()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_the_driver_of_transformers_takes_the_same_updates(tmp_path: Path) -> None:
    by_loop, by_other = (
        make_trainer(tmp_path / "loop", kind=Ahead),
        make_trainer(tmp_path / "hf", kind=Ahead, engine="hf"),
    )
    by_loop.train()
    by_other.train()
    assert torch.equal(weights(by_loop), weights(by_other))
