"""Rollouts as steps of a run: positions, updates, resume, evaluation, signals."""

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.rollout_prompts import in_groups, rows_of
from llm_trainer.data.rollout_store import RolloutError
from llm_trainer.data.rollouts import FAILED, FINISHES, NOTHING_WRITTEN, Rollout, Used, collate_rollout
from llm_trainer.disk import DiskError
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from writers import BigramTrainer, lines, make_trainer, prompts, weights


def test_every_rollout_is_updated_on_as_often_as_was_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.run.source.num_steps() is None  # a list of batches does not say how many prompts they hold
    trainer.train()
    progress = trainer.run.progress
    assert (progress.step, progress.epoch, progress.rollout, progress.updates) == (24, 2, 6, 0)
    assert trainer.maker.begun == [0, 1, 2, 3, 4, 5]
    rewards = [line["reward"] for line in lines(tmp_path) if "reward" in line]
    assert len(rewards) == 6  # a rollout's metrics are those of the line of its first update


def test_a_rollout_gets_its_name_when_all_have_opened_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process would else rename the folder under the hands of one that is slower."""
    trainer = make_trainer(tmp_path, max_steps=1)
    machine, building, seen = type(trainer.machine), tmp_path / "rollouts" / "00000000.building", list[bool]()
    gather = machine.gather

    def noted(self: Any, value: Any) -> list[Any]:
        seen.append(building.exists())
        return gather(self, value)

    monkeypatch.setattr(machine, "gather", noted)
    monkeypatch.setattr(trainer, "passes", lambda phase: seen.clear() if phase == "scoring" else None)
    trainer.train()
    assert seen[:2] == [True, False]  # all meet once more before it, and once behind it


def test_an_epoch_ends_once_and_not_in_its_first_rollout(tmp_path: Path) -> None:
    steps: list[int] = []
    hook = Hook("note", lambda run: steps.append(run.progress.step), every_epochs=1)
    make_trainer(tmp_path, hooks=[hook], max_epochs=3).train()
    assert steps == [12, 24, 36]


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
    source.shares_prompts, source.micro_batch_tokens = (lambda: True), int(rollout.lengths.sum() - own[::2].sum())
    assert len(source._stream(2, rollout, None)._micro_batches(np.arange(8))) == 1
    source.shares_prompts = None
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


class Asked(BigramTrainer):
    """Asked to stop in the middle of a rollout, in its second part."""

    asked_at = 3

    def passes(self, phase: str) -> None:
        if phase == "generating":
            self.asked_at -= 1
            if self.asked_at == 0:
                self.run.signals.received = signal.SIGTERM


def test_weights_are_hashed_for_rollouts_that_may_be_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an evaluation never are."""
    trainer = make_trainer(tmp_path, max_epochs=1, val_loader=prompts(4), eval_interval=1)
    machine, hashed = type(trainer.machine), list[int]()
    plain = machine.weights_hash

    def noted(self: Any) -> str:
        hashed.append(self.step)
        return plain(self)

    monkeypatch.setattr(machine, "weights_hash", noted)
    trainer.train()
    assert hashed == [0, 4, 8] and "eval_reward" in trainer.run.values
    evaluated = Rollout(tmp_path / "rollouts" / "evaluation" / "00000000")
    assert not evaluated.is_of_training and "settings" in evaluated.store.meta["made_of"]


def test_a_signal_while_a_rollout_is_made_stops_at_once_and_keeps_what_was_finished(tmp_path: Path) -> None:
    """Neither a step nor an epoch is counted; the next life makes the parts that are missing."""
    parts = {"prompts_per_part": 1}
    whole = make_trainer(tmp_path / "whole", max_steps=3, source_options=parts)
    whole.train()
    asked = make_trainer(tmp_path / "cut", kind=Asked, max_steps=3, source_options=parts)
    with pytest.raises(TrainingInterrupted) as stop:
        asked.train()
    progress = asked.run.progress
    assert (stop.value.code, progress.step, progress.epoch, asked.maker.made) == (75, 0, 0, [(0, 0, 0)])
    trainer = make_trainer(tmp_path / "cut", max_steps=3, source_options=parts)
    trainer.train()
    assert trainer.maker.made[:3] == [(0, 1, 1), (0, 2, 2), (0, 3, 3)]
    assert torch.equal(weights(trainer), weights(whole)) and lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_signal_in_an_evaluation_that_samples_stops_at_once(tmp_path: Path) -> None:
    kind = type("AskedLater", (Asked,), {"asked_at": 10})  # 8 completions are those of the first rollout
    trainer = make_trainer(tmp_path, kind=kind, val_loader=prompts(4), eval_interval=1, source_options={})
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert trainer.run.progress.step == 1 and "evaluate" not in trainer.run.progress.hooks_done


