"""`RewardFunctions`: several reward functions with their weights, called in processes of their own, within limits."""

import math
import pickle
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.calling import Judged, answer_call, arguments, call_function
from llm_trainer.rewards.identity import code_hash
from llm_trainer.rewards.returned import Returned, returned_of
from llm_trainer.rewards.workers import Worker, answers, held_memory, in_memory, what_runs, why_no_workers

RECENT = 100  # completions, at least, that the share of failures is taken of
FEW = 8  # failures that are no reason to stop yet
MUCH_MEMORY = 2_000_000_000  # bytes of the trainer that a fork keeps as they were
Function = Callable[..., Any]


class RewardError(RuntimeError):
    """Too large a share of the rewards is missing; the message says why, by function."""


@dataclass(frozen=True)
class Rewards:
    """What `n` completions are worth to `F` functions.

    Attributes:
        names: Of the functions.
        values: `[n, F]`; NaN where a value is missing, or a function does not apply.
        errors: Of each completion: what went wrong, by function. Empty where all values are there or do not apply.
        cause_of: Of each completion: the cause of each error (`returned.CAUSES`), by function.
        tokens: By function that judges tokens: the numbers of each completion, NaN at tokens that it does not judge; None
            where it does not apply, or gave one number.
        seconds: That each function took.
    """

    names: tuple[str, ...]
    values: np.ndarray
    errors: list[dict[str, str]]
    cause_of: list[dict[str, str]]
    tokens: dict[str, list[np.ndarray | None]]
    seconds: dict[str, float]

    @property
    def causes(self) -> dict[str, int]:
        """How many values are missing, by cause."""
        return dict(Counter(chain.from_iterable(causes.values() for causes in self.cause_of)))


