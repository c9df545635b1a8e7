"""Real handwritten digits instead of words: a small language model that knows three tasks on words is given eyes.

The 1,797 images of scikit-learn's `load_digits` (8 x 8 pixels, 360 of them held out) are inside that package. The tasks: which
digit is it, what is the sum of two, is it even. First a language model learns them on words; then images stand where the words
stood, and first the projector alone learns, then the tower too, then everything. The controls show the right model the wrong
images, or blank ones: what it still knows then it does not know from images.

Each stage is a run of a configuration, as a YAML file holds it, that begins from the folder of the one before.
`python tests/learning/digits.py` rewrites the table of docs/results.md. What a seed has finished lies in `--folder`, so that a
run that was stopped goes on.
"""

import argparse
import json
import random
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_trainer.data.encode.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from learning_table import write
from seeing import Eyes, described, percent, rows_file, train, trainer_of

MARKERS = "<!-- digits: begin -->", "<!-- digits: end -->"
SEEDS = (0, 1, 2)
HELD_OUT = 360
TASKS = ("which", "sum", "even")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, PATCH = 8, 4
ROWS = 32  # of each task in a step
TURNS = 4  # times that each image stands in the rows of each task, in a sum beside other ones
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


class Stage(NamedTuple):
    """A part of the training.

    Attributes:
        before: the stage whose folder it begins from; '': none.
        how: what its configuration says beside the model and the data.
        goals: least held-out accuracy in each task, in percent.
    """

    steps: int
    lr: float
    before: str
    how: dict[str, Any]
    goals: tuple[float, float, float]


STAGES = {
    "words": Stage(400, 3e-3, "", {"sft_config": {}}, (99, 99, 99)),
    "projector alone": Stage(700, 3e-3, "words", {"sft_config": {"freeze_llm_model": True}}, (35, 0, 0)),
    "language model frozen": Stage(
        1300, 1e-3, "projector alone", {"sft_config": {}, "freeze": ["language"]}, (75, 40, 95)
    ),
    "everything": Stage(300, 5e-4, "language model frozen", {"sft_config": {}}, (95, 85, 97)),
}
CONTROLS = {"images shuffled": (15, 15, 58), "images blank": (15, 15, 58)}  # most


class Question(NamedTuple):
    """A question about one or two digits, in words and in images."""

    task: str
    digits: tuple[int, ...]  # what is shown
    images: tuple[int, ...]  # numbers of images that show them

    def prompt(self, shows_images: bool) -> str:
        """As a text, in which words or images stand for the digits."""
        shown = ["<image>" if shows_images else f" {WORDS[digit]}" for digit in self.digits]
        return f"Say{' and'.join(shown)} {self.task}"

    @property
    def answer(self) -> str:
        """One token."""
        if self.task == "even":
            return "no" if self.digits[0] % 2 else "yes"
        return str(sum(self.digits))

    def row(self, shows_images: bool) -> dict[str, Any]:
        """As data files have it."""
        row: dict[str, Any] = {"prompt": self.prompt(shows_images), "completion": f" {self.answer}"}
        return row | {"images": [file_of(number) for number in self.images]} if shows_images else row


def file_of(number: int) -> str:
    """The name of an image."""
    return f"images/{number}.png"


@cache
def digits() -> tuple[list[Any], list[int]]:
    """Images of 8 x 8 pixels, grey, and what they show."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    shades = np.round(found.images * 255 / 16).astype(np.uint8)  # 0 to 16 in the package
    return [Image.fromarray(one) for one in shades], found.target.tolist()


def split(seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on (1,437), and of the held-out ones (360)."""
    numbers = torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def questions(numbers: list[int], seed: int, turns: int = 1) -> list[Question]:
    """Each task about each image, `turns` times; in a sum beside another image, drawn anew each time."""
    draw = random.Random(seed)
    targets = digits()[1]
    found = []
    for _ in range(turns):
        others = draw.sample(numbers, len(numbers))
        for number, other in zip(numbers, others, strict=True):
            for task in TASKS:
                images = (number, other) if task == "sum" else (number,)
                found.append(Question(task, tuple(targets[one] for one in images), images))
    return found


