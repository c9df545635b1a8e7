"""`llm-trainer compare`: one YAML trained in several ways, on the same rows from the same weights, side by side."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from llm_trainer.cli.plots import Curves, LogError, read_curves, save
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import load_config
from llm_trainer.config.schema import TrainConfig
from llm_trainer.engine.device import choose_precision, detect_device

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "three_ways"
# EX_UNAVAILABLE of sysexits.h: how a script says that it lacks something; its last line says what.
EXIT_UNAVAILABLE = 69
# Nats; rounding grows over the steps, a mistake is larger at once.
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
# Runs a command and writes the most memory of any process in it. A process of its own: to a child of ours the system
# would count the memory that we have when it starts.
METER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code if code >= 0 else 128 - code)
"""
SAME_FACTOR = 1e-3  # ratios that spread less are one factor
WARM_UP = 2  # steps that do not count for the speed
ROWS = 24  # lines of the table of losses
DRAWN = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class Way:
    """One way to train a YAML.

    Attributes:
        package: what has to be installed for it; "" for nothing.
        script: a script of `EXAMPLES` and its options; empty: `llm-trainer train` with `run_config.engine`.
        modules: other files of `EXAMPLES` that the script imports.
        launches_itself: the script takes `--nproc`; others are started by torchrun.
        must_agree: whether losses that differ are a mistake of ours.
        hint: what usually makes them differ.
    """

    package: str = ""
    script: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    launches_itself: bool = False
    must_agree: bool = True
    hint: str = "compare grad_norm of both metrics.jsonl at that step, and run again with run_config.precision=fp32"


