"""Real processes over gloo: `python ranks.py FOLDER` plays every scenario and prints what its ranks saw as JSON.

Imports once and forks the ranks. `torchrun ranks.py --train FOLDER` trains until a signal comes.
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / "faults"), str(Path(__file__).parents[1])]
from short_memory import life
from victim import Rows, make_trainer, metric_lines

from llm_trainer import BaseTrainer
from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.data.collate import collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.lock import LockedError, lock_of_run
from llm_trainer.train.hooks import Hook
from machine import free_port
from one_thread import use_one_thread
from quick_disk import never_wait

QUIET = {"val_loader": None, "scheduler": None, "max_epochs": 1, "log_interval": 1, "save_interval_steps": None}


class SeenRows(Rows):
    """Rows that remember which of them were asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.seen.append(index)
        return super().__getitem__(index)


def stream(rows: Rows, rows_per_step: int = 8) -> SampleStream:
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    return SampleStream(rows, collate_padded, rows_per_step=rows_per_step, batch_size=2, **ranks)


def weights_of(trainer: Any) -> str:
    """A hash of all weights, bit for bit."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.base_model.parameters())).hexdigest()


def without_dropout(folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, **(QUIET | options))
    trainer.base_model.drop.p = 0.0
    return trainer


def send(number: int, rank: int, step: int) -> Hook:
    """A hook by which one rank sends itself a signal, after one step."""

    def kill(run: Any) -> None:
        if dist.rank() == rank and run.progress.step == step:
            os.kill(os.getpid(), number)

    return Hook("kill", kill, every_steps=1)


# Scenarios. Each is called in every rank, and what it returns is reported.


def slow_data(folder: Path) -> float:
    """The main process prepares data for longer than the timeout of training."""
    began = time.monotonic()
    with dist.main_process_first():
        time.sleep(3 if dist.is_main() else 0)
    return time.monotonic() - began


def train(folder: Path) -> dict[str, Any]:
    """57 rows in steps of 8: the last step has one row, so the second rank has none."""
    trainer = without_dropout(folder, train_loader=stream(Rows(57)))
    first, refused = weights_of(trainer), ""
    with lock_of_run(folder).held() if dist.is_main() else contextlib.nullcontext():
        with dist.main_process_first():  # another run is at work in the folder
            pass
        try:
            trainer.train()
        except LockedError as error:
            refused = str(error)
    last = trainer.train()
    return {"weights": weights_of(trainer), "changed": first != weights_of(trainer), "last": last, "refused": refused}


def one_raises(folder: Path) -> None:
    def fail(run: Any) -> None:
        if dist.rank() == 1 and run.progress.step == 3:
            raise RuntimeError("rank 1 has had enough")

    without_dropout(folder, hooks=[Hook("fail", fail, every_steps=1)]).train()


def signalled(folder: Path) -> None:
    """Only the second rank hears the signal."""
    without_dropout(folder, hooks=[send(signal.SIGTERM, rank=1, step=3)]).train()


def elastic(folder: Path) -> dict[str, Any]:
    """Train on from what is there until two more steps are done, then stop as by a scheduler."""
    rows = SeenRows(62)
    trainer = without_dropout(folder, train_loader=stream(rows), max_epochs=2)
    trainer.run._resume()
    last = trainer.run.progress.step + 2
    trainer.run._user_hooks.append(send(signal.SIGTERM, rank=0, step=last))
    try:
        trainer.train()
    except SystemExit as error:
        return {"seen": rows.seen, "code": error.code, "step": trainer.run.progress.step}
    return {"seen": rows.seen, "code": 0, "step": trainer.run.progress.step}


class MeanOfNothing(BaseTrainer):
    """The mean of the chosen numbers times a weight; without any chosen number its loss is 0 / 0."""

    def _loss_weight(self, batch: torch.Tensor) -> float:
        return float((batch[1] > 0).sum())

    def _count_tokens(self, batch: torch.Tensor) -> int:
        return batch[0].numel()

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch[0][:, None])[:, 0]

    def _compute_loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (outputs * batch[1]).sum() / (batch[1] > 0).sum()


def mean_trainer(
    folder: Path, batches: list[torch.Tensor], seed: int = 0, model: torch.nn.Module | None = None, **options: Any
) -> MeanOfNothing:
    torch.manual_seed(seed)
    model = model or torch.nn.Linear(1, 1)
    return MeanOfNothing(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        train_loader=batches,
        max_epochs=1,
        log_interval=1,
        device="cpu",
        use_amp=False,
        progress=False,
        save_dir=str(folder),
        **options,
    )


ONE, NONE, INF = (torch.tensor([[1.0, 2.0], chosen]) for chosen in ([1.0, 1.0], [0.0, 0.0], [1.0, math.inf]))


def other_seed(folder: Path) -> dict[str, Any]:
    """Every rank brings other weights; those of the main process count."""
    trainer = mean_trainer(folder, [ONE], seed=dist.rank())
    return {"weights": weights_of(trainer)}


def no_terms(folder: Path) -> dict[str, Any]:
    """The second of every two micro-batches has no term: with two ranks, one rank has only such."""
    trainer = mean_trainer(folder, [ONE, NONE, ONE, NONE], grad_accum_steps=2 // dist.world_size())
    trainer.train()
    weights = [p.item() for p in trainer.base_model.parameters()]
    return {"weights": weights, "step": trainer.run.progress.step, "skipped": trainer.run.progress.skipped_steps}


def inf_on_one(folder: Path) -> dict[str, Any]:
    """The second step has an infinity, on one rank."""
    trainer = mean_trainer(folder, [ONE, ONE, ONE, INF, ONE, ONE])
    trainer.train()
    kept = sorted(path.name for path in (folder / "bad_steps").iterdir())
    return {"weights": weights_of(trainer), "skipped": trainer.run.progress.skipped_steps, "kept": kept}


def tried_out(folder: Path) -> dict[str, Any]:
    """What a token takes is tried out before the first step, by ranks of which the second finds twice as much."""
    from llm_trainer.engine.room import Room
    from llm_trainer.train import sizing, trial

    def twice_on_the_second(work: Any, source: SampleStream) -> float:
        assert trial.bytes_per_token(work, source)
        return 5000 * (1 + dist.rank())

    sizing.bytes_by_formula = lambda *about: None  # type: ignore[assignment]
    sizing.bytes_per_token = twice_on_the_second  # type: ignore[assignment]
    sizing.room_on = lambda device: Room(10_000_000, 10_000_000, "a box")  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for engine in ("torch", "fsdp"):
        for tries in (False, True):
            sizing.ENOUGH = 0 if tries else 4096
            options = QUIET | {"train_loader": stream(Rows(62)), "engine": engine, "max_steps": 2}
            trainer = make_trainer(folder / f"{engine}-{tries}", "transformer", **options)
            trainer.train()
            weights = trainer.run.engine.weights().values()
            hashed = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights)).hexdigest()
            found[f"{engine}-{tries}"] = [trainer.run.budget.tokens, hashed]
    return found


class Layers(torch.nn.Module):
    """Three equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = layer(values)
        return values


