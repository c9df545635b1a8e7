"""A whole step of GRPO against TRL's `GRPOTrainer`: the same weights, prompts, groups, lengths and reward, in alternating runs.

`python benchmarks/rl_step.py` runs every peer once per round, each in a process of its own, and prints where the time of a
step goes, peak memory, and ratios within a round. Three cases:

    fixed     8 prompts x 4 completions, 64 + 128 tokens
    varying   8 prompts x 4 completions, 64 + at most 256 tokens; about one token in 64 ends a completion
    long      4 prompts x 8 completions, 512 + 64 tokens

`--given` has all of them learn from the same random completions instead: equal rewards and gradient norms show that they
learn the same thing. The environment and the weights are those of `train_throughput.py`.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from train_throughput import (
    BENCH,
    RUNNERS,
    add_machine_options,
    environment_of,
    prepare_work,
    print_goal,
    printed_or_none,
    python_of,
    spread,
)

sys.path.insert(0, str(RUNNERS))
from grpo_work import CASES, PARTS

PEERS = {"ours": ("our_grpo.py", ""), "trl": ("trl_grpo.py", "trl"), "trl-bf16": ("trl_grpo.py", "trl")}
GOALS = {"fixed": 2.0, "varying": 3.0, "long": 4.0}  # of a whole step against trl
MOST_CHECKS = 0.03  # of a step: stores, ledger, hashes, the probe
Runs = dict[tuple[str, int], dict[str, Any]]  # (peer, round) -> what its runner printed
CLOCKS = ("seconds", "cpu_seconds")  # in the order of each part's numbers


def run_job(peer: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any] | None:
    """One timed run in a fresh process; None when it fails."""
    script, where = PEERS[peer]
    command = [python_of(where), str(RUNNERS / script), json.dumps(job)]
    return printed_or_none(peer, command, environment, BENCH / "work")


def seconds(run: dict[str, Any], clock: str, part: str | None = None) -> float:
    """Of a step, or of a part of it."""
    place = CLOCKS.index(clock)
    return sum(taken[place] for name, taken in run["parts"].items() if part in (None, name))


def ratios(runs: Runs, baseline: str, clock: str) -> list[float]:
    """How much faster a step of ours is, round by round, for as many sampled tokens."""
    found = []
    for peer, number in sorted(runs):
        if peer == baseline and ("ours", number) in runs:
            ours, theirs = runs["ours", number], runs[baseline, number]
            per_token = seconds(theirs, clock) / max(1, theirs["sampled"])
            found.append(per_token / (seconds(ours, clock) / max(1, ours["sampled"])))
    return found


def print_table(case: str, precision: str, runs: Runs, clock: str) -> None:
    """One case at one precision, and its goals."""
    peers = [peer for peer in PEERS if any(name == peer for name, _ in runs)]
    print(f"\n### {case}, {precision} ({clock} of a step)\n")
    heads = ["peer", "step", *PARTS, "tokens", "peak GiB", "ours is faster by"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for peer in peers:
        mine = [run for (name, _), run in runs.items() if name == peer]
        cells = [peer, spread([seconds(run, clock) for run in mine], 1)]
        cells += [f"{statistics.median(seconds(run, clock, part) for run in mine):.2f}" for part in PARTS]
        cells.append(f"{statistics.median(run['sampled'] for run in mine):.0f}")
        cells.append(f"{max(run['peak_rss'] for run in mine) / 2**30:.2f}")
        pairs = [] if peer == "ours" else ratios(runs, peer, clock)
        cells.append(spread(pairs, 2) if pairs else "")
        print("| " + " | ".join(cells) + " |")
    print()
    own = [run for (name, _), run in runs.items() if name == "ours"]
    theirs = [run for (name, _), run in runs.items() if name == "trl"]
    if own:
        shares = [seconds(run, clock, "checks") / seconds(run, clock) for run in own]
        print_goal("share of stores, ledger and checks", statistics.median(shares), MOST_CHECKS, at_most=True)
    if own and theirs:
        print_goal(f"{case} {precision}, a step", statistics.median(ratios(runs, "trl", clock)), GOALS[case])
        peaks = [max(run["peak_rss"] for run in found) / 2**30 for found in (own, theirs)]
        print_goal("peak GiB", peaks[0], peaks[1], at_most=True)


def print_learned(case: str, precision: str, runs: Runs) -> None:
    """Rewards and gradient norms of the first steps on given completions."""
    print(f"\n### {case}, {precision}: what is learned from the same completions\n")
    print("| peer | reward | gradient norms |\n|---|---|---|")
    for (peer, number), run in runs.items():
        if number == 0:
            rewards = " ".join(f"{row['reward']:.6f}" for row in run["logged"])
            norms = " ".join(f"{row['grad_norm']:.5f}" for row in run["logged"])
            print(f"| {peer} | {rewards} | {norms} |")


def _names(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default=list(CASES), type=_names)
    parser.add_argument("--peers", default=["ours", "trl"], help=f"of {', '.join(PEERS)}", type=_names)
    parser.add_argument("--precisions", default=["bf16", "fp32"], type=_names)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="that are timed in a run")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--given", action="store_true", help="learn from the same random completions")
    add_machine_options(parser)
    parser.add_argument("--results", type=Path, default=BENCH / "rl_step.jsonl", help="every run is appended here")
    options = parser.parse_args()
    for name, known in (("cases", set(CASES)), ("peers", set(PEERS))):
        if unknown := set(getattr(options, name)) - known:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; known: {', '.join(sorted(known))}")
    return options


def main() -> None:
    """Run what the command line asks for."""
    options = arguments()
    work = prepare_work()
    tables: dict[tuple[str, str], Runs] = defaultdict(dict)
    for precision in options.precisions:
        for case in options.cases:
            peers = [peer for peer in options.peers if peer != "trl-bf16" or precision == "bf16"]
            for number in range(options.rounds):
                for peer in peers if number % 2 == 0 else reversed(peers):  # nobody is always first
                    job = {"peer": peer, "case": case, "precision": precision, "folder": str(work)}
                    job |= {"warmup": options.warmup, "steps": options.steps, "given": options.given}
                    run = run_job(peer, job, environment_of(options))
                    if run is not None:
                        tables[case, precision][peer, number] = run
                        taken = seconds(run, options.clock)
                        print(f"round {number + 1} {case} {precision} {peer}: {taken:.1f} s a step", flush=True)
                        with options.results.open("a", encoding="utf-8") as file:
                            file.write(json.dumps({**run, "round": number}) + "\n")
            if options.given:
                print_learned(case, precision, tables[case, precision])
            else:
                print_table(case, precision, tables[case, precision], options.clock)


if __name__ == "__main__":
    main()
