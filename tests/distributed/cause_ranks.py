"""Every engine, and what goes wrong between two ranks: `python cause_ranks.py FOLDER CELL ...` prints what became of each.

A cell is `engine/case`; without any, all are played. Started by test_causes.py.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "invariance")]
from ranks import fork_ranks, import_once
from table import ENGINES, Answers, tiny_model

from failing_memory import OF_HOST
from llm_trainer import BaseTrainer, KTOTrainer, configure_optimizer
from llm_trainer.engine import dist, watch
from llm_trainer.train.hooks import Hook

RANKS, TIMEOUT_S = 2, 3
ALONE = (
    "odd_rows",
    "no_terms",
    "unused",
    "unused_layer",
    "configured",
)  # what one process makes of them is what is expected


def options(folder: Path, engine: str) -> dict[str, Any]:
    how: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "save_interval": 0, "use_amp": False, "progress": False}
    return {"device": "cpu", "save_dir": str(folder), "ddp_timeout_s": TIMEOUT_S, **how, **ENGINES[engine]}


def curve(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


# KTO with odd rows: batches of prompts and completions, of which some hold one row and so no mismatched pair.


def kto_batch(rows: range) -> dict[str, torch.Tensor]:
    answers = Answers("kto", 512)
    ids = [torch.as_tensor(answers[i]["row"]["input_ids"][:4]) for i in rows]
    prompts, completions = torch.stack([i[:2] for i in ids]), torch.stack([i[2:] for i in ids])
    ones = torch.ones_like(prompts)
    return {
        "prompt_input_ids": prompts,
        "prompt_attention_mask": ones,
        "completion_input_ids": completions,
        "completion_attention_mask": ones,
        "desirable": torch.tensor([i % 3 == 0 for i in rows]),
    }


def odd_rows(folder: Path, engine: str) -> list[tuple[float, float]]:
    """In the second of three steps one rank has a single row, in the third the other one has."""
    model, pieces = tiny_model(), [range(0, 3), range(3, 6), range(6, 9), range(9, 10), range(10, 11), range(11, 14)]
    KTOTrainer(
        model=model,
        ref_model=tiny_model(seed=1),
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=[kto_batch(rows) for rows in pieces],
        grad_accum_steps=RANKS // dist.world_size(),
        **options(folder, engine),
    ).train()
    return curve(folder) if dist.is_main() else []


# The rest, with a user's own model and algorithm.


class Branches(nn.Module):
    """Layers of which a batch chooses one; a parameter that some batches leave out, and one that all do."""

    def __init__(self, skips_layers: bool) -> None:
        super().__init__()
        self.skips_layers = skips_layers
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.scale, self.never = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        if choice == 0 and not self.skips_layers:
            x = x * self.scale
        for number in (1, 2):
            if not self.skips_layers or choice != number:
                x = self.layers[number](x)
        return x


class Chosen(BaseTrainer):
    """Batches `(x [B, 2], choice)`; NaN in `x` stands for a row without a term."""

    def _loss_weight(self, batch: Any) -> float:
        return float(batch[0].isfinite().all(1).sum())

    def _count_tokens(self, batch: Any) -> int:
        return len(batch[0])

    def _prepare_batch(self, batch: Any) -> Any:
        return batch

    def _forward(self, batch: Any) -> torch.Tensor:
        return self.model(batch[0].nan_to_num(), batch[1])

    def _compute_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        counts = batch[0].isfinite().all(1)
        return (outputs - 1).square().mean(1)[counts].mean()


ROWS = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
NONE = torch.full((2, 2), float("nan"))


def train(
    folder: Path,
    engine: str,
    batches: list[Any],
    skips_layers: bool = False,
    lr: float = 0.05,
    kind: type[BaseTrainer] = Chosen,
    **more: Any,
) -> Any:
    torch.manual_seed(0)
    model = Branches(skips_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=2 * lr)
    accumulation = len(batches) // 3 // dist.world_size()
    given = {"grad_accum_steps": accumulation, **options(folder, engine), **more}
    kind(model, optimizer, batches, **given).train()
    return curve(folder) if dist.is_main() else []


def no_terms(folder: Path, engine: str) -> Any:
    """The second rank's micro-batch has no term, and then nobody's."""
    return train(folder, engine, [(ROWS, 0), (NONE, 0), (NONE, 0), (NONE, 0), (ROWS + 1, 0), (ROWS - 1, 0)])


def unused(folder: Path, engine: str) -> Any:
    """A parameter is used by the first rank alone, then by none, then by the second alone; another one never."""
    return train(folder, engine, [(ROWS, 0), (ROWS, 1), (ROWS, 1), (ROWS + 1, 1), (ROWS + 1, 1), (ROWS - 1, 0)])


def unused_layer(folder: Path, engine: str) -> Any:
    """Each rank leaves out another layer."""
    return train(folder, engine, [(ROWS, 1), (ROWS, 2)] * 3, skips_layers=True)


def configured(folder: Path, engine: str) -> Any:
    """Another rate and decay after a stop; moments and step counts go on."""
    batches = [(ROWS + number, 0) for number in range(8)]
    for steps, lr in ((2, 0.05), (4, 0.2)):
        found = train(folder, engine, batches, lr=lr, max_steps=steps, resume="auto")
    return found


class Normalised(nn.Module):
    """Running statistics, a counter, and a cache that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        self.cache = torch.zeros(1 + choice)
        return self.out(self.norm(x))


