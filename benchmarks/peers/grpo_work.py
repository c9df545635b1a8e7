"""What every runner of `rl_step.py` trains on and how it is timed: prompts, reward, tokenizer, clocks.

It imports no llm_trainer: it runs inside the peers' environments too.
"""

import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timed import Timed

VOCABULARY = 6400
PAD = 0
NEVER = VOCABULARY  # an id that ends a completion and that the model does not have
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
CLIP = 0.2
PARTS = ("generate", "reward", "score", "learn", "sync", "checks", "rest")  # checks: stores, ledger and hashes too


class Case(NamedTuple):
    """What is sampled in a step.

    Attributes:
        prompts: of a step.
        group: completions of each.
        length: tokens of a prompt.
        new: most tokens of a completion.
        stops: ids that end one.
    """

    prompts: int
    group: int
    length: int
    new: int
    stops: Sequence[int] = ()


CASES = {
    "fixed": Case(8, 4, 64, 128),
    "varying": Case(8, 4, 64, 256, range(100, 200)),  # about one token in 64 is one of these
    "long": Case(4, 8, 512, 64),
}


@dataclass(frozen=True)
class Job(Timed):
    """A run that samples; its case is one of `CASES`.

    Attributes:
        given: completions are not sampled but random ones, the same in all peers.
    """

    given: bool = False

    @property
    def shape(self) -> Case:
        return CASES[self.case]

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.shape.prompts * self.shape.group

    def prompts(self) -> list[list[int]]:
        """Ids of the prompts of all steps, and of one more."""
        count = self.shape.prompts * (self.warmup + self.steps + 1)
        return _random_ids(1, count, self.shape.length)

    def completions(self) -> list[list[int]]:
        """What is given in place of sampling in every step."""
        return _random_ids(2, self.rows, self.shape.new)

    def tokenizer(self) -> Any:
        """One word for every id, so that texts and ids say the same."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {f"w{number}": number for number in range(VOCABULARY)} | {"</s>": NEVER}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=f"w{PAD}", eos_token="</s>")


def _random_ids(seed: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count, length), generator=generator).tolist()


def text_of(ids: Sequence[int]) -> str:
    """The words of ids."""
    return " ".join(f"w{number}" for number in ids)


def share_even(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward: the share of words with even numbers; completions are texts or ids."""
    rewards = []
    for completion in completions:
        numbers = completion
        if isinstance(completion, str):
            numbers = [int(word[1:]) for word in completion.split()]
        rewards.append(sum(number % 2 == 0 for number in numbers) / max(1, len(numbers)))
    return rewards


@dataclass
class Clock:
    """Where the time goes: of the part that was entered last, by the wall clock and by processor time.

    Attributes:
        job: what is timed.
        ticks: after each step, what the parts have taken so far and how many tokens were sampled.
    """

    job: Job
    ticks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._taken = {part: [0.0, 0.0] for part in PARTS}
        self._inside = ["rest"]
        self._last = self._now()
        self.sampled = 0

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _count(self) -> None:
        now = self._now()
        taken = self._taken[self._inside[-1]]
        for place in range(2):
            taken[place] += now[place] - self._last[place]
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as that part, but for other parts inside of it."""
        self._count()
        self._inside.append(name)
        try:
            yield
        finally:
            self._count()
            self._inside.pop()

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Count the calls of a method, of an object or of a class."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)

    def watch_sampling(self, owner: Any, method: str, count: Callable[[Any], int]) -> None:
        """The same of what samples; `count` says how many tokens it gave."""
        plain = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part("generate"):
                found = plain(*args, **kwargs)
            self.sampled += count(found)
            return found

        setattr(owner, method, timed)

    def tick(self) -> None:
        """A step is done."""
        self._count()
        parts = {part: tuple(taken) for part, taken in self._taken.items()}
        self.ticks.append({"parts": parts, "sampled": self.sampled})

    @property
    def is_done(self) -> bool:
        """Whether all steps that are timed are done."""
        return len(self.ticks) == self.job.warmup + self.job.steps

    def report(self, logged: Sequence[dict[str, Any]]) -> None:
        """Print the one JSON line that the driver reads; `logged`: of each step `reward` and `grad_norm`, if they are known."""
        first, last = self.ticks[self.job.warmup - 1], self.ticks[self.job.warmup + self.job.steps - 1]
        parts = {}
        for part in PARTS:
            before, after = first["parts"][part], last["parts"][part]
            parts[part] = [(b - a) / self.job.steps for a, b in zip(before, after, strict=True)]
        line = {
            "peer": self.job.peer,
            "case": self.job.case,
            "precision": self.job.precision,
            "given": self.job.given,
            "parts": parts,
            "sampled": (last["sampled"] - first["sampled"]) / self.job.steps,
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts KiB
            "logged": [{name: row.get(name) for name in ("reward", "grad_norm")} for row in logged[:3]],
        }
        print(json.dumps(line), flush=True)
