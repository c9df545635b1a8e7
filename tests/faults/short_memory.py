"""Runs whose memory runs out again and again: `python short_memory.py FOLDER LIVES` plays them and prints what became of them.

Imports once and forks its runs: alone, and in two processes.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "faults", "distributed", "invariance")]
from table import tiny_model
from victim import Rows, make_trainer, metric_lines

from failing_memory import FailingMemory, at_random
from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.state import MicroBatch

COUNT, ROWS_PER_STEP = 92, 16  # the last of six steps has fewer rows
ROOM = 200 << 20  # bytes


class Recorded(SampleStream):
    """A stream that remembers the rows of every step, however often it comes."""

    def steps(self, epoch: int, position: int = 0) -> Iterator[tuple[list[MicroBatch], int]]:
        for micro_batches, after in super().steps(epoch, position):
            rows = []
            for micro_batch in micro_batches:
                if micro_batch.counts:
                    rows += _rows(micro_batch.batch)
            self.seen[after] = sorted(rows)
            yield micro_batches, after

    seen: dict[int, list[list[int]]]


def _rows(batch: Any) -> list[list[int]]:
    if "document_lengths" in batch:
        return [row.tolist() for row in batch["input_ids"][0].split(batch["document_lengths"].tolist())]
    lengths = batch["attention_mask"].sum(1).tolist()
    return [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]


def life(folder: Path, seed: int | None, engine: str = "torch", flat: bool = False) -> dict[str, Any]:
    """A run without dropout; `seed`: of where memory runs out on this rank, None: nowhere."""
    ranks: dict[str, Any] = {"rank": dist.rank(), "world_size": dist.world_size()}
    collate = collate_flat if flat else collate_padded
    how: dict[str, Any] = {"rows_per_step": ROWS_PER_STEP, "batch_size": 4, "flat": flat}
    source = Recorded(Rows(COUNT), collate, **how, **ranks)
    source.seen = {}
    trainer = make_trainer(
        folder,
        "small" if flat else "plain",  # which knows no documents
        train_loader=source,
        val_loader=None,
        scheduler=None,
        max_epochs=1,
        grad_accum_steps=ROWS_PER_STEP // 4 // dist.world_size(),
        log_interval=1,
        save_interval_steps=3,
        eval_interval=None,
        engine=engine,
        micro_batch_tokens=None,
    )
    layer = _without_dropout(trainer.base_model)
    failures = 0
    if seed is not None:
        share = 0.25 if dist.world_size() == 1 else 0.15
        memory = FailingMemory(trainer, layer, at_random(1000 * seed + dist.rank(), share))
        trainer.train()
        failures = memory.failures
    else:
        trainer.train()
    return {
        "failures": failures,
        "rows": source.seen,
        "weights": [parameter.flatten().tolist() for parameter in trainer.base_model.parameters()],
        "lines": metric_lines(folder) if dist.is_main() else [],
        "tokens": trainer.run.budget.tokens,
    }


def _without_dropout(model: Any) -> torch.nn.Module:
    """A layer in the middle of the model, which no longer draws."""
    if hasattr(model, "mix"):
        model.drop.p = 0.0
        return model.mix
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model.model.layers[0]


def little_room(folder: Path, limited: bool = True) -> dict[str, Any]:
    """A run under a limit on its address space, in which its first micro-batches do not fit.

    Before, another one runs: kernels, threads and libraries have then been loaded.
    """
    for name, rows in (("before", 4), ("run", 64)):
        trainer = _equally_long(folder / name, rows)
        if limited and name == "run":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        trainer.train()
    return {"lines": metric_lines(folder / "run"), "tokens": trainer.run.budget.tokens}


def _equally_long(folder: Path, rows_per_step: int) -> Any:
    """Two steps of so many rows of 400 tokens, in one micro-batch."""
    from llm_trainer import SFTTrainer, configure_optimizer

    rows = Rows(2 * rows_per_step)
    rows.lengths = rows.lengths * 0 + 400
    rows._ids = [ids.repeat(100)[:400] for ids in rows._ids]
    model = tiny_model()
    how: dict[str, Any] = {"rows_per_step": rows_per_step, "batch_size": rows_per_step, "shuffle": False}
    source = SampleStream(rows, collate_padded, micro_batch_tokens=None, **how)
    options: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "save_interval": 0, "save_in_background": False}
    optimizer = configure_optimizer(model=model, lr=1e-2)
    options |= {"device": "cpu", "use_amp": False, "progress": False, "save_dir": str(folder)}
    return SFTTrainer(model, optimizer, source, **options)


def compare(found: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """What is different between the results of two lives, beyond the last digits."""
    different = []
    if found["codes"] != plain["codes"]:
        return [f"codes {found['codes']}: {''.join(found['texts'])[-2000:]}"]
    for one, other in zip(found["results"], plain["results"], strict=True):
        if one["rows"] != other["rows"]:
            different.append("rows")
        for left, right in zip(one["lines"], other["lines"], strict=True):
            for name in ("loss", "grad_norm", "num_tokens"):
                if abs(left[name] - right[name]) > 1e-6 * max(1.0, abs(right[name])):
                    different.append(f"{name} of step {left['step']:g}: {left[name]}, expected {right[name]}")
        for ours, theirs in zip(one["weights"], other["weights"], strict=True):
            if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5):
                different.append("weights")
    return different


def main(folder: Path, lives: int) -> None:
    """Play everything."""
    from ranks import fork_ranks, import_once  # which itself plays a few of these lives

    import_once()
    import transformers.trainer  # noqa: F401  # of the engine 'hf'

    make_trainer(folder / "unused")  # imports the rest
    report: dict[str, Any] = {"failures": 0, "lives": 0, "hit": 0, "slowest_s": 0.0, "different": []}
    for ranks in (1, 2):
        for engine in ("torch", "hf"):
            for flat in (False, True):
                name = f"{engine}-{ranks}-{'flat' if flat else 'padded'}"
                play = partial(life, engine=engine, flat=flat)
                plain = fork_ranks(partial(play, seed=None), folder / name, ranks)
                assert plain["codes"] == [0] * ranks, plain["texts"]
                count = lives if engine == "torch" and not flat else max(1, lives // 5)
                for seed in range(count):
                    began = time.monotonic()
                    found = fork_ranks(partial(play, seed=seed), folder / f"{name}-{seed}", ranks)
                    failures = sum(result["failures"] for result in found["results"] if result)
                    report["lives"] += 1
                    report["hit"] += failures > 0
                    report["failures"] += failures
                    report["slowest_s"] = round(max(report["slowest_s"], time.monotonic() - began), 1)
                    report["different"] += [f"{name}-{seed}: {text}" for text in compare(found, plain)]
    plain = fork_ranks(partial(little_room, limited=False), folder / "room", 1)
    report["little_room"] = {"plain": plain, "found": fork_ranks(little_room, folder / "little_room", 1)}
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