def prepare(folder: Path, seed: int) -> None:
    """The images, the rows and the tokenizer of a seed."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(digits()[0]):
        image.save(folder / file_of(number))
    asked = questions(split(seed)[0], seed, TURNS)
    for name, shows_images in (("words", False), ("images", True)):
        rows_file(folder / f"{name}.jsonl", [question.row(shows_images) for question in asked])
    texts = [question.prompt(False) + f" {question.answer}" for question in asked]
    train_tokenizer(texts, 420).save_pretrained(folder / "tokenizer")


def folder_of(folder: Path, name: str) -> Path:
    """Of the run of a stage."""
    return folder / name.replace(" ", "_")


def config_of(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The configuration of a stage, as YAML has it."""
    stage = STAGES[name]
    shows_images = name != "words"
    model: Any = LANGUAGE
    if stage.before == "words":
        model = {"language_path": str(folder_of(folder, "words") / "model"), "vision": VISION}
    elif stage.before:
        model = str(folder_of(folder, stage.before) / "model")
    tokenizer = str(folder / "tokenizer") if stage.before in ("", "words") else None
    data = str(folder / ("images.jsonl" if shows_images else "words.jsonl"))
    common = described(folder_of(folder, name), data, stage.steps, stage.lr, ROWS * len(TASKS), seed)
    return common | stage.how | {"model_config": model, "tokenizer": tokenizer}


def accuracy(eyes: Eyes, seed: int, shows_images: bool, control: str = "") -> list[float]:
    """Percent of the held-out questions that are answered rightly, by task."""
    draw = random.Random(seed)
    pictures = [image.convert("RGB") for image in digits()[0]]
    asked = questions(split(seed)[1], seed)
    found = []
    for task in TASKS:
        of_task = [question for question in asked if question.task == task]
        shown = None
        if shows_images:
            shown = [[pictures[number] for number in question.images] for question in of_task]
            if control == "images shuffled":
                draw.shuffle(shown)
            if control == "images blank":
                blank = pictures[0].point(lambda value: 0)
                shown = [[blank] * len(question.images) for question in of_task]
        said = eyes.answers([question.prompt(shows_images) for question in of_task], shown)
        found.append(percent(said, [question.answer for question in of_task]))
    return found


SHADES = " .:-=+*#@"  # from black to white
SHOWN = 4  # held-out images that are shown with their answers


def pictures(seed: int) -> list[str]:
    """Some held-out images side by side, in characters."""
    found = []
    for height in range(SIDE):
        line = "    "
        for number in split(seed)[1][:SHOWN]:
            for width in range(SIDE):
                shade = digits()[0][number].getpixel((width, height))
                line += 2 * SHADES[round(shade / 255 * (len(SHADES) - 1))]
            line += "    "
        found.append(line)
    return found


def answers(eyes: Eyes, seed: int) -> str:
    """What a model says of these images, and of the sum of the first two."""
    images = [digits()[0][number].convert("RGB") for number in split(seed)[1][:SHOWN]]
    which = eyes.answers(["Say<image> which"] * SHOWN, [[image] for image in images])
    (together,) = eyes.answers(["Say<image> and<image> sum"], [images[:2]])
    return f"which: {', '.join(which)}; the first two together: {together}"


class Measured(NamedTuple):
    """What a model answers rightly, in percent by task: of images, of words; and the time of the training before, in s."""

    images: list[float]
    words: list[float]
    seconds: float


