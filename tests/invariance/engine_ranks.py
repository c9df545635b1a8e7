"""The cells of every engine with two processes: `python engine_ranks.py OUT` forks them all from one import.

Writes, for each engine, how its processes ended and the curves of its cells; and beside OUT, in a folder called after the
engine, leaves a run that ended early. With a further argument `left-out`: the curves of the cells that are slow tests.
"""

import gc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / inner) for inner in ("invariance", "distributed", "")]
from ranks import fork_ranks, import_once
from sees import asked, make_files
from served import made_ahead, moved, seen, served
from table import (
    ENGINES,
    GATHER,
    OF_SEEING_REWARDS,
    OF_SEEN,
    STEPS,
    TRAINERS,
    Cell,
    automatic_cells,
    cells,
    engine_cells,
    is_fast,
    left_out,
    model_of,
    run,
    seeing_reward_cell,
    weighed_cell,
)

RANKS = 2


def curves(folder: Path, engine: str, ended_early: Path) -> dict[str, Any]:
    """Every cell of an engine, one after the other in the same processes; and a run into `ended_early`."""
    make = cells if engine == "torch" else partial(engine_cells, engine=engine)
    wanted = [cell for trainer in TRAINERS for cell in make(trainer, ranks=RANKS)]
    wanted += [cell for trainer in TRAINERS for cell in automatic_cells(trainer, engine, RANKS)]
    wanted = [cell for cell in wanted if is_fast(cell)]
    if engine in OF_SEEING_REWARDS:
        wanted.append(seeing_reward_cell(engine, RANKS))
    chosen = Cell("sft", 2, 2, RANKS, flat=True, engine=engine, automatic=True)
    run(chosen, into=str(ended_early), last_step=STEPS - 1)
    found = curves_of([*wanted, weighed_cell(engine, RANKS)])
    found |= {"served": served(engine, RANKS), "moved": moved(engine, RANKS)}
    if engine in OF_SEEING_REWARDS:
        found["asked"] = asked(engine, RANKS, ended_early.parent / "files", ended_early.parent / f"asked-{engine}")
    if engine in GATHER:
        found |= {"made ahead": made_ahead(engine, RANKS)}
        found["seen"] = {name: seen(engine, RANKS, name) for name in OF_SEEN}
    return found


def curves_of(wanted: list[Cell]) -> dict[str, Any]:
    """Of cells. DeepSpeed keeps every engine that it has made, and collects garbage when it makes the next one."""
    found: dict[str, Any] = {}
    for cell in wanted:
        found[str(cell)] = run(cell)
        gc.freeze()
    return found


def curves_left_out(folder: Path, engine: str) -> dict[str, Any]:
    """Those of the cells of an engine that are slow tests."""
    return curves_of(left_out(engine, RANKS))


def main(out: Path, only_left_out: bool = False) -> None:
    """Play everything."""
    import_once()
    import transformers.trainer  # noqa: F401  # of the engine 'hf'

    import seeing_policies  # noqa: F401  # of `seen`

    for trainer in TRAINERS:
        model_of(Cell(trainer, 8, 1))  # imports what makes it
    gc.freeze()

    make_files(out.parent / "files")
    report = {}
    with tempfile.TemporaryDirectory() as name:
        for engine in ENGINES:
            play = partial(curves, engine=engine, ended_early=out.parent / engine)
            if only_left_out:
                play = partial(curves_left_out, engine=engine)
            done = fork_ranks(play, Path(name) / engine, RANKS)
            report[engine] = {"codes": done["codes"], "texts": done["texts"], "curves": done["results"][0]}
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), only_left_out="left-out" in sys.argv[2:])
