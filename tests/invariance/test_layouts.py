"""What nobody asked for changes nothing: rows that the machine lays flat, cuts or sorts give the curve of padded ones."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parent))
import curves
from table import ROWS_PER_STEP, SEEING, STEPS, TRAINERS, Cell, Curve, data_of, run, tiny_model

from llm_trainer import DPOTrainer
from llm_trainer.losses.preference import BATCH_COUPLED
from llm_trainer.train.hooks import Hook
from llm_trainer.train_configs import DPOConfig

TOLERANCE = 3e-6  # relative, after three updates in float32
PARTS = {"dpo": ("chosen", "rejected"), "reward": ("chosen", "rejected"), "kto": ("completion",)}


def batches_of(trainer: str, size: int) -> list[dict[str, Tensor]]:
    """The rows of the table as a user's loader gives them: ready padded micro-batches of `size` rows."""
    rows, collate = data_of(Cell(trainer, size, 1))
    starts = range(0, STEPS * ROWS_PER_STEP, size)
    return [dict(collate([rows[i] for i in range(start, start + size)])) for start in starts]


def in_parts(batch: dict[str, Tensor], answers: tuple[str, ...]) -> dict[str, Tensor]:
    """A joined batch with prompts and answers apart; prompts are padded on the left."""
    ids, mask = batch["input_ids"].chunk(len(answers)), batch["attention_mask"].chunk(len(answers))
    labels = batch["labels"].chunk(len(answers))
    prompts = [int((row != -100).nonzero()[0]) for row in labels[0]]
    parts = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    left = max(prompts)
    prompt = torch.zeros(len(prompts), left, dtype=torch.long)
    prompt_mask = torch.zeros_like(prompt)
    for row, length in enumerate(prompts):
        prompt[row, left - length :], prompt_mask[row, left - length :] = ids[0][row, :length], 1
    parts |= {"prompt_input_ids": prompt, "prompt_attention_mask": prompt_mask}
    for answer, one_ids, one_mask in zip(answers, ids, mask, strict=True):
        parts[f"{answer}_input_ids"] = torch.zeros_like(one_ids)
        parts[f"{answer}_attention_mask"] = torch.zeros_like(one_ids)
        for row, length in enumerate(prompts):
            kept = one_ids[row, length:]
            parts[f"{answer}_input_ids"][row, : len(kept)] = kept
            parts[f"{answer}_attention_mask"][row, : len(kept)] = one_mask[row, length:]
    return parts


def largest_difference(ours: Curve, theirs: Curve) -> float:
    """Of losses and gradient norms, relative."""
    found = [
        abs(a - b) / abs(b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return max(found)


def compared(cell: Cell, loader: list[Any], **options: Any) -> float:
    """How far a curve is from that of the same loader's padded micro-batches, as they come."""
    left_open = replace(cell, automatic=True)
    return largest_difference(run(left_open, loader=loader, **options), run(cell, loader=loader))


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINERS if trainer not in SEEING])
def test_ready_micro_batches_of_a_loader(trainer: str, budget: int | None) -> None:
    cell = Cell(trainer, 4, 2)
    assert compared(cell, batches_of(trainer, 4), micro_batch_tokens=budget) < TOLERANCE


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("trainer", ["dpo", "reward", "kto"])
def test_answers_apart_from_their_prompts(trainer: str, budget: int | None) -> None:
    loader = batches_of(trainer, 4)
    if trainer != "kto":  # of random rows both sides have prompts of their own, and parts share one
        loader = [with_one_prompt(batch) for batch in loader]
    parts = [in_parts(batch, PARTS[trainer]) for batch in loader]
    joined = run(Cell(trainer, 4, 2), loader=loader)
    apart = run(Cell(trainer, 4, 2, automatic=True), loader=parts, micro_batch_tokens=budget)
    assert largest_difference(apart, joined) < TOLERANCE