class RewardFunctions:
    """Reward functions, called together.

    A function is `f(prompts, completions, answers, **columns) -> list of n numbers`; it may be async, return None for a
    completion that it does not apply to, and a list of numbers, one (or None) per token, in place of a number. It gets those
    columns of the data that its signature takes. It runs in a process of its own, which was forked when this object was
    made: make it before models, threads and devices where you can (`notes` says what ran already). What fails is missing,
    never 0.

    Args:
        functions: one, several, or several by name. Names must differ; those of the functions are made to.
        weights: of each, in their order or by name; None: 1.
        seconds: that a call may take; a function with an attribute `seconds_for`, such as `code`, says it itself, given the
            number of completions.
        memory_gb: memory that a function may take beyond what the process has that it is forked from; None: no limit.
        in_process: functions that are called in this process, without limits, such as those that need the GPU: True for all,
            or their names. So are functions with a true attribute `in_process`.
        max_failed: the run stops above this share of missing values of a function, over its latest calls.
        say: called with what the functions print.

    Attributes:
        names: of the functions.
        codes: hash of the code of each, by name; '' where there is none to be read.
        weights: `[F]`.
        notes: what the user should know at the start.

    Raises:
        ConfigError: names, weights or functions do not fit together.
    """

    def __init__(
        self,
        functions: Function | Sequence[Function] | Mapping[str, Function],
        weights: Sequence[float] | Mapping[str, float] | None = None,
        *,
        seconds: float = 60.0,
        memory_gb: float | None = 4.0,
        in_process: bool | Collection[str] = False,
        max_failed: float = 0.5,
        say: Callable[[str], None] = print,
    ) -> None:
        self._functions = _named(functions)
        self.names = tuple(self._functions)
        self.codes = {name: code_hash(function) for name, function in self._functions.items()}
        self.weights = _weights(weights, self.names)
        self.seconds, self.max_failed, self.say = seconds, max_failed, say
        self.notes: list[str] = []
        self._memory = None if memory_gb is None else int(memory_gb * 1e9)
        self._recent: dict[str, deque[tuple[int, Returned]]] = {name: deque() for name in self.names}
        for function in self._functions.values():
            self.notes += getattr(function, "notes", ())
        here = self._run_here(in_process)
        self._workers = self._start([name for name in self.names if name not in here])

    @property
    def called_here(self) -> tuple[str, ...]:
        """Names of the functions that are called in this process, not in one of their own."""
        return tuple(name for name in self.names if name not in self._workers)

    def _run_here(self, in_process: bool | Collection[str]) -> set[str]:
        """Names of the functions that are called in this process."""
        if isinstance(in_process, bool):
            wanted = set(self.names) if in_process else set()
        else:
            wanted = set(in_process)
            unknown = wanted - set(self.names)
            if unknown:
                raise ConfigError(
                    f"in_process: got {', '.join(sorted(unknown))}, expected names of reward functions: {', '.join(self.names)}"
                )
        return wanted | {name for name, function in self._functions.items() if getattr(function, "in_process", False)}

    def _start(self, names: Sequence[str]) -> dict[str, Worker]:
        """Fork the processes; where that cannot be done safely, functions are called in this process instead."""
        reason = why_no_workers()
        if reason and names:
            self._note_no_limits(names, reason)
            return {}
        running = what_runs()
        workers = {}
        for name in names:
            workers[name] = Worker(name, partial(answer_call, name, self._functions[name]), self._memory)
        for name in names:
            if not workers[name].is_ready():
                workers.pop(name).close()
                self._note_no_limits(
                    [name], f"a fork of this process, where {running or 'another thread'} runs, does not answer"
                )
        if workers and held_memory() > MUCH_MEMORY:
            self.notes.append(
                f"the processes of reward functions keep {held_memory() / 1e9:.1f} GB of this one as it is now, which is more "
                f"to hold when it changes, as weights on a CPU do. RewardFunctions made before the model avoids it"
            )
        if running and workers:
            self.notes.append(
                f"the processes of reward functions were forked while {running} ran here; they were tried out and answer. A "
                f"function that hangs at a lock is ended at its limit. RewardFunctions made before the model avoids it"
            )
        return workers

    def _note_no_limits(self, names: Sequence[str], reason: str) -> None:
        self.notes.append(
            f"reward functions {', '.join(names)} run in the process that trains, without limits of time and memory: {reason}"
        )

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str | None],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Rewards:
        """Judge `n` completions.

        Args:
            prompts: `n` texts.
            completions: `n` texts.
            answers: the reference answer of each, or None.
            columns: what else the data says of each, by name.
            lengths: tokens of each completion, for functions that judge every token.
            stop: asked several times a second.

        Raises:
            ConfigError: a function takes a column that the data does not have.
            RewardError: too many values are missing.
            Interrupted: `stop` said so.
        """
        judged = Judged(list(prompts), list(completions), list(answers), dict(columns or {}), lengths)
        count = len(judged.completions)
        assert len(judged.prompts) == count and len(judged.answers) == count
        for name, function in self._functions.items():
            arguments(name, function, judged)  # what does not fit is the user's mistake, not a value that is missing
        returned = self._call(judged, stop) if count else {}
        for name, said in returned.items():
            if said.output.strip():
                self.say(f"reward function {name!r} printed: {said.output.rstrip()}")
        self._watch(returned, count)
        return self._together(returned, count)

    def _call(self, judged: Judged, stop: Callable[[], bool]) -> dict[str, Returned]:
        """What every function returns; those with processes of their own run at the same time."""
        found: dict[str, Returned] = {}
        count = len(judged.completions)
        data = pickle.dumps(judged, pickle.HIGHEST_PROTOCOL) if self._workers else b""
        with ExitStack() as stack:
            request = stack.enter_context(in_memory(data)) if self._workers else -1
            for name, worker in self._workers.items():
                worker.begin(request, len(data), self._seconds(name, count))
            for name, function in self._functions.items():
                if name not in self._workers:
                    found[name] = call_function(name, function, judged)
            by_worker = answers(list(self._workers.values()), stop)
        for worker, answer in by_worker.items():
            found[worker.name] = returned_of(worker.name, answer, count)
        return {name: found[name] for name in self.names}

    def _seconds(self, name: str, count: int) -> float:
        own: Callable[[int], float] | None = getattr(self._functions[name], "seconds_for", None)
        return self.seconds if own is None else own(count)

    def _watch(self, returned: Mapping[str, Returned], count: int) -> None:
        """Stop where more than `max_failed` of a function's latest values are missing."""
        for name, said in returned.items():
            recent = self._recent[name]
            recent.append((count, said))
            while sum(rows for rows, _ in recent) - recent[0][0] >= RECENT:
                recent.popleft()
            rows = sum(rows for rows, _ in recent)
            failed = sum(len(said.errors) for _, said in recent)
            if failed > max(FEW - 1, self.max_failed * rows):
                raise RewardError(_too_many(name, [said for _, said in recent], failed, rows, self.max_failed))

    def _together(self, returned: Mapping[str, Returned], count: int) -> Rewards:
        values = np.full((count, len(self.names)), math.nan)
        errors: list[dict[str, str]] = [{} for _ in range(count)]
        cause_of: list[dict[str, str]] = [{} for _ in range(count)]
        tokens: dict[str, list[np.ndarray | None]] = {}
        for number, (name, said) in enumerate(returned.items()):
            values[:, number] = said.values
            for row, (cause, message) in said.errors.items():
                errors[row][name] = message
                cause_of[row][name] = cause
            if said.tokens:
                of_rows: list[np.ndarray | None] = [None] * count
                for row, numbers in said.tokens.items():
                    of_rows[row] = np.array(numbers, dtype=np.float64)
                tokens[name] = of_rows
        seconds = {name: said.seconds for name, said in returned.items()}
        return Rewards(self.names, values, errors, cause_of, tokens, seconds)

    def close(self) -> None:
        """End the processes; they also end with this process, however that ends."""
        for worker in self._workers.values():
            worker.close()


