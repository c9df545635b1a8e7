"""Two processes under `transformers.Trainer`: `python hf_ranks.py FOLDER` plays all and prints what the ranks saw as JSON."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from ranks import (
    INF,
    NONE,
    ONE,
    Rows,
    fork_ranks,
    import_once,
    mean_trainer,
    metric_lines,
    send,
    stream,
    weights_of,
    without_dropout,
)

from llm_trainer.data.collate import collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist


def uneven(folder: Path, engine: str) -> dict[str, Any]:
    """The last training step has a row for one rank only, and the evaluation fewer batches for the second rank."""
    ranks: Any = {"rank": dist.rank(), "world_size": dist.world_size()}
    evaluated = SampleStream(Rows(9, 1), collate_padded, rows_per_step=16, batch_size=2, shuffle=False, **ranks)
    trainer = without_dropout(folder, train_loader=stream(Rows(57)), val_loader=evaluated, engine=engine)
    trainer.train()
    lines = metric_lines(folder) if dist.is_main() else []
    return {"lines": lines, "weights": weights_of(trainer)}


def signalled(folder: Path) -> dict[str, Any]:
    """Only the second rank hears the signal; the run is started again, and compared with one that was left alone."""
    whole = without_dropout(folder / "whole", engine="hf")
    whole.train()
    cut = without_dropout(folder / "cut", engine="hf", hooks=[send(signal.SIGTERM, rank=1, step=3)])
    code: Any = 0
    try:
        cut.train()
    except SystemExit as error:
        code = error.code
    rest = without_dropout(folder / "cut", engine="hf")
    rest.train()
    return {"code": code, "stopped_at": cut.run.progress.step, "rest": weights_of(rest), "whole": weights_of(whole)}


def means(folder: Path, batches: list[torch.Tensor]) -> dict[str, Any]:
    """A user's own algorithm, whose loss of a batch without terms is 0 / 0."""
    trainer = mean_trainer(folder, batches, engine="hf")
    trainer.train()
    weights = [p.item() for p in trainer.base_model.parameters()]
    return {"weights": weights, "step": trainer.run.progress.step, "skipped": trainer.run.progress.skipped_steps}


def every_scenario(folder: Path) -> dict[str, Any]:
    return {
        "uneven": {engine: uneven(folder / engine, engine) for engine in ("torch", "hf")},
        "signalled": signalled(folder / "signalled"),
        "no_terms": means(folder / "no_terms", [ONE, NONE, ONE, NONE]),
        "inf_on_one": means(folder / "inf", [ONE, ONE, ONE, INF, ONE, ONE]),
    }


def main(folder: Path) -> None:
    """Play everything, in two processes."""
    import_once()
    import transformers.trainer  # noqa: F401

    print(json.dumps(fork_ranks(every_scenario, folder / "all", 2)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
