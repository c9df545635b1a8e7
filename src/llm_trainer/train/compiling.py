"""Whether a model is compiled while it is trained: as configured, or where the run is long enough to earn it back.

`auto` compiles layers, not whole models, in place and between two steps: see docs/decisions/0026-compiled-while-it-runs.md.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from llm_trainer.compiler import CompiledLayers, compile_module, compiler_errors, reason_of
from llm_trainer.config.env import environment
from llm_trainer.config.errors import ConfigError
from llm_trainer.disk import whole_file
from llm_trainer.engine import dist
from llm_trainer.engine.layers import language_layers_of
from llm_trainer.state import Choice, Horizon, Progress, StepDone

if TYPE_CHECKING:
    from llm_trainer.engine.base import Engine

KEY = "run_config.compile: false"
WATCHED = 8  # steps whose median says how long one takes, before the decision, and again after it
SHORTEST_S = 600.0  # a run that has less left is never compiled
WORTH_KEEPING = 1.0  # what it has to gain, as measured, to stay on
MARGIN = 2.0  # it has to gain so many times what it costs: both are estimates
KEPT_S = 30 * 86400.0  # what was measured is then measured again: drivers, libraries and neighbours change


class Estimate(NamedTuple):
    """What compiling costs and gains.

    Attributes:
        seconds: that the step takes longer in which it happens.
        gain: how many times as fast the steps after it are.
    """

    seconds: float
    gain: float

    def saved(self, seconds_left: float) -> float:
        """Seconds that are saved of those that the run would still take, less the cost."""
        return seconds_left * (1 - 1 / self.gain) - self.seconds

    def pays(self, seconds_left: float) -> bool:
        """Whether it is worth while for a run that would still take so long."""
        return seconds_left >= SHORTEST_S and self.saved(seconds_left) >= (MARGIN - 1) * self.seconds

    def choice(self, seconds_left: float, pays: bool) -> Choice | None:
        """What is then said; None of a short run."""
        if pays:
            saved = f"{_time(self.saved(seconds_left))} of {_time(seconds_left)} are saved"
            return Choice("compile", "on", f"one step takes about {self.seconds:.0f} s longer, and {saved}", KEY)
        if seconds_left < SHORTEST_S:
            return None
        why = f"{self.gain:.2f} times as fast steps do not earn back the {self.seconds:.0f} s it takes"
        return Choice("compile", "off", why, KEY)


class Pace(NamedTuple):
    """What a token of a step took.

    Attributes:
        seconds: by the clock of the wall.
        work: in which the device computed: on CPUs seconds of the processor, which other programs change little.
    """

    seconds: float
    work: float


# What is expected of a model that has never been compiled on this machine: docs/results.md, for two cores. GPUs were not
# measured: of them little is expected.
EXPECTED = {
    ("cpu", "fp32"): Estimate(40.0, 1.08),
    ("cpu", "bf16"): Estimate(40.0, 1.25),
}
ELSEWHERE = Estimate(90.0, 1.1)
KERNELS = Choice(
    "kernels", "compiled", "of head and attention: the run is long enough to earn back a step that takes longer", KEY
)
UNDECIDED = Choice("compile", f"decided after {WATCHED} steps", "it takes a long run to earn it back", KEY)


def expected(device: str, precision: str) -> Estimate:
    """What is expected on a kind of device where nothing has been measured."""
    return EXPECTED.get((device, precision), ELSEWHERE)


def foreseen(device: str, precision: str, step_s: float, steps: float | None) -> Choice | None:
    """What a run that leaves it open will choose on a machine that is not here, as far as it can be known.

    Args:
        device: its kind, such as 'cuda'.
        precision: 'fp32', 'bf16' or 'fp16'.
        step_s: seconds of a step, at a guess.
        steps: of the run; None: nobody knows.
    """
    if steps is None:
        return UNDECIDED
    estimate, seconds_left = expected(device, precision), step_s * max(steps - WATCHED, 0)
    return estimate.choice(seconds_left, estimate.pays(seconds_left))


class Compiling:
    """Decides after the first steps, and switches on between two steps, on all ranks between the same ones.

    All ranks call it together. It is a part of the checkpoint: a run that was compiled goes on compiled from its first step.

    Args:
        configured: as the user says; 'auto' leaves it to the machine.
        engine: executes the steps.
        engine_name: of it. 'auto' compiles nothing with others than 'torch', in one process and under DDP.
    """

    def __init__(self, configured: bool | Literal["auto"], engine: "Engine", engine_name: str) -> None:
        self._engine = engine
        self._configured = configured
        self._is_automatic = configured == "auto" and engine_name == "torch"
        self._layers = CompiledLayers()
        self._begin([])

    def _begin(self, pace: list[Pace]) -> None:
        self._pace = pace  # of the steps that were watched
        self._plain: list[Pace] = []  # of those in which the layers ran plain; empty: not known
        self._seconds = 0.0  # that compiling took
        self._has_begun = False  # whether the step in which layers are compiled is over
        self._is_settled = not self._is_automatic

    @property
    def is_on(self) -> bool:
        """Whether layers run compiled, or the whole model."""
        return self._configured is True or self._layers.is_on

    def add(self, module: nn.Module) -> None:
        """A model that is trained, or one that it is compared with: both must round alike.

        Raises:
            ConfigError: it is to be compiled at once, and there is no C++ compiler.
        """
        if self._configured is True:
            try:
                compile_module(module)
            except compiler_errors() as error:
                raise ConfigError(
                    f"run_config.compile: got true, which needs a C++ compiler ({error}); install one, such as g++, or set "
                    "run_config.compile=auto, which goes on without"
                ) from error
        elif self._is_automatic:
            # Towers run plain: transformers looks into their layers, which tracing cannot follow (`Seeing.compile`).
            self._layers.add(_outermost(language_layers_of(module)))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """The context of all calls of what was added: a model is compiled in its first one, and again where inputs differ.

        Raises:
            ConfigError: it is to be compiled, and cannot be.
        """
        if self._configured is not True:  # else what cannot be compiled runs plain
            yield
            return
        try:
            yield
        except compiler_errors() as error:
            raise ConfigError(
                f"run_config.compile: got true, and the model could not be compiled ({reason_of(error)}); expected one that "
                "torch.compile takes, and a C++ compiler that works: run_config.compile=auto runs plain what cannot be "
                "compiled, run_config.compile=false compiles nothing. --traceback, and TORCH_LOGS=inductor in the "
                "environment, show all that torch says"
            ) from error

    def choice(self, steps_left: int | None) -> Choice | None:
        """What is to be said before the first step; None where the machine has nothing to choose."""
        if not self._is_automatic or not self._layers.layers:
            return None
        if self._layers.is_on:
            return Choice("compile", "on", "the run was compiled when it was saved", KEY)
        if steps_left is None or steps_left <= WATCHED:
            return None
        return UNDECIDED

    def after(self, done: StepDone, steps_left: int | None) -> Choice | None:
        """Note a step.

        Args:
            done: what it was.
            steps_left: of the run; None: nobody knows.

        Returns:
            What has been chosen now, to be said.
        """
        if self._is_settled or not self._layers.layers:
            return None
        work = done.seconds
        if self._engine.device.type == "cpu":
            work = done.cpu_seconds
        pace = Pace(done.seconds / max(done.tokens, 1), work / max(done.tokens, 1))
        if self._layers.is_on or self._layers.failure:
            if not self._has_begun:
                return self._begun(done)
            return self._watch(pace, done)
        self._pace.append(pace)
        if len(self._pace) < WATCHED:
            return None
        return self._decide(done, steps_left)

    def _decide(self, done: StepDone, steps_left: int | None) -> Choice | None:
        """Switch on where it pays, as the main process sees it."""
        seconds_left = 0.0 if steps_left is None else _seconds(self._pace, done) * steps_left
        estimate = self._known(done) or expected(self._engine.device.type, self._engine.precision_name)
        pays = dist.is_main() and estimate.pays(seconds_left)
        if not dist.largest(int(pays), self._engine.device):
            self._is_settled = True
            return estimate.choice(seconds_left, pays=False)
        self._layers.switch(True)
        self._plain, self._pace = self._pace, []
        return estimate.choice(seconds_left, pays=True)

    def _begun(self, done: StepDone) -> Choice | None:
        """After the step in which layers were compiled: they are on all ranks, or on none."""
        self._has_begun = True
        failures = [failure for failure in dist.gather_objects(self._layers.failure) if failure]
        if failures:
            self._layers.switch(False)
            self._is_settled = True
            return Choice("compile", "off", f"it failed, and training goes on without ({failures[0]})", KEY)
        if not self._plain:  # since the first step of a run that was resumed
            self._is_settled = True
            return None
        self._seconds = max(done.seconds - _seconds(self._plain, done), 0.0)
        return None

    def _watch(self, pace: Pace, done: StepDone) -> Choice | None:
        """See what it has gained, and remember it; where that is nothing, switch off again. Only where it is clear."""
        self._pace.append(pace)
        if len(self._pace) < WATCHED:
            return None
        self._is_settled = True
        plain, compiled = [pace.work for pace in self._plain], [pace.work for pace in self._pace]
        gain, is_clear = median(plain) / median(compiled), _lie_apart(plain, compiled)
        facts = f"it took {self._seconds:.0f} s, and steps are {gain:.2f} times as fast"
        if not is_clear:
            facts += ", which is not clear, as steps differ that much among each other"
        if is_clear and dist.is_main():
            self._remember(Estimate(round(self._seconds, 1), round(gain, 3)), done)
        slower = is_clear and dist.is_main() and gain < WORTH_KEEPING
        if not dist.largest(int(slower), self._engine.device):
            return Choice("compile", "on", facts, KEY)
        self._layers.switch(False)
        return Choice("compile", "off", facts, KEY)

    # What is known of this model on this machine.

    def _file(self, done: StepDone) -> Path:
        """Where what was measured is kept: for these layers, this layout of batches, this device and this software."""
        count: dict[str, int] = {}
        for layer in self._layers.layers:
            shapes = [(name, *p.shape, str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
            described = f"{type(layer).__qualname__} {shapes}"
            count[described] = count.get(described, 0) + 1
        device, batch = self._engine.device, done.batches[-1].batch
        machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        if device.type == "cuda":
            machine.append(torch.cuda.get_device_name(device))
        is_flat = isinstance(batch, Mapping) and "document_lengths" in batch
        how = [torch.__version__, device.type, self._engine.precision_name, dist.num_processes(), is_flat]
        key = hashlib.sha256(json.dumps([sorted(count.items()), machine, how]).encode()).hexdigest()[:16]
        return Path(environment().cache_dir).expanduser() / "compiling" / f"{key}.json"

    def _known(self, done: StepDone) -> Estimate | None:
        """What earlier runs have measured; None where there is nothing, or nothing that can be read or is not too old."""
        try:
            path = self._file(done)
            if time.time() - path.stat().st_mtime > KEPT_S:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
            estimate = Estimate(float(found["seconds"]), float(found["gain"]))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: the user has no home folder
            return None
        is_sane = 0 <= estimate.seconds < math.inf and 0 < estimate.gain < math.inf
        return estimate if is_sane else None

    def _remember(self, measured: Estimate, done: StepDone) -> None:
        """Keep it for later runs; without a folder that can be written nothing is kept."""
        known = self._known(done) or measured
        seconds = max(known.seconds, measured.seconds)  # less where torch still had what it compiled before
        try:
            path = self._file(done)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                partial.write_text(json.dumps({"seconds": seconds, "gain": measured.gain}), encoding="utf-8")
        except (OSError, RuntimeError):
            return

    # What a checkpoint holds.

    def state_dict(self) -> dict[str, Any]:
        """Whether layers are compiled; before the decision, what was watched."""
        is_on = self._layers.is_on
        return {"is_on": is_on, "pace": [] if is_on or self._is_settled else list(self._pace)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on as saved, unless the configuration says something else; None: the checkpoint is of an earlier version."""
        if not self._is_automatic:
            return
        state = state or {"is_on": False, "pace": []}
        pace = []
        for step in state["pace"]:
            both = [step, step] if isinstance(step, float) else step  # of an earlier version: by the wall's clock alone
            pace.append(Pace(*both))
        self._begin(pace)
        self._layers.switch(state["is_on"])


def steps_left(horizon: Horizon, progress: Progress) -> int | None:
    """Optimizer steps that are still to come; None where nobody knows."""
    total = horizon.total()
    return None if total is None else max(total - progress.step, 0)


def _seconds(paces: Sequence[Pace], done: StepDone) -> float:
    """What a step as long as that one takes at the median pace, by the clock of the wall."""
    return median(pace.seconds for pace in paces) * max(done.tokens, 1)


def _lie_apart(ones: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the middle halves of both are disjoint. Else it may have been chance, or another program, that differed."""
    (low, _, high), (other_low, _, other_high) = quantiles(ones), quantiles(others)
    return high < other_low or other_high < low


def _outermost(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers that are in no other one."""
    inner: set[nn.Module] = set()
    for layer in layers:
        inner.update(module for module in layer.modules() if module is not layer)
    return [layer for layer in layers if layer not in inner]


def _time(seconds: float) -> str:
    """`95 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
