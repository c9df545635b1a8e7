"""One table of ways to run the same optimization. Every cell must give the same losses and gradient norms.

`torchrun ... table.py OUT [ENGINE [DEVICE]]` runs the cells of several processes and writes their curves.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRAINERS: dict[str, dict[str, Any]] = {  # name -> its options
    "pretrain": {},
    "sft": {},
    "dpo": {"loss_type": {"sigmoid": 1.0, "sft": 0.5}},  # pairs and tokens: two denominators
    "kto": {},
    "reward": {"center_coef": 0.01},
}
ENGINES: dict[str, dict[str, Any]] = {  # name -> the options that ask for it
    "torch": {},
    "hf": {"engine": "hf"},
    "fsdp": {"engine": "fsdp"},
    **{
        f"zero{stage}": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        for stage in range(4)
    },
}
STEPS = 3
ROWS_PER_STEP = 8


@dataclass(frozen=True)
class Cell:
    """A way to run: an engine, `batch_size` x `accumulation` x `ranks` rows per step, their layout, and a token budget."""

    trainer: str
    batch_size: int
    accumulation: int
    ranks: int = 1
    flat: bool = False
    micro_batch_tokens: int | None = None
    engine: str = "torch"

    def __str__(self) -> str:
        layout = "flat" if self.flat else "padded"
        budget = f"-{self.micro_batch_tokens}tokens" if self.micro_batch_tokens else ""
        return f"{self.trainer}-{self.engine}-{self.batch_size}x{self.accumulation}x{self.ranks}-{layout}{budget}"


def cells(trainer: str, ranks: int) -> list[Cell]:
    """All ways to cut steps of eight rows among `ranks`."""
    per_rank = ROWS_PER_STEP // ranks
    splits = [(n, per_rank // n) for n in (1, 2, 4, 8) if n <= per_rank]
    layouts = (False,) if trainer == "reward" else (False, True)
    table = [Cell(trainer, size, count, ranks, flat) for size, count in splits for flat in layouts]
    return table + [Cell(trainer, 2, per_rank // 2, ranks, flat, 40) for flat in layouts]


def engine_cells(trainer: str, engine: str, ranks: int) -> list[Cell]:
    """A few ways to cut steps, on an engine: none, all, and a token budget that gives ranks different numbers of batches."""
    per_rank, flat = ROWS_PER_STEP // ranks, trainer != "reward"
    return [
        Cell(trainer, per_rank, 1, ranks, False, None, engine),
        Cell(trainer, 1, per_rank, ranks, flat, None, engine),
        Cell(trainer, 2, per_rank // 2, ranks, flat, 40, engine),
    ]


def weighed_cell(engine: str, ranks: int) -> Cell:
    """'sft' whose loss weights are hundredths, cut as unevenly as can be: the curve must be that of 'sft'.

    It does not clip, and says so by None.
    """
    per_rank = ROWS_PER_STEP // ranks
    return Cell("weighed", 2, per_rank // 2, ranks, True, 40, engine)


def trainer_class_of(cell: Cell) -> Any:
    """The class that trains a cell."""
    from llm_trainer import SFTTrainer, get_trainer_class

    class Weighed(SFTTrainer):
        def _loss_weight(self, batch: Any) -> float:
            return 0.01 * super()._loss_weight(batch)

    return Weighed if cell.trainer == "weighed" else get_trainer_class(cell.trainer)


class Rows:
    """Ragged rows of random ids.

    All but those of 'pretrain' have prompts. In the second step every other row has an answer of one token, and in 'sft'
    nothing to train on: one of two ranks has no term at all. The tokens of 'sft' have weights, so small that those of
    a whole step sum to less than 1.
    """

    def __init__(self, trainer: str, vocab_size: int, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        self.lengths = noise.integers(4, 30, STEPS * ROWS_PER_STEP)
        self.file_sizes = [len(self.lengths)]
        self._ids = [noise.integers(3, vocab_size, n) for n in self.lengths]
        whole = trainer == "pretrain"
        prompts = np.zeros(len(self.lengths), dtype=int) if whole else noise.integers(1, 4, len(self.lengths))
        if not whole:  # every other row of the second step, which are those of the first of two ranks
            every_other = slice(ROWS_PER_STEP, 2 * ROWS_PER_STEP, 2)
            prompts[every_other] = self.lengths[every_other] - (trainer != "sft")
        self._weights = [noise.random(n).astype(np.float32) / 500 for n in self.lengths] if trainer == "sft" else None
        self._trained = [np.arange(n) >= prompt for n, prompt in zip(self.lengths, prompts, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = int(self.lengths[index])
        row = {"input_ids": self._ids[index], "trained": self._trained[index], "document_lengths": [length]}
        if self._weights is not None:
            row["loss_weights"] = self._weights[index]
        return row


class Answers:
    """Pairs of such rows, or rows that are judged and have a mismatched one beside them."""

    def __init__(self, trainer: str, vocab_size: int) -> None:
        self.trainer = trainer
        self.rows, self.others = Rows(trainer, vocab_size), Rows(trainer, vocab_size, seed=1)
        self.lengths = self.rows.lengths if trainer == "kto" else self.rows.lengths + self.others.lengths
        self.file_sizes = self.rows.file_sizes

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, other = self.rows[index], self.others[index]
        if self.trainer == "kto":
            return {"row": row, "mismatched": other, "desirable": index % 3 == 0}
        return {"chosen": row, "rejected": other, "margin": index / 10}


def data_of(cell: Cell) -> tuple[Any, Any]:
    """The rows of a trainer, and how they become batches."""
    from llm_trainer.data.collate import collate_flat, collate_padded
    from llm_trainer.data.kinds.pairs import collate_pairs
    from llm_trainer.data.kinds.unpaired import collate_unpaired

    collate: Any = collate_flat if cell.flat else collate_padded
    if cell.trainer in ("pretrain", "sft", "weighed"):
        return Rows(cell.trainer.replace("weighed", "sft"), 512), collate
    return Answers(cell.trainer, 512), partial(
        collate_unpaired if cell.trainer == "kto" else collate_pairs, lay=collate
    )


def tiny_model(attention: str = "sdpa", seed: int = 0) -> Any:
    """A two-layer Qwen3-shaped model with 512 ids, the same at every call."""
    from llm_trainer.config.schema import ModelConfig
    from llm_trainer.models.build import build_model

    torch.manual_seed(seed)
    shape = ModelConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return build_model(shape, attention=attention)


def run(cell: Cell, device: str = "cpu", **options: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; `options` are further keywords of the trainer."""
    from llm_trainer import configure_optimizer
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.engine import dist
    from llm_trainer.models.rewarding import reward_model
    from llm_trainer.train.hooks import Hook

    of_trainer = TRAINERS.get(cell.trainer, {"max_grad_norm": None})
    model, options = tiny_model(), of_trainer | ENGINES[cell.engine] | {"use_amp": False} | options
    if cell.trainer in ("dpo", "kto"):
        options["ref_model"] = tiny_model(seed=1)
    elif cell.trainer == "reward":
        model = reward_model(model)
    dataset, collate = data_of(cell)
    stream = SampleStream(
        dataset,
        collate,
        rows_per_step=ROWS_PER_STEP,
        batch_size=cell.batch_size,
        rank=dist.rank(),
        world_size=cell.ranks,
        micro_batch_tokens=cell.micro_batch_tokens,
        flat=cell.flat,
        shuffle=False,
    )
    curve: list[tuple[float, float]] = []

    def watch(run: Any) -> None:
        curve.append((run.values["loss"], run.values["grad_norm"]))

    with tempfile.TemporaryDirectory() as own_folder:
        folder = dist.broadcast_object(own_folder)  # into which all ranks write their shards
        trainer_class_of(cell)(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-3 if cell.trainer == "reward" else 1e-2),
            train_loader=stream,
            device=device,
            max_epochs=1,
            grad_accum_steps=cell.accumulation,
            log_interval=1,
            save_dir=folder,
            save_interval=0,
            hooks=[Hook("watch", watch, every_steps=1)],
            **options,
        ).train()
    assert len(curve) == STEPS
    return curve


def differences(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest difference of losses and of gradient norms (relative)."""
    losses = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
    norms = max(abs(x[1] - y[1]) / y[1] for x, y in zip(a, b, strict=True))
    return losses, norms


def main(out: str, engine: str = "torch", device: str = "cpu") -> None:
    """Run every cell of an engine in one process group; the main process writes the curves."""
    from llm_trainer.config.env import environment
    from llm_trainer.engine import dist
    from llm_trainer.engine.device import detect_device

    torch.set_num_threads(1)
    dist.start(detect_device(device), 60)
    ranks = environment().world_size
    wanted = [cells(name, ranks) if engine == "torch" else engine_cells(name, engine, ranks) for name in TRAINERS]
    curves = {str(cell): run(cell, device) for group in wanted for cell in group}
    if dist.is_main():
        Path(out).write_text(json.dumps(curves))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
