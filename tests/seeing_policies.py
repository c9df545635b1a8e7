"""A tiny policy that sees, its processor, and prompts that show pictures: those of policies.py with images among them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

import policies
from vision_data import file_of, picture

SIDE, DISTINCT = 8, 3  # pixels, pictures
PER_IMAGE = 4  # placeholders


@cache
def processor() -> Any:
    """Of a tower of 8 x 8 pixels in four patches, its tokenizer of bytes alone."""
    from llm_trainer.data.encode.tokenizer import train_tokenizer
    from llm_trainer.models.vision_build import processor_for

    tokenizer = train_tokenizer(["What? A cat."] * 2, 290, ["<image>"])
    return processor_for(tiny().config, tokenizer, None)


def tiny(seed: int = 0, attention: str = "auto", **shape: Any) -> Any:
    """A LLaVA with one layer each, the same at every call."""
    from llm_trainer.config.model import VLMConfig
    from llm_trainer.config.vision import VisionConfig
    from llm_trainer.models.build import build_model

    tower = VisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=4)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(seed)
    return build_model(VLMConfig(**sizes | shape, vision=tower, image_token_id=image_id()), attention=attention)


@cache
def image_id() -> int:
    """The placeholder, behind the 290 ids of the tokenizer."""
    from llm_trainer.data.encode.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["What? A cat."] * 2, 290, ["<image>"])
    return int(tokenizer.convert_tokens_to_ids("<image>"))


@cache
def pictures() -> list[bytes]:
    """Files of pictures."""
    return [file_of(picture(SIDE, SIDE, number)) for number in range(DISTINCT)]


def prompts(count: int = 6, size: int = 2, sources: Any = None) -> list[dict[str, Any]]:
    """Batches of prompts, padded on the left: of text alone, with one picture, and with two, in turns."""
    sources = sources or pictures()
    noise = torch.Generator().manual_seed(1)
    batches = []
    for first in range(0, count, size):
        rows, shown = [], []
        for number in range(first, first + size):
            words = torch.randint(10, 250, (4,), generator=noise).tolist()
            uses = [(number + use) % DISTINCT for use in range(number % 3)]
            rows.append(words[:2] + [image_id()] * (PER_IMAGE * len(uses)) + words[2:])
            shown.append([sources[use] for use in uses])
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        answers = [str(first + row) for row in range(size)]
        batches.append({"prompts": ids, "prompt_attention_mask": mask, "images": shown, "answers": answers})
    return batches


def even_share(prompts: Any, completions: list[str], answers: Any) -> list[float]:
    """The share of even bytes in what is written."""
    return [sum(byte % 2 == 0 for byte in text.encode()) / max(1, len(text.encode())) for text in completions]


def options(**changes: Any) -> dict[str, Any]:
    """What `policies.make` and `policies.train` are given."""
    given = {"train_loader": prompts(), "tokenizer": processor(), "reward_func": even_share}
    return given | {"stop_token_ids": list(range(0, 290, 7))} | changes


def train(name: str, folder: Path, model: Any = None, **changes: Any) -> Any:
    """A run to its end, and the metrics of each of its steps."""
    return policies.train(name, folder, tiny() if model is None else model, **options(**changes))