def test_rollouts_that_no_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    """The best model's, in whose middle it was saved, is kept; and all of them if that is wanted."""
    options: dict[str, Any] = {"save_interval_steps": 3, "checkpoints_to_keep": 1, "save_in_background": False}
    make_trainer(tmp_path / "few", **options).train()
    left = [path.name for path in sorted((tmp_path / "few" / "rollouts").iterdir())]
    assert left == ["00000004", "00000005"]  # the last one was begun at step 20, after the checkpoint of step 18
    source = {"passes": 2, "rows_per_update": 4, "keep_rollouts": True}
    make_trainer(tmp_path / "all", source_options=source, **options).train()
    assert len(list((tmp_path / "all" / "rollouts").iterdir())) == 6


def test_a_rollout_of_other_settings_is_set_aside_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path, max_steps=1).train()
    shutil.rmtree(tmp_path / "checkpoint-00000001")
    hot = type("Hot", (BigramTrainer,), {"temperature": 2.0})
    trainer = make_trainer(tmp_path, kind=hot, max_steps=1)
    trainer.train()
    said = capsys.readouterr().out
    aside = tmp_path / "rollouts" / "set-aside-1" / "00000000"
    assert said.count("was made with other settings (temperature); it was moved to") == 1
    assert Rollout(aside).ledger["sampled"]
    assert trainer.maker.begun == [0]


def break_file(folder: Path) -> None:
    """Change a byte of a column."""
    file = folder / "rewards.values.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_rollout_is_made_anew_between_two_and_an_error_in_its_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path, max_steps=5).train()
    break_file(tmp_path / "rollouts" / "00000001")
    with pytest.raises(RolloutError, match=r"00000001: damaged, rewards.values.npy has .* bytes that are not those"):
        make_trainer(tmp_path, max_steps=6).train()
    shutil.rmtree(tmp_path / "rollouts" / "00000001")
    with pytest.raises(
        RolloutError, match=r"00000001: not there; expected the rollout on which 1 updates had been done"
    ):
        make_trainer(tmp_path, max_steps=6).train()
    make_trainer(tmp_path / "new", max_steps=1).train()
    break_file(tmp_path / "new" / "rollouts" / "00000000")
    shutil.rmtree(tmp_path / "new" / "checkpoint-00000001")
    trainer = make_trainer(tmp_path / "new", max_steps=1)
    trainer.train()
    assert trainer.maker.begun == [0] and "damaged, rewards.values.npy" in capsys.readouterr().out


