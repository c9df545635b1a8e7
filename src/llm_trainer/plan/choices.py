"""All ways to train a job on a cluster, and which of them to take."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from llm_trainer.plan.memory import DDP, FSDP2, ONE, STRATEGIES, Memory, Step, Strategy, peak
from llm_trainer.plan.shapes import Job, Shape
from llm_trainer.plan.speed import Cluster, Speed, estimate

# Of a device's memory that is left to the driver, NCCL, kernels' workspaces and fragmentation.
RESERVE = 0.1
# How the run finds the tokens of its micro-batches: (what so many take in bytes, bytes that are free for that) -> tokens, why.
Finding = Callable[[Callable[[int], float], float], tuple[int, str]]
# Estimates of time are not more precise than this: among ways so close to each other the simpler one wins.
CLOSE = 0.1
# From the simplest to operate to the least simple; among equals less recomputation wins first.
SIMPLE_FIRST = [s.name for s in (ONE, DDP, FSDP2)] + [s.name for s in STRATEGIES if s.is_zero]
MOST_ROWS = 2**14


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        strategy, checkpointing, chunked: the way; whole logits (not chunked) are what a plain loop would hold.
        memory: of the micro-batch that the run configures or, where it leaves that open, will find.
        largest_rows: rows of the largest micro-batch that fits; 0: not even one does.
        micro_rows, accumulation: the same rows per step in the fewest micro-batches that fit, or in those that it will find.
        speed: with these; None where nothing fits.
        micro_tokens: positions of the micro-batch that `memory` is of.
        why_tokens: the reason, where the run finds it.
    """

    strategy: Strategy
    checkpointing: bool
    chunked: bool
    memory: Memory
    largest_rows: int
    micro_rows: int
    accumulation: int
    speed: Speed | None
    micro_tokens: int
    why_tokens: str

    @property
    def name(self) -> str:
        """For sentences."""
        return self.strategy.name + (" with activation checkpointing" if self.checkpointing else "")


def usable(cluster: Cluster) -> float:
    """Bytes of a device that a plan may fill."""
    return cluster.gpu.memory * (1 - RESERVE)


def choices(shape: Shape, job: Job, cluster: Cluster, micro_tokens: int | Finding, share: float) -> list[Choice]:
    """Every strategy with and without checkpointing, with a chunked head and with whole logits.

    Args:
        shape: the model.
        job: the work of a step.
        cluster: the devices.
        micro_tokens: positions of the micro-batch that the run configures, or how it finds them.
        share: of the peak that products reach while nothing waits.
    """
    strategies = (ONE,) if cluster.devices == 1 else STRATEGIES
    heads = (True, False) if job.has_head else (True,)
    found = []
    for strategy, checkpointing, chunked in product(strategies, (False, True), heads):
        if strategy is FSDP2 and job.precision == "fp16":
            continue  # fp16 needs a loss scale, which FSDP2 does not have
        step = Step(0, checkpointing, chunked)
        found.append(_choice(shape, job, cluster, strategy, step, micro_tokens, share))
    return found


def _choice(
    shape: Shape, job: Job, cluster: Cluster, strategy: Strategy, given: Step, micro_tokens: int | Finding, share: float
) -> Choice:
    def needs(tokens: int, accumulates: bool) -> Memory:
        patches = tokens / job.sample_tokens * job.patches
        step = Step(tokens, given.checkpointing, given.chunked, accumulates, patches=patches)
        return peak(shape, job, strategy, cluster.devices, step)

    def fits(rows: int) -> bool:
        return needs(rows * job.sample_tokens, accumulates=rows < job.rows).total <= usable(cluster)

    # 1. the micro-batches of a step
    step_tokens = job.rows * job.sample_tokens
    largest = _largest(fits)
    if isinstance(micro_tokens, int):
        tokens, why = micro_tokens, ""
        micro_rows = next((rows for rows in range(min(largest, job.rows), 0, -1) if job.rows % rows == 0), 1)
    else:
        fixed = needs(0, True).total
        # A budget counts patches too: of so much there are fewer positions.
        positions = job.sample_tokens / job.sample_cost
        budget, why = micro_tokens(lambda n: needs(round(n * positions), True).total - fixed, usable(cluster) - fixed)
        tokens = max(min(round(budget * positions), step_tokens), job.sample_tokens)  # a row is not cut
        micro_rows = tokens // job.sample_tokens

    # 2. the time that they take
    speed = None
    if largest:
        speed = estimate(
            shape, job, strategy, cluster, checkpointing=given.checkpointing, micro_rows=micro_rows, share=share
        )
    return Choice(
        strategy,
        given.checkpointing,
        given.chunked,
        memory=needs(tokens, accumulates=tokens < step_tokens),
        largest_rows=largest,
        micro_rows=micro_rows,
        accumulation=-(-job.rows // micro_rows),
        speed=speed,
        micro_tokens=tokens,
        why_tokens=why,
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number of rows up to `MOST_ROWS` that fits, by bisection; 0: none."""
    low, high = 0, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def recommend(shape: Shape, job: Job, cluster: Cluster, found: Sequence[Choice]) -> tuple[Choice | None, str]:
    """The choice to take, and why; None when nothing fits, and what would."""
    running = {choice: choice.speed for choice in found if choice.chunked and choice.speed is not None}
    if not running:
        return None, _what_would_fit(shape, job, cluster)
    best = max(speed.tokens_per_second for speed in running.values())
    close = [choice for choice, speed in running.items() if speed.tokens_per_second >= (1 - CLOSE) * best]
    chosen = min(close, key=lambda choice: (choice.checkpointing, SIMPLE_FIRST.index(choice.strategy.name)))
    reasons = ", and ".join(_reasons(job, cluster, found, chosen, running[chosen], best))
    return chosen, f"{chosen.name}, because {reasons}"


def _reasons(
    job: Job, cluster: Cluster, found: Sequence[Choice], chosen: Choice, speed: Speed, best: float
) -> Iterator[str]:
    plain = next(choice for choice in found if choice.chunked and not choice.checkpointing)
    if plain is not chosen and not plain.largest_rows:
        yield f"{plain.name} does not fit into {usable(cluster) / 1e9:.0f} GB"
    faster = best / speed.tokens_per_second - 1
    yield "it is the fastest that fits" if faster <= 0 else f"it is within {CLOSE:.0%} of the fastest and simpler"
    waits = speed.exposed_s / speed.step_s
    if cluster.devices > 1:
        yield "computing hides its communication" if waits < 0.05 else f"the network takes {waits:.0%} of a step"


def _what_would_fit(shape: Shape, job: Job, cluster: Cluster) -> str:
    step = Step(job.sample_tokens, checkpointing=True, patches=job.patches)
    leanest = ONE if cluster.devices == 1 else FSDP2
    needed = peak(shape, job, leanest, cluster.devices, step).total
    message = (
        f"nothing fits: {leanest.name} with activation checkpointing and one row of {job.row_tokens:,} tokens needs "
        f"{needed / 1e9:.0f} GB of {usable(cluster) / 1e9:.0f}"
    )
    more = (2**k for k in range(1, 14) if 2**k > cluster.devices)
    enough = next((n for n in more if peak(shape, job, FSDP2, n, step).total <= usable(cluster)), None)
    if enough is None:
        return f"{message}; more of these GPUs do not help: shorten dataset_block_size, or take GPUs with more memory"
    return f"{message}; FSDP2 on {enough} of these GPUs would fit"
