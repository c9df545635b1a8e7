"""Questions about coloured shapes, answered by a small vision-language model that begins with nothing: easy-VQA.

300 images of 64 x 64 pixels show one shape each; 2,951 questions have one of 13 answers. Many can be guessed: so the held-out
questions are answered too by whoever gives the most frequent answer, by whoever knows the question alone, and by the trained
model with other images than the right ones and with blank ones. Images are held out, with all their questions.

`python tests/learning/easy_vqa.py` rewrites the table of docs/results.md. The data are in `../shared`, which a clone does not
have: without it the script says so.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm_trainer.data.encode.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from learning_table import write
from seeing import Eyes, described, percent, train

DATA = Path(__file__).parents[3] / "shared" / "data" / "vlm" / "easy_vqa_train"
MARKERS = "<!-- easy-vqa: begin -->", "<!-- easy-vqa: end -->"
SEEDS = (0, 1, 2)
HELD_OUT = 60  # images
STEPS, LR, BATCH = 1500, 1e-3, 32
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "initializer_range": 0.05,
    "vision": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
}
KINDS = ("colour", "shape", "yes or no")
SHAPES = ("circle", "rectangle", "triangle")
ROWS = ("most frequent answer", "question alone", "model", "model, images shuffled", "model, images blank")


class Question(NamedTuple):
    """As the file has it."""

    text: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        """What is asked for."""
        if self.answer in ("yes", "no"):
            return "yes or no"
        return "shape" if self.answer in SHAPES else "colour"


def split(seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and those about the held-out images."""
    asked = [Question(*row) for row in json.loads((DATA / "questions.json").read_text())]
    images = sorted({question.image for question in asked})
    held_out = set(random.Random(seed).sample(images, HELD_OUT))
    return [one for one in asked if one.image not in held_out], [one for one in asked if one.image in held_out]


def config_of(folder: Path, seed: int) -> dict[str, Any]:
    """The configuration of the run, as YAML has it; its rows are those of the file, about the images to train on."""
    learned, _ = split(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.json").write_text(json.dumps([list(one) for one in learned]))
    texts = [f"{one.text}\n{one.answer}" for one in learned]
    train_tokenizer(texts, 500).save_pretrained(folder / "tokenizer")
    common = described(folder / "run", str(folder / "questions.json"), STEPS, LR, BATCH, seed)
    common["data_loader_config"]["image_root"] = str(DATA)
    return common | {"model_config": MODEL, "tokenizer": str(folder / "tokenizer"), "sft_config": {}}


def blind(seed: int) -> dict[str, list[str]]:
    """What is answered by whoever sees nothing, to the held-out questions."""
    learned, held_out = split(seed)
    of_all = Counter(one.answer for one in learned)
    of_question: dict[str, Counter[str]] = defaultdict(Counter)
    for one in learned:
        of_question[one.text][one.answer] += 1
    most = of_all.most_common(1)[0][0]
    known = [of_question[one.text].most_common(1) for one in held_out]
    guessed = [answers[0][0] if answers else most for answers in known]
    return {"most frequent answer": [most] * len(held_out), "question alone": guessed}


def seen(eyes: Eyes, seed: int) -> dict[str, list[str]]:
    """What a trained model answers to the held-out questions, with the right images, with others, and with blank ones."""
    from PIL import Image

    _, held_out = split(seed)
    words = {one.answer for one in held_out}
    assert all(len(eyes.processor.tokenizer.encode(word)) == 1 for word in words), "answers are one token each"
    prompts = []
    for one in held_out:
        turns = [{"role": "user", "content": f"<image>{one.text}"}]
        prompts.append(eyes.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    images = [[Image.open(DATA / "images" / f"{one.image}.png").convert("RGB")] for one in held_out]
    shuffled = list(images)
    random.Random(seed).shuffle(shuffled)
    blank = [[Image.new("RGB", (64, 64), "white")]] * len(images)
    shown = dict(zip(ROWS[2:], (images, shuffled, blank), strict=True))
    return {name: eyes.answers(prompts, of_row) for name, of_row in shown.items()}


def accuracies(said: list[str], held_out: list[Question]) -> list[float]:
    """Percent that is right: of all questions, and of each kind."""
    found = [percent(said, [one.answer for one in held_out])]
    for kind in KINDS:
        which = [number for number, one in enumerate(held_out) if one.kind == kind]
        found.append(percent([said[number] for number in which], [held_out[number].answer for number in which]))
    return found


def run(seed: int, folder: Path) -> dict[str, list[float]]:
    """Every line of the table for a seed, and the seconds of its training; what is in `folder` is not run again."""
    folder = folder / str(seed)
    known = folder / "measured.json"
    if known.exists():
        return json.loads(known.read_text())
    started = time.perf_counter()
    train(config_of(folder, seed), "easy-vqa")
    seconds = time.perf_counter() - started
    _, held_out = split(seed)
    said = blind(seed) | seen(Eyes.of(folder / "run"), seed)
    found = {name: accuracies(answers, held_out) for name, answers in said.items()} | {"seconds": [seconds]}
    known.write_text(json.dumps(found))
    return found


def lines(outcomes: list[dict[str, list[float]]]) -> list[str]:
    """The table: medians over the seeds, with lowest and highest."""
    head = ["who answers", "all", *KINDS]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ROWS:
        cells = [name]
        for values in zip(*(outcome[name] for outcome in outcomes), strict=True):
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        table.append("| " + " | ".join(cells) + " |")
    return table


def main() -> None:
    """Run what is missing, and rewrite the table once all seeds are there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/easy_vqa"))
    given = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA}: not there; expected the folder of easy-VQA's questions.json and images/")
    torch.set_num_threads(1)
    outcomes = [run(seed, given.folder) for seed in given.seeds]
    print("\n".join(lines(outcomes)), [round(outcome["seconds"][0]) for outcome in outcomes])
    if tuple(given.seeds) == SEEDS:
        write(lines(outcomes), MARKERS)


if __name__ == "__main__":
    main()
