"""Real handwritten digits instead of words: a small language model that knows three tasks on words is given eyes.

The 1,797 images of scikit-learn's `load_digits` (8 x 8 pixels, 360 of them held out) are inside that package. The tasks: which
digit is it, what is the sum of two, is it even. First a language model learns them on words; then images stand where the words
stood, and first the projector alone learns, then the tower too, then everything. The controls show the right model the wrong
images, or blank ones: what it still knows then it does not know from images.

`python tests/learning/digits.py` rewrites the table of docs/results.md. What a seed has finished lies in `--folder`, so that a
run that was stopped goes on.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.optim.schedules import create_scheduler

sys.path.insert(0, str(Path(__file__).parent))
from learning_table import write

MARKERS = "<!-- digits: begin -->", "<!-- digits: end -->"
SEEDS = (0, 1, 2)
HELD_OUT = 360
TASKS = ("which", "sum", "even")

# Ids: the words of the ten digits, the sums 0 to 18, no and yes, and what stands around them.
SUMS, NO = 10, 29
QUESTIONS = (31, 32, 33)  # the last token of a prompt, by task
IMAGE, BEGIN, AND, PAD, VOCABULARY = 34, 35, 36, 37, 40
SIDE, PATCH = 8, 4
PER_IMAGE = (SIDE // PATCH) ** 2  # tokens


class Stage(NamedTuple):
    """A part of the training.

    Attributes:
        learns: the beginnings of the names of what is trained.
        goals: least held-out accuracy in each task, in percent.
    """

    steps: int
    lr: float
    learns: tuple[str, ...]
    goals: tuple[float, float, float]
    shows_images: bool = True


TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
STAGES = {
    "words": Stage(400, 3e-3, ("model.language_model", "lm_head"), (99, 99, 99), shows_images=False),
    "projector alone": Stage(700, 3e-3, (PROJECTOR,), (35, 0, 0)),
    "language model frozen": Stage(1300, 1e-3, (PROJECTOR, TOWER), (75, 40, 95)),
    "everything": Stage(300, 5e-4, ("",), (95, 85, 97)),
}
CONTROLS = {"images shuffled": (15, 15, 58), "images blank": (15, 15, 58)}  # most
ROWS = 32  # of each task in a step


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[1797, 3, 8, 8]` from -1 to 1, alike in the three colours, and what they show `[1797]`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32) / 8 - 1  # 0 to 16 in the package
    return grey[:, None].expand(-1, 3, -1, -1), torch.tensor(found.target)


def split(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the images to train on `[1437]`, and of the held-out ones `[360]`."""
    numbers = torch.randperm(len(digits()[1]), generator=torch.Generator().manual_seed(seed))
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def model_of(seed: int) -> Any:
    """LLaVA: SigLIP's tower and Qwen3's language model, two layers each, nothing trained."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

    torch.manual_seed(seed)
    layers: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = {"image_size": SIDE, "patch_size": PATCH}
    tower = SiglipVisionConfig(**layers, **size, intermediate_size=128, vision_use_head=False)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 64}
    attention = {"num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.05}
    text = Qwen3Config(**layers, **ids, **attention, intermediate_size=192)
    of_images = {"image_token_id": IMAGE, "image_seq_length": PER_IMAGE}
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, **of_images, **features))


def rows(task: int, first: torch.Tensor, second: torch.Tensor, shows_images: bool) -> torch.Tensor:
    """Questions about digits `first [B]`, and in a sum `second [B]`, with their answers as ids `[B, T]`."""

    def shown(digit: torch.Tensor) -> torch.Tensor:
        return torch.full((len(digit), PER_IMAGE), IMAGE) if shows_images else digit[:, None]

    def always(token: int) -> torch.Tensor:
        return torch.full((len(first), 1), token)

    parts = [always(BEGIN), shown(first)]
    answer = [SUMS + first, SUMS + first + second, NO + (first % 2 == 0)][task]
    if task == TASKS.index("sum"):
        parts += [always(AND), shown(second)]
    return torch.cat([*parts, always(QUESTIONS[task]), answer[:, None]], dim=1)


def pixels(task: int, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`[uses, 3, 8, 8]` the images of `rows`, by their numbers, in the order in which they stand there."""
    images, _ = digits()
    if task != TASKS.index("sum"):
        return images[first]
    return images[torch.stack([first, second], dim=1).flatten()]


def batch(numbers: torch.Tensor, shows_images: bool) -> dict[str, torch.Tensor]:
    """A step: `ROWS` questions of each task about images of `numbers`, the answer alone learned."""
    _, targets = digits()
    ids, seen = [], []
    for task in range(len(TASKS)):
        first, second = numbers[torch.randint(len(numbers), (2, ROWS))]
        ids.append(rows(task, targets[first], targets[second], shows_images))
        seen.append(pixels(task, first, second))
    width = max(part.shape[1] for part in ids)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=PAD) for part in ids]
    labels = [torch.full_like(part, -100) for part in padded]
    for of_task, part in zip(labels, ids, strict=True):
        of_task[:, part.shape[1] - 1] = part[:, -1]
    input_ids = torch.cat(padded)
    made = {"input_ids": input_ids, "labels": torch.cat(labels), "attention_mask": (input_ids != PAD).long()}
    return made | {"pixel_values": torch.cat(seen)} if shows_images else made