def statistics(folder: Path, engine: str) -> dict[str, Any]:
    """BatchNorm's statistics after two steps, of rows that differ between ranks."""
    torch.manual_seed(0)
    model = Normalised()
    batches = [(ROWS, 0), (ROWS + 1, 1), (ROWS, 0), (ROWS + 3, 1)]
    Chosen(model, torch.optim.AdamW(model.parameters()), batches, **options(folder, engine)).train()
    norm = model.norm
    return {
        "mean": norm.running_mean.tolist(),
        "var": norm.running_var.tolist(),
        "count": int(norm.num_batches_tracked),
    }


def on_second_rank(folder: Path, engine: str, act: Any) -> Any:
    def maybe(run: Any) -> None:
        if dist.rank() == 1 and run.progress.step == 1:
            act()

    return train(folder, engine, [(ROWS, 0)] * 6, hooks=[Hook("mine", maybe, every_steps=1)])


def raises_early(folder: Path, engine: str) -> Any:
    """The second rank fails before it has a trainer, for which the first one waits."""
    if dist.rank() == 1:
        time.sleep(0.5)
        raise ValueError("row 17 of rows.jsonl is no good")
    return train(folder, engine, [(ROWS, 0)] * 6)


def raises(folder: Path, engine: str) -> Any:
    def act() -> None:
        raise ValueError("row 17 of rows.jsonl is no good")

    return on_second_rank(folder, engine, act)


class ShortOfMemory(Chosen):
    """The memory of the second rank runs out in the backward of the second step."""

    def _compute_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if dist.rank() == 1 and self.machine.step == 1:
            outputs.register_hook(lambda gradient: (_ for _ in ()).throw(OF_HOST))
        return super()._compute_loss(outputs, batch)


def runs_out(folder: Path, engine: str) -> Any:
    """What can be done about it depends on the engine; what is a row, only its own class knows."""
    return train(folder, engine, [(ROWS, 0)] * 6, kind=ShortOfMemory)


class ShortInUpdate(Chosen):
    """The memory of the second rank does not suffice for the second update."""

    def _end_step(self, sum_over_ranks: Any) -> None:
        super()._end_step(sum_over_ranks)
        if dist.rank() == 1 and self.machine.step == 1:
            self.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(OF_HOST))


def runs_out_updating(folder: Path, engine: str) -> Any:
    return train(folder, engine, [(ROWS, 0)] * 6, kind=ShortInUpdate)


def times_out(folder: Path, engine: str) -> Any:
    """The second rank does something else for longer than the time-out."""
    return on_second_rank(folder, engine, partial(time.sleep, 100))


CASES: dict[str, Any] = {
    case.__name__: case
    for case in (
        odd_rows,
        no_terms,
        unused,
        unused_layer,
        configured,
        statistics,
        raises,
        raises_early,
        runs_out,
        runs_out_updating,
        times_out,
    )
}


def play(folder: Path, engine: str, case: str, ranks: int) -> dict[str, Any]:
    name = f"{engine}-{case}-{ranks}"
    return fork_ranks(partial(CASES[case], engine=engine), folder / name, ranks, timeout_s=TIMEOUT_S)


def aside(folder: Path, cell: str) -> tuple[int, Path]:
    """Play a cell whose ranks only wait beside the others: the process that does, and where its report will be."""
    place = folder / f"{cell.replace('/', '-')}.json"
    child = os.fork()
    if child == 0:
        engine, case = cell.split("/")
        place.write_text(json.dumps({cell: play(folder, engine, case, RANKS)}))
        os._exit(0)
    return child, place


def main(folder: Path, cells: list[str]) -> None:
    watch.GRACE_S, watch.STANDSTILL_S = 2.0, 0.5
    import_once()
    import transformers.trainer  # noqa: F401  # of the engine 'hf'

    tiny_model()
    wanted = cells or [f"{engine}/{case}" for engine in ENGINES for case in CASES]
    waits = [cell for cell in wanted if cell.endswith("/times_out")][:1]
    waiting = [aside(folder, cell) for cell in waits]
    report = {}
    for case in ALONE:
        if any(cell.endswith(f"/{case}") for cell in wanted):
            report[f"alone/{case}"] = play(folder, "torch", case, 1)
    for cell in wanted:
        engine, case = cell.split("/")
        if cell not in waits:
            report[cell] = play(folder, engine, case, RANKS)
    for child, place in waiting:
        os.waitpid(child, 0)
        report |= json.loads(place.read_text())
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