def test_the_rollout_of_another_run_is_not_taken_for_the_one_under_way(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_trainer(tmp_path / f"{seed}", max_steps=2, seed=seed).train()
    shutil.rmtree(tmp_path / "0" / "rollouts")
    shutil.copytree(tmp_path / "1" / "rollouts", tmp_path / "0" / "rollouts")
    with pytest.raises(RolloutError, match=r"a rollout of another run or another moment \(seed differ\)"):
        make_trainer(tmp_path / "0", max_steps=3).train()


def test_a_run_that_begins_anew_does_not_take_over_the_rollouts_of_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reward function may be another one by the same name."""
    make_trainer(tmp_path, max_steps=5).train()
    trainer = make_trainer(tmp_path, max_steps=1, resume="never")
    trainer.train()
    assert trainer.maker.begun == [0] and len(list((tmp_path / "rollouts" / "set-aside-1").iterdir())) == 2
    assert "the rollouts of an earlier one were moved to" in capsys.readouterr().out


def test_settings_may_change_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    """The next one is drawn with them."""
    make_trainer(tmp_path, max_steps=2).train()
    hot = type("Hot", (BigramTrainer,), {"temperature": 2.0})
    trainer = make_trainer(tmp_path, kind=hot, max_steps=5)
    trainer.train()
    assert trainer.maker.begun == [1]


def test_stored_rollouts_of_another_run_are_learned_from(tmp_path: Path) -> None:
    how = {"passes": 2, "rows_per_update": 4}
    noisy = type("Noisy", (BigramTrainer,), {"noisy_reward": True})
    first = make_trainer(tmp_path / "first", kind=noisy, source_options={**how, "keep_rollouts": True})
    first.train()
    folder = tmp_path / "first" / "rollouts"
    second = make_trainer(tmp_path / "second", kind=noisy, source_options={**how, "rollouts": str(folder)})
    second.train()
    assert second.maker.begun == [] and torch.equal(weights(second), weights(first))
    assert lines(tmp_path / "second") == lines(tmp_path / "first")
    wrong = make_trainer(tmp_path / "third", source_options={"rollouts": str(tmp_path)})
    with pytest.raises(RolloutError, match=r"found no .*00000000; expected the folder save_dir/rollouts of a run"):
        wrong.train()


def test_a_rollout_under_way_is_learned_to_its_end_as_it_was_begun(tmp_path: Path) -> None:
    """Though the configuration now says otherwise, and though the run is interrupted again."""
    make_trainer(tmp_path, max_steps=2).train()
    once = {"passes": 1, "rows_per_update": 8}
    make_trainer(tmp_path, max_steps=3, source_options=once).train()
    trainer = make_trainer(tmp_path, max_steps=6, source_options=once)
    trainer.train()
    assert trainer.run.progress.rollout == 3  # 4 updates of the first, 1 of the second and of the third


def test_a_disk_that_is_full_while_a_rollout_is_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer(tmp_path, max_steps=1, source_options={"prompts_per_part": 1})
    save, calls = np.savez, []

    def full(file: Any, **arrays: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DiskError, match=r"part-000002.npz' could not be saved: No space left.*Free some space"):
        made.train()
    again = make_trainer(tmp_path, max_steps=1, source_options={"prompts_per_part": 1})
    again.train()
    assert again.maker.made == [(0, 2, 2), (0, 3, 3)]  # the others are there


def test_steps_of_a_loader_and_of_a_stream_are_updates(tmp_path: Path) -> None:
    ids = [batch["prompts"][0] for batch in prompts(10)]
    loader = torch.utils.data.DataLoader(
        ids, batch_size=2, collate_fn=lambda rows: {"prompts": torch.stack(rows).clamp(min=1)}
    )
    trainer = make_trainer(tmp_path, loader, max_epochs=2)
    assert trainer.run.horizon.total() == 2 * 2 * (2 + 1)  # 4 prompts and then 1, 2 completions each, in fours
    trainer.train()
    assert trainer.run.progress.step == 12


def test_completions_that_are_given_form_groups_by_their_prompts() -> None:
    batch = {
        "prompts": torch.tensor([[0, 5], [3, 4], [0, 5]]),
        "prompt_attention_mask": torch.tensor([[0, 1], [1, 1], [0, 1]]),
    }
    batch |= {"responses": torch.tensor([[7, 8], [9, 0], [7, 7]]), "rewards": torch.tensor([1.0, 0.5, 0.0])}
    one, two = in_groups(rows_of(batch))
    assert [given["responses"] for given in one.given] == [[7, 8], [7, 7]] and one.ids.tolist() == [5]
    assert [given["rewards"] for given in two.given] == [0.5] and two.number == 1 and not two.columns


def test_the_driver_of_transformers_takes_the_same_updates(tmp_path: Path) -> None:
    by_loop, by_other = make_trainer(tmp_path / "loop"), make_trainer(tmp_path / "hf", engine="hf")
    by_loop.train()
    by_other.train()
    assert torch.equal(weights(by_loop), weights(by_other)) and by_other.run.progress.epoch == 2
    asked = make_trainer(tmp_path / "asked", kind=Asked, engine="hf")
    with pytest.raises(TrainingInterrupted):
        asked.train()
    assert asked.run.progress.epoch == 0 and (tmp_path / "asked" / "checkpoint-00000000").is_dir()


@pytest.mark.parametrize("flat", [False, True])
def test_a_micro_batch_of_a_rollout(flat: bool, tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1).train()
    rollout = Rollout(tmp_path / "rollouts" / "00000000")
    rows = [rollout[1], rollout[4]]
    batch = collate_rollout(rows, collate_flat if flat else collate_padded)
    assert batch["row_index"].tolist() == [1, 4] and batch["group"].tolist() == [0, 2]
    assert batch["rewards"].shape == (2, 1) and batch["rewards"].dtype == torch.float64
    for name in ("labels", "advantages", "sampled_logprobs"):
        assert batch[name].shape == batch["input_ids"].shape
    trained = batch["labels"] != -100
    assert (batch["labels"] == batch["input_ids"])[trained].all() and (batch["sampled_logprobs"][trained] < 0).all()
    assert int(trained.sum()) == sum(int(row["trained"].sum()) for row in rows)


def test_rows_without_a_token_of_the_policy_are_dropped_and_counted(tmp_path: Path) -> None:
    """And those that have failed: no update sees them, and fewer updates are what is left."""

    class Failing(BigramTrainer):
        """Every second completion of the first rollout failed, or is empty."""

        def spoil(self, number: int, row: dict[str, np.ndarray], sample: int) -> None:
            if number == 0 and sample:
                row["finish"] = np.array([FINISHES.index("error")])
                if row["group"][0] == 0:
                    row["trained"] = np.zeros_like(row["trained"])
                    row["finish"] = np.array([0])

    trainer = make_trainer(tmp_path, kind=Failing, max_epochs=1)
    trainer.train()
    rollout = Rollout(tmp_path / "rollouts" / "00000000")
    dropped = rollout.ledger["dropped"]
    assert rollout.used.tolist() == [0, 2, 4, 6] and set(dropped) == {FAILED, NOTHING_WRITTEN}
    assert rollout.ledger["trained"] + sum(dropped.values()) == rollout.ledger["sampled"]
    assert trainer.run.progress.step == 2 * (1 + 2 + 2)