def train(model: Any, stage: Stage, seed: int) -> None:
    """One stage, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(stage.learns))
    numbers, _ = split(seed)
    torch.manual_seed(seed + stage.steps)
    batches = [batch(numbers, stage.shows_images) for _ in range(stage.steps)]
    optimizer = configure_optimizer(model=model, lr=stage.lr, weight_decay=0.0)
    schedule = {"warmup_steps": 20, "total_steps": stage.steps, "min_lr": stage.lr / 10}
    scheduler = create_scheduler(optimizer, "cosine", **schedule)
    options: dict[str, Any] = {"use_amp": False, "progress": False, "save_interval": 0, "log_interval": stage.steps}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = SFTTrainer(
            model=model,
            optimizer=optimizer,
            train_loader=batches,
            scheduler=scheduler,
            device="cpu",
            max_epochs=1,
            save_dir=folder,
            seed=seed,
            **options,
        )
        trainer.train()


@torch.no_grad()
def accuracy(model: Any, seed: int, shows_images: bool, control: str = "") -> list[float]:
    """Percent of the held-out questions that are answered rightly, by task."""
    _, held_out = split(seed)
    _, targets = digits()
    noise = torch.Generator().manual_seed(seed)
    found = []
    model.eval()
    for task in range(len(TASKS)):
        first, second = held_out, held_out[torch.randperm(HELD_OUT, generator=noise)]
        ids = rows(task, targets[first], targets[second], shows_images)
        inputs = {"input_ids": ids[:, :-1]}
        if shows_images:
            seen = pixels(task, first, second)
            if control == "images shuffled":
                seen = seen[torch.randperm(len(seen), generator=noise)]
            if control == "images blank":
                seen = torch.full_like(seen, -1.0)
            inputs["pixel_values"] = seen
        answers = model(**inputs).logits[:, -1].argmax(-1)
        found.append(100 * float((answers == ids[:, -1]).float().mean()))
    model.train()
    return found


SHADES = " .:-=+*#@"  # from black to white
SHOWN = 4  # held-out images that are shown with their answers


def pictures(seed: int) -> list[str]:
    """Some held-out images side by side, in characters."""
    images, _ = digits()
    _, held_out = split(seed)
    found = []
    for height in range(SIDE):
        line = "    "
        for number in held_out[:SHOWN].tolist():
            for shade in images[number, 0, height].tolist():
                place = round((shade + 1) / 2 * (len(SHADES) - 1))
                line += 2 * SHADES[place]
            line += "    "
        found.append(line)
    return found


@torch.no_grad()
def answers(model: Any, seed: int) -> str:
    """What a model says of these images, and of the sum of the first two."""
    _, held_out = split(seed)
    first, second = held_out[:SHOWN], held_out[1 : SHOWN + 1]
    said = []
    model.eval()
    for task in (0, 1):
        ids = rows(task, first, second, shows_images=True)
        logits = model(input_ids=ids[:, :-1], pixel_values=pixels(task, first, second)).logits[:, -1]
        said.append((logits.argmax(-1) - SUMS).tolist())
    model.train()
    words = list(map(_number, said[0]))
    return f"which: {', '.join(words)}; the first two together: {_number(said[1][0])}"


def _number(answer: int) -> str:
    """In digits, if it is a number."""
    return str(answer) if 0 <= answer < NO - SUMS else "?"


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
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / f"{seed}.json"
    found: dict[str, Measured] = {}
    if known.exists():
        found = {name: Measured(*values) for name, values in json.loads(known.read_text()).items()}
    model = model_of(seed)

    def measure(seconds: float, control: str = "") -> Measured:
        images = accuracy(model, seed, True, control)
        return Measured(images, accuracy(model, seed, False), seconds)

    def note(name: str, measured: Measured) -> None:
        found[name] = measured
        known.write_text(json.dumps(found))

    if shows:
        print("\n".join(pictures(seed)))
        print("    nothing trained:", answers(model, seed), flush=True)
    for name, stage in STAGES.items():
        weights = folder / f"{seed}_{name.replace(' ', '_')}.pt"
        if name in found:
            model.load_state_dict(torch.load(weights, weights_only=True))
            if shows:
                print(f"    {name}:", answers(model, seed), flush=True)
            continue
        started = time.perf_counter()
        train(model, stage, seed)
        seconds = time.perf_counter() - started
        torch.save(model.state_dict(), weights)
        note(name, measure(seconds))
        if shows:
            print(f"    {name}:", answers(model, seed), flush=True)
        if name == "words":
            note("nothing trained on images", measure(0.0))
    for control in CONTROLS:
        note(control, measure(0.0, control))
    return found


def reached(name: str, measured: Measured) -> bool:
    """Whether a stage, or a control, ended where it should."""
    if name in CONTROLS:
        return all(value <= most for value, most in zip(measured.images, CONTROLS[name], strict=True))
    if name not in STAGES:
        return True
    stage = STAGES[name]
    shown = measured.images if stage.shows_images else measured.words
    return all(value >= least for value, least in zip(shown, stage.goals, strict=True)) and min(measured.words) >= 99


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