def compiled(folder: Path) -> list[Any]:
    """Never, after three steps, and where the compiler fails on the second rank."""
    from llm_trainer import compiler
    from llm_trainer.train import compiling

    def fails(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        from torch._inductor.exc import InvalidCxxCompiler

        if dist.rank() == 1:
            raise InvalidCxxCompiler
        return function

    def traces(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        return torch.compile(function, backend="eager", dynamic=dynamic)

    compiling.WATCHED, compiling.SHORTEST_S, compiling.WORTH_KEEPING = 3, 0.0, 0.0
    compiling.EXPECTED = {("cpu", "fp32"): compiling.Estimate(0.0, 1e9)}
    compiling.Compiling._known = lambda self, done: None  # type: ignore[method-assign]
    found = []
    for number, (how, compile_with) in enumerate(((False, traces), ("auto", traces), ("auto", fails))):
        compiler.compiled = compile_with  # type: ignore[assignment]
        torch.manual_seed(0)
        trainer = mean_trainer(folder / str(number), [ONE] * 20, model=Layers(), compile=how)
        trainer.train()
        said = trainer.run.choices.get("compile")
        found.append([weights_of(trainer), trainer.run.compiling.state_dict()["is_on"], said and said.why])
    return found


def threads_of_each(folder: Path) -> dict[str, Any]:
    """Nobody has said how many threads a process has, and both may use all eight cores of a machine."""
    from llm_trainer.engine import threads

    os.environ.pop("OMP_NUM_THREADS", None)
    box = threads.Place("box", frozenset(range(8)), 8, None)
    threads.Place.here = classmethod(lambda cls: box)  # type: ignore[method-assign, assignment]
    torch.set_num_threads(8)
    trainer = mean_trainer(folder, [ONE])
    return {"threads": torch.get_num_threads(), "why": trainer.run.choices["threads"].why}


# Ranks.


def import_once() -> None:
    """Import what ranks will need before they are forked: otherwise each of dozens imports it again, a second or more."""
    from importlib.util import find_spec

    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import llm_trainer.assemble
    import llm_trainer.data.encode.from_ids
    import llm_trainer.data.kinds.pairs
    import llm_trainer.data.kinds.unpaired
    import llm_trainer.engine.deepspeed
    import llm_trainer.engine.fsdp
    import llm_trainer.models.qat
    import llm_trainer.models.vocabulary
    import llm_trainer.plan.memory
    import llm_trainer.train.run
    import llm_trainer.train_configs  # noqa: F401
    from llm_trainer.train import size
    from llm_trainer.trainers import TRAINERS, get_trainer_class

    never_wait()
    use_one_thread()
    for name in TRAINERS:
        get_trainer_class(name)
    if find_spec("deepspeed") is not None:
        # What it logs goes to stdout as it is now, and there is the report.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # of the parts of torch that it imports
            import deepspeed.module_inject.auto_ep_layer
            import deepspeed.runtime.superoffload.superoffload_stage3
            import deepspeed.runtime.zero.muon.muon_optimizer
            import deepspeed.runtime.zero.stage3
            import deepspeed.runtime.zero.stage_1_and_2

            assert deepspeed.ops.__compatible_ops__  # found out with a C compiler, by every process that asks first
    size.measured_peak(torch.device("cpu"), torch.float32)  # what every rank would measure for its MFU
    gc.freeze()  # DeepSpeed's stage 3 collects when it is made: half a second for what was imported here


def fork_ranks(scenario: Callable[[Path], Any], folder: Path, ranks: int, timeout_s: int = 60) -> dict[str, Any]:
    """Run a scenario in `ranks` processes; their exit codes, output, results, and seconds until the last one ended."""
    port = free_port()
    out, began = folder.parent / f"{folder.name}-out", time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    children = [os.fork() or play(scenario, folder, rank, ranks, port, out, timeout_s) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [json.loads(p.read_text()) if (p := out / f"{r}.json").exists() else None for r in range(ranks)]
    texts = [(out / f"{r}.txt").read_text() for r in range(ranks)]
    return {"codes": codes, "results": results, "texts": texts, "seconds": time.monotonic() - began}


def play(
    scenario: Callable[[Path], Any], folder: Path, rank: int, ranks: int, port: int, out: Path, timeout_s: int
) -> int:
    """Be one rank; never returns."""
    code = 0
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        sys.stdout = sys.stderr = (out / f"{rank}.txt").open("w")
        dist.start(torch.device("cpu"), timeout_s)
        (out / f"{rank}.json").write_text(json.dumps(scenario(folder)))
        dist.stop()
    except BaseException as error:
        traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
    sys.stdout.flush()
    os._exit(code)


def main(folder: Path) -> None:
    """Play everything."""
    import_once()
    make_trainer(folder / "unused")  # imports the rest

    report: dict[str, Any] = {}
    for scenario in (train, no_terms):
        for ranks in (1, 2):
            report[f"{scenario.__name__}-{ranks}"] = fork_ranks(
                scenario, folder / f"{scenario.__name__}-{ranks}", ranks
            )
    for ranks in (1, 2):
        for seed in (None, 0, 1):
            play = partial(life, seed=seed)
            report[f"short of memory {seed} {ranks}"] = fork_ranks(play, folder / f"short-{seed}-{ranks}", ranks)
    for scenario in (slow_data, other_seed, one_raises, signalled, inf_on_one, threads_of_each, tried_out, compiled):
        timeout_s = 1 if scenario is slow_data else 60
        report[scenario.__name__] = fork_ranks(scenario, folder / scenario.__name__, 2, timeout_s)
    report["elastic"] = [fork_ranks(elastic, folder / "elastic", ranks) for ranks in (2, 1, 2, 1, 2, 1, 2)]
    report["metrics"] = {ranks: metric_lines(folder / f"train-{ranks}") for ranks in (1, 2)}
    report["checkpoint"] = CheckpointManager(folder / "signalled").load().step
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "--train":
        make_trainer(Path(sys.argv[2]), max_epochs=10_000).train()
    else:
        main(Path(sys.argv[1]))
