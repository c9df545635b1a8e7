"""GRPO on real handwritten digits: a model that has begun to see is rewarded for right answers, and told nothing else.

It begins as digits.py does, with three tasks on words and then a projector that learns for a few steps. Then everything learns
by GRPO which digit an image shows, with the exact match of one token as reward. The control learns in the same way from
prompts that show another image than the one that the answer is about: what it gains is not seen.

Each stage is a run of a configuration, as a YAML file holds it. `python tests/learning/digits_rewarded.py` rewrites the table
of docs/results.md; what a seed has finished lies in `--folder`.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from digits import SEEDS, Eyes, accuracy, config_of, file_of, folder_of, prepare, questions, split
from learning_table import write
from seeing import described, rows_file, train

from llm_trainer import GRPOTrainer
from llm_trainer.config.load import parse

MARKERS = "<!-- digits rewarded: begin -->", "<!-- digits rewarded: end -->"
BEGUN = 40  # steps of a projector that begins to learn
STEPS, LR, GROUP = 250, 3e-4, 8
PROMPTS = 32  # in a step, each "which digit is it"
LAST = 20  # steps whose mean reward is shown
# Prompts as they stood in the stages before: their text alone.
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
ROWS = {
    "begun": f"projector of {BEGUN} steps",
    "rewarded": f"then GRPO, {STEPS} steps",
    "rewarded, images shuffled": "the same, images shuffled",
    "control": "GRPO on the wrong images",
}


def prompts_file(folder: Path, seed: int, is_shuffled: bool) -> str:
    """Prompts about the images to train on, with the answers; the control shows other images."""
    asked = [question for question in questions(split(seed)[0], seed) if question.task == "which"]
    shown = [question.images for question in asked]
    if is_shuffled:
        random.Random(seed).shuffle(shown)
    rows = []
    for question, images in zip(asked, shown, strict=True):
        names = [file_of(number) for number in images]
        rows.append({"prompt": question.prompt(True), "images": names, "answer": question.answer})
    return rows_file(folder / f"prompts_{is_shuffled}.jsonl", rows)


def begun_of(folder: Path, seed: int) -> dict[str, Any]:
    """The configuration of the projector that begins to learn."""
    values = config_of("projector alone", folder, seed)
    values["run_config"]["max_steps"] = values["optim_config"]["cosine_annealing_period"] = BEGUN
    return values


def rewarded_of(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The configuration of GRPO, on the right images or in the control on others."""
    data = prompts_file(folder, seed, is_shuffled=name == "control")
    values = described(folder_of(folder, name), data, STEPS, LR, PROMPTS, seed)
    values["run_config"]["log_interval"] = 1
    section = {"group_size": GROUP, "gen_max_seq_len": 1, "rewards": ["exact_match"]}
    model = str(folder_of(folder, "projector alone") / "model")
    return values | {"model_config": model, "vocabulary_config": {"chat_template": PLAIN}, "grpo_config": section}


def rewards_of(run: Path) -> list[float]:
    """The mean reward of every step, as the log has it."""
    lines = (run / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values["reward"] for values in map(json.loads, lines) if "reward" in values]


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Accuracies, rewards and seconds of a seed; what is in `folder` is not run again."""
    folder = folder / str(seed)
    known = folder / "rewarded.json"
    found: dict[str, Any] = {}
    if known.exists():
        found = json.loads(known.read_text())
    if "begun" not in found:
        prepare(folder, seed)
        train(config_of("words", folder, seed), "words")
        train(begun_of(folder, seed), "begun")
        found["begun"] = accuracy(Eyes.of(folder_of(folder, "projector alone")), seed, True)
        known.write_text(json.dumps(found))
    for name in ("rewarded", "control"):
        if name in found:
            continue
        values = rewarded_of(name, folder, seed)
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            GRPOTrainer(train_config=parse(values, name)).train()
        found[f"{name}: seconds"] = time.perf_counter() - started
        run_folder = folder_of(folder, name)
        eyes, rewards = Eyes.of(run_folder), rewards_of(run_folder)
        found[name] = accuracy(eyes, seed, True)
        found[f"{name}: rewards"] = [statistics.mean(rewards[:LAST]), statistics.mean(rewards[-LAST:])]
        if name == "rewarded":
            found["rewarded, images shuffled"] = accuracy(eyes, seed, True, "images shuffled")
        known.write_text(json.dumps(found))
    return found


def lines(outcomes: list[dict[str, Any]]) -> list[str]:
    """The table: medians over the seeds, with lowest and highest."""
    head = ["", "which", f"mean reward of the first and last {LAST} steps", "time"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, said in ROWS.items():
        values = [outcome[name][0] for outcome in outcomes]
        cells = [said, f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"]
        rewards, seconds = "", ""
        if f"{name}: rewards" in outcomes[0]:
            of_seeds = zip(*(outcome[f"{name}: rewards"] for outcome in outcomes), strict=True)
            rewards = " -> ".join(f"{statistics.median(values):.2f}" for values in of_seeds)
            seconds = f"{statistics.median(outcome[f'{name}: seconds'] for outcome in outcomes):.0f} s"
        table.append("| " + " | ".join([*cells, rewards, seconds]) + " |")
    return table


def main() -> None:
    """Run what is missing, and rewrite the table once all seeds are there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits_rewarded"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = [run(seed, given.folder) for seed in given.seeds]
    table = lines(outcomes)
    print("\n".join(table))
    if tuple(given.seeds) == SEEDS:
        write(table, MARKERS)


if __name__ == "__main__":
    main()