def with_one_prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pairs whose rejected rows begin with the prompts of the chosen ones."""
    half = len(batch["input_ids"]) // 2
    batch = {name: value.clone() for name, value in batch.items()}
    for row in range(half):
        prompt = int((batch["labels"][row] != -100).nonzero()[0])
        other = row + half
        end = int(batch["attention_mask"][other].sum())
        prompt = min(prompt, end - 1)
        batch["labels"][row, prompt:] = batch["input_ids"][row, prompt:].where(
            batch["attention_mask"][row, prompt:] == 1, -100
        )
        batch["input_ids"][other, :prompt] = batch["input_ids"][row, :prompt]
        batch["labels"][other] = batch["input_ids"][other].where(batch["attention_mask"][other] == 1, -100)
        batch["labels"][other, :prompt] = -100
    return batch


@pytest.mark.parametrize("loss_type", sorted(BATCH_COUPLED))
def test_a_loss_that_sorts_the_pairs_of_a_micro_batch_keeps_them_together(loss_type: str) -> None:
    """However they are laid out; others are put together and cut by a budget."""
    made: list[Any] = []
    cell, loader = Cell("dpo", 2, 4), batches_of("dpo", 2)
    for model in (None, SeesAll()):
        plain = run(cell, loader=loader, loss_type=loss_type, model=copy.deepcopy(model))
        left_open = replace(cell, automatic=True)
        chosen = run(left_open, loader=loader, loss_type=loss_type, model=model, ready=made.append)
        assert largest_difference(chosen, plain) < TOLERANCE
    assert made[0].machine.layout.flat and made[0].run.budget.tokens is None and not made[1].machine.layout.by_length
    assert DPOTrainer._data_from_config(DPOConfig(loss_type=loss_type)).couples_rows
    assert not DPOTrainer._data_from_config(DPOConfig()).couples_rows


class SeesAll(nn.Module):
    """A causal model that takes positions and does not look at them: what lies before in a row is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.shift = nn.Parameter(torch.zeros(512))  # of the logits, which so are not what the head gives

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Any:
        return 1.001 * self.model(input_ids, attention_mask=attention_mask).logits + self.shift


@pytest.mark.parametrize("trainer", ["pretrain", "sft", "dpo", "kto"])
def test_rows_of_a_model_that_does_not_keep_them_apart_come_together_by_length(trainer: str) -> None:
    cell, loader = Cell(trainer, 2, 4), batches_of(trainer, 2)
    made: list[Any] = []
    plain = run(cell, loader=loader, model=SeesAll())
    by_length = run(replace(cell, automatic=True), loader=loader, model=SeesAll(), ready=made.append)
    assert largest_difference(by_length, plain) < TOLERANCE
    choice = made[0].machine.layout.choice
    assert choice.value == "padded, rows of similar length together"
    assert choice.why.startswith("SeesAll: a document laid behind another is scored otherwise than alone, by 0.")


def test_flat_rows_of_such_a_model_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="packing='flat': SeesAll: a document laid behind another .* by 0.*; expected"):
        run(Cell("sft", 4, 2), loader=batches_of("sft", 4), model=SeesAll(), packing="flat")
    with pytest.raises(ValueError, match="rows laid flat: SeesAll: a document laid behind another"):
        run(Cell("sft", 4, 2, flat=True), model=SeesAll())


def test_a_reference_has_a_say_too() -> None:
    made: list[Any] = []
    cell, loader, reference = Cell("dpo", 4, 2), batches_of("dpo", 4), SeesAll()
    plain = run(cell, loader=loader, ref_model=reference)
    left_open = replace(cell, automatic=True)
    chosen = run(left_open, loader=loader, ref_model=reference, ready=made.append)
    assert largest_difference(chosen, plain) < TOLERANCE
    assert not made[0].machine.layout.flat and made[0].machine.layout.choice.why.startswith("SeesAll")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every kind of row, and a teacher."""
    folder = tmp_path_factory.mktemp("files")
    curves.write_data(folder)
    curves.make_teacher(folder)
    return folder


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize("name", ["sft-padded", "dpo-padded", "kto", "reward", "distill"])
def test_a_described_run(name: str, attention: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trainer.builder.model.resolve_attention", lambda wanted, device: attention)
    folder = files / attention
    for path in files.iterdir() if not folder.exists() else ():
        folder.mkdir(exist_ok=True)
        (folder / path.name).symlink_to(path)
    plain = curves.run(name, "torch", folder)["metrics"]
    chosen = curves.run(name, "torch", folder, packing="auto")["metrics"]
    for ours, theirs in zip(chosen, plain, strict=True):
        for number in ("loss", "grad_norm"):
            if number in theirs:
                assert ours[number] == pytest.approx(theirs[number], rel=1e-6 if ours["step"] == 1 else 1e-4)


def test_a_run_goes_on_in_another_layout_and_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Padded, then flat, then as it came, with a save between each."""
    from llm_trainer import SFTTrainer, configure_optimizer

    def steps(folder: Path, layouts: list[str]) -> list[float]:
        losses: dict[int, float] = {}
        for done, packing in enumerate(layouts):
            model = tiny_model()
            SFTTrainer(
                model=model,
                optimizer=configure_optimizer(model=model, lr=1e-2),
                train_loader=batches_of("sft", 4),
                max_epochs=1,
                grad_accum_steps=2,
                max_steps=done + 1,
                log_interval=1,
                use_amp=False,
                save_dir=str(folder),
                resume="auto",
                packing=packing,
                hooks=[Hook("note", lambda one: losses.update({one.progress.step: one.values["loss"]}), every_steps=1)],
            ).train()
        return list(losses.values())

    whole = steps(tmp_path / "padded", ["none"] * STEPS)
    mixed = steps(tmp_path / "mixed", ["none", "flat", "auto"])
    assert len(mixed) == STEPS and mixed == pytest.approx(whole, rel=1e-5)