WAYS = {
    "torch": Way(),
    "fsdp": Way(),
    "deepspeed": Way("deepspeed", hint="under bf16 and fp16 DeepSpeed may keep weights in 16 bits: compare in fp32"),
    "hf": Way("accelerate", ("train_with_transformers_trainer.py",)),
    "lowmem": Way("accelerate", ("train_low_mem.py", "--state", "host")),
    "llamafactory": Way(
        script=("train_with_real_llamafactory.py", "--tokens", "ours", "--installed-only"),
        modules=("llamafactory_yaml.py", "llamafactory_images.py"),
        launches_itself=True,
        must_agree=False,
        hint="what it is not told is listed in its output.txt; the transformers that it uses divide a pretraining loss by T "
        "where T - 1 tokens are predicted",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What came of one way.

    Attributes:
        way: a key of `WAYS`.
        curves: its metrics; empty when it did not train.
        peak_bytes: most memory of one process: of a GPU as the driver counts it, else resident memory.
        problem: why it did not train; "" when it did.
        is_skipped: whether the problem is only something that is not installed.
    """

    way: str
    curves: Curves
    peak_bytes: int = 0
    problem: str = ""
    is_skipped: bool = False

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        steps, values = self.curves.get("loss", ([], []))
        return dict(zip(steps, values, strict=True))

    def speed(self) -> float:
        """Median tokens per second after the first steps; NaN where nothing was measured."""
        _, values = self.curves.get("tokens_per_second", ([], []))
        if not values:
            return math.nan
        return statistics.median(values[WARM_UP:] or values)

    def lines_of_code(self) -> int:
        """Lines of its script that are neither blank nor a comment; 0 for an engine, which needs the YAML alone."""
        script, modules = WAYS[self.way].script, WAYS[self.way].modules
        count = 0
        for file in (*script[:1], *modules):
            for line in (EXAMPLES / file).read_text(encoding="utf-8").splitlines():
                code = line.strip()
                if code and not code.startswith("#"):
                    count += 1
        return count


def compare(
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
    engines: Annotated[
        str, typer.Option(help=f"of {','.join(WAYS)}; the others are compared with the first")
    ] = "torch,hf",
    nproc: Annotated[int, typer.Option(min=1, help="number of processes of each")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of each")] = 20,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="nats between equal losses; default by precision")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a new folder that keeps everything that is written; default: nothing is kept")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="curves as .png, .svg or .pdf")] = None,
) -> None:
    """Train the same rows from the same weights with several engines, and say where their losses part.

    Rows come in the order of the files, whatever the YAML says. Exit code 1: an engine of ours failed, or its losses
    differ from the first one's.
    """
    # 1. what is compared
    ways = list(dict.fromkeys(engines.split(",")))
    unknown = sorted(set(ways) - set(WAYS))
    if unknown:
        raise ConfigError(f"--engines: got {', '.join(unknown)}, expected some of {', '.join(WAYS)}")
    config = load_config(run, overrides or ())
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"--out {out}: the folder is not empty, and old curves must not pass for new ones; name another"
        )
    if tolerance is None:
        tolerance = _tolerance(config)

    # 2. train each way
    outcomes = []
    with TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        for way in ways:
            arguments = [str(run), *(overrides or ()), *_changes(config, folder, way, steps)]
            outcomes.append(_train(way, arguments, folder / way, nproc))

    # 3. side by side
    trained = [outcome for outcome in outcomes if not outcome.problem]
    typer.echo("\n".join(["", *_loss_table(trained), "", *_summary(outcomes, tolerance)]))
    if output is not None and trained:
        typer.echo(save({outcome.way: _drawn(outcome.curves) for outcome in trained}, output))
    if any(_is_mistake(outcome, trained, tolerance) for outcome in outcomes):
        raise typer.Exit(1)


def _tolerance(config: TrainConfig) -> float:
    device = detect_device(config.run_config.device)
    return TOLERANCES[choose_precision(config.run_config.precision, device)]


def _changes(config: TrainConfig, folder: Path, way: str, steps: int) -> list[str]:
    """What makes runs comparable: the same rows in the same order, `steps` of them, a line of the log for each."""
    cache = config.data_loader_config.cache_dir or str(folder / "data")
    return [
        f"run_config.save_dir={json.dumps(str(folder / way))}",
        f"run_config.log_dir={json.dumps(str(folder / way / 'log'))}",
        f"run_config.max_steps={steps}",
        "n_epochs=1000000",  # as many as `max_steps` needs
        "run_config.log_interval=1",
        "run_config.progress=false",
        "run_config.resume=never",
        "run_config.writers=[]",
        "eval_dataset=null",
        "eval_prompts=[]",
        "data_loader_config.data_loader_shuffle=false",
        f"data_loader_config.cache_dir={json.dumps(cache)}",
    ]


def _train(way: str, arguments: Sequence[str], folder: Path, nproc: int) -> Outcome:
    """Train in a process of its own."""
    # 1. is everything there that it takes?
    recipe = WAYS[way]
    if recipe.package and find_spec(recipe.package) is None:
        return Outcome(way, {}, problem=f"pip install {recipe.package}", is_skipped=True)
    if recipe.script and not EXAMPLES.is_dir():
        problem = f"{recipe.script[0]} is in the repository, not in the package"
        return Outcome(way, {}, problem=problem, is_skipped=True)

    # 2. train
    typer.echo(f"{way} ...")
    started = time.monotonic()
    log = folder / "output.txt"
    code, peak_bytes = _run(_command(way, arguments, nproc), log)

    # 3. what came of it
    if code:
        return _failure(way, code, log)
    typer.echo(f"{way}: {time.monotonic() - started:.0f} s")
    try:
        return Outcome(way, read_curves(folder / "log" / "metrics.jsonl"), peak_bytes)
    except LogError as error:
        return Outcome(way, {}, problem=str(error))


def _failure(way: str, code: int, log: Path) -> Outcome:
    """Why a way did not train, from its exit code and its output."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == EXIT_UNAVAILABLE:
        return Outcome(way, {}, problem=lines[-1], is_skipped=True)
    errors = [line for line in lines if "rror: " in line]  # torchrun says much after the reason
    shown = errors[-3:] or lines[-12:]
    return Outcome(way, {}, problem="\n  ".join([f"exit code {code}, its last words:", *shown]))


def _command(way: str, arguments: Sequence[str], nproc: int) -> list[str]:
    recipe = WAYS[way]
    if recipe.script:
        name, *options = recipe.script
        target = [str(EXAMPLES / name), *arguments, *options]
    else:
        target = ["-m", "llm_trainer.cli.main", "train", *arguments, f"run_config.engine={way}"]

    torchrun: list[str] = []
    if recipe.launches_itself:
        target += ["--nproc", str(nproc)]
    elif nproc > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    # PARALLEL_TYPE: `train` would start itself once per GPU.
    return ["env", "PARALLEL_TYPE=none", sys.executable, *torchrun, *target]


def _run(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Exit code and peak memory in bytes, of the largest process or the fullest GPU."""
    log.parent.mkdir(parents=True, exist_ok=True)
    memory = log.with_suffix(".memory")
    with log.open("wb") as file:
        before = list(_gpu_bytes())
        peak = [0] * len(before)
        metered = [sys.executable, "-S", "-c", METER, str(memory), *command]
        process = subprocess.Popen(metered, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                peak = [max(pair) for pair in zip(peak, _gpu_bytes(), strict=True)]
        finally:
            if process.returncode is None:  # interrupted
                os.killpg(process.pid, signal.SIGTERM)
    on_gpu = max((most - idle for most, idle in zip(peak, before, strict=True)), default=0)
    if on_gpu:
        return process.returncode, on_gpu
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes, on Linux KiB
    return process.returncode, unit * int(memory.read_text())


def _gpu_bytes() -> Iterator[int]:
    """Memory in use on each GPU, by whomever."""
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield total - free


def parting(reference: dict[int, float], losses: dict[int, float], tolerance: float) -> int | None:
    """The first step at which losses, by step, differ by more than `tolerance`, or that one of them lacks."""
    for step in sorted(reference.keys() | losses.keys()):
        difference = reference.get(step, math.nan) - losses.get(step, math.nan)
        if not abs(difference) <= tolerance:  # NaN is a difference too
            return step
    return None


def _is_mistake(outcome: Outcome, trained: Sequence[Outcome], tolerance: float) -> bool:
    """Whether a way of ours failed or parted from the first one."""
    if outcome.is_skipped or not WAYS[outcome.way].must_agree:
        return False
    return bool(outcome.problem) or parting(trained[0].losses(), outcome.losses(), tolerance) is not None


def _loss_table(trained: Sequence[Outcome]) -> Iterator[str]:
    """The losses of every step, or of evenly spread ones, in columns."""
    losses = {outcome.way: outcome.losses() for outcome in trained}
    all_steps: set[int] = set()
    for curve in losses.values():
        all_steps |= curve.keys()
    every = max(1, math.ceil(len(all_steps) / ROWS))
    yield "loss" + "".join(f"{way:>14}" for way in losses)
    for step in sorted(all_steps)[::every]:
        values = [curve.get(step, math.nan) for curve in losses.values()]
        yield f"{step:>4}" + "".join(f"{value:>14.6f}" for value in values)


def _summary(outcomes: Sequence[Outcome], tolerance: float) -> Iterator[str]:
    """One line per way, then what is behind the differences."""
    yield f"{'engine':<14}{'tokens/s':>10}{'peak memory':>14}{'own code':>12}  loss"
    reference = next((outcome for outcome in outcomes if not outcome.problem), None)
    hints = []
    for outcome in outcomes:
        if outcome.problem or reference is None:
            verdict = "skipped" if outcome.is_skipped else "FAILED"
            yield f"{outcome.way:<14}{verdict}: {outcome.problem}"
            continue
        step = parting(reference.losses(), outcome.losses(), tolerance)
        if outcome is reference:
            verdict = "what the others are compared with"
        elif step is None:
            verdict = f"the same within {tolerance:g} ({_largest(reference, outcome):.1e} at most)"
        else:
            verdict = f"PARTS at step {step}, by more than {tolerance:g} ({_largest(reference, outcome):.1e} at most)"
            hints.append(f"{outcome.way}: {_factor(reference, outcome)}{WAYS[outcome.way].hint}")
        mebibytes = f"{outcome.peak_bytes / 2**20:,.0f} MiB"
        code = f"{outcome.lines_of_code()} lines"
        yield f"{outcome.way:<14}{outcome.speed():>10,.0f}{mebibytes:>14}{code:>12}  {verdict}"
    yield from hints


def _largest(reference: Outcome, outcome: Outcome) -> float:
    """The largest difference of the losses that both have."""
    a, b = reference.losses(), outcome.losses()
    return max((abs(a[step] - b[step]) for step in a.keys() & b.keys()), default=math.nan)


def _factor(reference: Outcome, outcome: Outcome) -> str:
    """Says so when losses differ by one factor: the divisor is another, and nothing else."""
    a, b = reference.losses(), outcome.losses()
    ratios = [b[step] / a[step] for step in a.keys() & b.keys() if a[step]]
    if len(ratios) < 2 or max(ratios) - min(ratios) > SAME_FACTOR:
        return ""
    return f"every loss is {statistics.mean(ratios):.4f} of the first one's, so only the divisor differs; "


def _drawn(curves: Curves) -> Curves:
    return {name: curve for name, curve in curves.items() if name in DRAWN}