def run(seed: int, folder: Path, shows: bool = False) -> dict[str, Measured]:
    """All stages of a seed and the controls at their end; those that are in `folder` are not run again.

    Args:
        shows: print some images, and what the model says of them after each stage.
    """
    folder = folder / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "measured.json"
    found: dict[str, Measured] = {}
    if known.exists():
        found = {name: Measured(*values) for name, values in json.loads(known.read_text()).items()}
    else:
        prepare(folder, seed)

    def note(name: str, eyes: Eyes, seconds: float = 0.0, control: str = "") -> None:
        sees = eyes.processor is not getattr(eyes.processor, "tokenizer", eyes.processor)
        images = accuracy(eyes, seed, True, control) if sees else [0.0] * len(TASKS)
        reader = Eyes(eyes.model, eyes.processor.tokenizer) if sees else eyes
        found[name] = Measured(images, accuracy(reader, seed, False), seconds)
        known.write_text(json.dumps(found))

    if shows:
        print("\n".join(pictures(seed)), flush=True)
    for name, stage in STAGES.items():
        if stage.before == "words":
            untrained = trainer_of(config_of(name, folder, seed), name)
            eyes = Eyes(untrained.base_model.eval(), untrained.processor)
            if shows:
                print("    nothing trained on images:", answers(eyes, seed), flush=True)
            if "nothing trained on images" not in found:
                note("nothing trained on images", eyes)
        if name not in found:
            started = time.perf_counter()
            train(config_of(name, folder, seed), name)
            note(name, Eyes.of(folder_of(folder, name)), time.perf_counter() - started)
        if shows and name != "words":
            print(f"    {name}:", answers(Eyes.of(folder_of(folder, name)), seed), flush=True)
    for control in CONTROLS:
        if control not in found:
            note(control, Eyes.of(folder_of(folder, "everything")), control=control)
    return found


def reached(name: str, measured: Measured) -> bool:
    """Whether a stage, or a control, ended where it should."""
    if name in CONTROLS:
        return all(value <= most for value, most in zip(measured.images, CONTROLS[name], strict=True))
    if name not in STAGES:
        return True
    shown = _shown(name, measured)
    goals = STAGES[name].goals
    return all(value >= least for value, least in zip(shown, goals, strict=True)) and min(measured.words) >= 99


def median_of(outcomes: list[dict[str, Measured]], name: str) -> Measured:
    """The median over seeds of every number."""
    of_seeds = [outcome[name] for outcome in outcomes]
    images = [statistics.median(values) for values in zip(*(one.images for one in of_seeds), strict=True)]
    words = [statistics.median(values) for values in zip(*(one.words for one in of_seeds), strict=True)]
    return Measured(images, words, statistics.median(one.seconds for one in of_seeds))


def lines(outcomes: list[dict[str, Measured]]) -> list[str]:
    """The table: medians over the seeds, with lowest and highest."""
    head = ["stage", *TASKS, "goals", "words, least", "reached", "time"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = ["words", "nothing trained on images", *list(STAGES)[1:], *CONTROLS]
    for name in order:
        middle = median_of(outcomes, name)
        stage = STAGES.get(name)
        cells = [name]
        for task in range(len(TASKS)):
            values = [_shown(name, outcome[name])[task] for outcome in outcomes]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        goals = ""
        if name in CONTROLS:
            goals = "at most " + " / ".join(map(str, CONTROLS[name]))
        elif stage is not None:
            goals = "at least " + " / ".join(str(goal) for goal in stage.goals if goal)
        seconds = f"{middle.seconds:.0f} s" if middle.seconds else ""
        cells += [goals, f"{min(middle.words):.1f}", "yes" if reached(name, middle) else "NO", seconds]
        table.append("| " + " | ".join(cells) + " |")
    return table


def _shown(name: str, measured: Measured) -> list[float]:
    """Percentages of what a stage shows."""
    return measured.words if name == "words" else measured.images


def main() -> None:
    """Run what is missing, and rewrite the table once all seeds are there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"))
    parser.add_argument("--show", action="store_true", help="print images, and what the model says of them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = [run(seed, given.folder, given.show) for seed in given.seeds]
    table = lines(outcomes)
    print("\n".join(table))
    if tuple(given.seeds) == SEEDS:
        write(table, MARKERS)


if __name__ == "__main__":
    main()
