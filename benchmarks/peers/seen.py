"""What is read by the runs of `vision_throughput.py`: images, pairs, and the folder of a LLaVA that nobody has trained."""

import json
from pathlib import Path
from typing import Any

from train_throughput import BENCH, SHARED

NUM_PAIRS, CONTEXT, VOCABULARY, SIDE = 80, 512, 6400, 64
IMAGE = "<image>"
SIDES = {"dpo": ("chosen", "rejected"), "sft": ("chosen",)}  # of a pair, what a stage trains on
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare() -> Path:
    """Images, pairs and weights, made once."""
    work = BENCH / "work-images"
    ready = work / "ready"
    if ready.is_file() and ready.read_text(encoding="utf-8") == Path(__file__).read_text(encoding="utf-8"):
        return work
    work.mkdir(parents=True, exist_ok=True)
    pairs = write_pairs(work)
    write_model(work, pairs)
    measure_rows(work)
    ready.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return work


def write_pairs(work: Path) -> list[dict[str, Any]]:
    """Rows with an image and two answers of different lengths, of which the second is wrong; and those with the first alone."""
    import numpy as np

    rng = np.random.default_rng(0)
    images, asked = questions(work)
    words = sorted({answer for found in asked for _, answer in found})

    def said(found: list[tuple[str, str]], is_right: bool) -> str:
        number = int(np.clip(rng.lognormal(np.log(6), 0.8), 1, 40))
        sentences = []
        for question, answer in (found * 40)[:number]:
            word = answer if is_right else str(rng.choice(words))
            sentences.append(f"To the question {question} I say {word}.")
        return " ".join(sentences)

    pairs = []
    for number in range(NUM_PAIRS):
        which = number % len(images)
        found = asked[which]
        question = found[number % len(found)][0]
        pairs.append(
            {
                "prompt": [{"role": "user", "content": IMAGE + question}],
                "chosen": [{"role": "assistant", "content": said(found, True)}],
                "rejected": [{"role": "assistant", "content": said(found, False)}],
                "images": [str(images[which])],
            }
        )
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (work / "dpo.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = []
    for pair in pairs:
        row = {"prompt": pair["prompt"], "completion": pair["chosen"], "images": pair["images"]}
        lines.append(json.dumps(row) + "\n")
    (work / "sft.jsonl").write_text("".join(lines), encoding="utf-8")
    return pairs


def questions(work: Path) -> tuple[list[Path], list[list[tuple[str, str]]]]:
    """Images, and of each the questions about it with their answers."""
    folder = SHARED / "vlm" / "easy_vqa_train"
    if not folder.is_dir():
        return noise(work)
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        by_image.setdefault(image, []).append((question, answer))
    numbers = sorted(by_image)
    # Beside the rows, as paths may not lead out of their folder.
    images = []
    for number in numbers:
        path = work / f"{number}.png"
        path.write_bytes((folder / "images" / f"{number}.png").read_bytes())
        images.append(path)
    return images, [by_image[number] for number in numbers]


def noise(work: Path) -> tuple[list[Path], list[list[tuple[str, str]]]]:
    """The same without the data: noise, and questions that nobody can answer."""
    import numpy as np
    from PIL import Image

    images = []
    for number in range(NUM_PAIRS):
        path = work / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        images.append(path)
    return images, [[("what color is the shape?", "blue"), ("is there a circle?", "no")]] * NUM_PAIRS


def write_model(work: Path, pairs: list[dict[str, Any]]) -> None:
    """The folder of a LLaVA with its processor, as a user would have it."""
    import torch

    from llm_trainer.config.vision import VisionConfig
    from llm_trainer.data.encode.tokenizer import train_tokenizer
    from llm_trainer.models.build import build_model, num_parameters
    from llm_trainer.models.vision_build import processor_for
    from llm_trainer.train_configs import VLMConfig

    texts = [turn["content"] for pair in pairs for turn in (*pair["prompt"], *pair["chosen"], *pair["rejected"])]
    tokenizer = train_tokenizer(texts, 400, [IMAGE])
    tokenizer.chat_template = TEMPLATE
    tower = VisionConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE, patch_size=8)
    shape = VLMConfig(
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        vision=tower,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    torch.manual_seed(0)
    model = build_model(shape)
    print(f"a LLaVA of {num_parameters(model):,} parameters", flush=True)
    model.save_pretrained(work / "model")
    processor_for(model.config, tokenizer).save_pretrained(work / "model")


def measure_rows(work: Path) -> None:
    """Of every row, for each stage, the tokens of its sides together, those that are trained on, and the sum of their ids."""
    from transformers import AutoProcessor

    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.kinds import DataOptions, get_kind
    from llm_trainer.data.load import load
    from llm_trainer.data.vision import ImageFormat

    processor = AutoProcessor.from_pretrained(work / "model", use_fast=False)
    chat = ChatFormat(processor.tokenizer, images=ImageFormat(processor))
    rows = load([str(work / "dpo.jsonl")], get_kind("pairs"), chat, DataOptions(block_size=CONTEXT), work / "cache")
    found: dict[str, list[list[int]]] = {stage: [] for stage in SIDES}
    for number in range(NUM_PAIRS):
        for stage, names in SIDES.items():
            sides = [rows[number][side] for side in names]
            tokens = sum(len(side["input_ids"]) for side in sides)
            trained = sum(int(side["trained"].sum()) for side in sides)
            ids = sum(int(side["input_ids"][side["trained"]].sum()) for side in sides)
            found[stage].append([tokens, trained, ids])
    (work / "rows.json").write_text(json.dumps(found), encoding="utf-8")