def _named(functions: Function | Sequence[Function] | Mapping[str, Function]) -> dict[str, Function]:
    """Functions by name; equal names get a number."""
    if isinstance(functions, Mapping):
        found = dict(functions)
    else:
        if callable(functions) or isinstance(functions, str) or not isinstance(functions, Iterable):
            functions = [functions]
        several, found = list(functions), {}
        for function in several:
            name = first = _name_of(function)
            while name in found:
                name = f"{first}_{len(found) + 1}"
            found[name] = function
    for name, function in found.items():
        if isinstance(function, str):
            raise ConfigError(
                f"reward function: got the name {function!r}, expected a function f(prompts, completions, answers); a name "
                f"belongs in the option rewards: [{function}]"
            )
        if not callable(function):
            raise ConfigError(
                f"reward function {name}: got a {type(function).__name__}, expected a function f(prompts, completions, answers)"
            )
    if not found:
        raise ConfigError(
            "got no reward function, expected at least one: f(prompts, completions, answers) -> list of numbers"
        )
    return found


def _name_of(function: Any) -> str:
    if isinstance(function, partial):
        return _name_of(function.func)
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else name


def _weights(weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]) -> np.ndarray:
    if weights is None:
        return np.ones(len(names))
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ConfigError(
                f"reward weights: got {', '.join(unknown)}, expected names of functions: {', '.join(names)}"
            )
        weights = [weights.get(name, 1.0) for name in names]
    if len(weights) != len(names):
        raise ConfigError(
            f"got {len(weights)} reward weights for {len(names)} functions ({', '.join(names)}), expected one each"
        )
    table = np.array(weights, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ConfigError(f"reward weights: got {list(weights)} for {', '.join(names)}, expected finite numbers")
    return table


def _too_many(name: str, recent: Sequence[Returned], failed: int, rows: int, most: float) -> str:
    """The message for a run that stops: how many, of which causes, and an example of each."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for said in recent:
        for cause, message in said.errors.values():
            counts[cause] += 1
            examples.setdefault(cause, message)
    causes = "; ".join(f"{count} x {cause}: {examples[cause]}" for cause, count in counts.most_common())
    return (
        f"{failed} of the last {rows} rewards of {name!r} are missing, more than the share of {most:g} that max_failed_rewards "
        f"(max_failed of RewardFunctions) allows. {causes}. Mend the function, or what it asks, or raise the share"
    )
