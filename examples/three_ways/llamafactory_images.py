"""What LLaMA-Factory is told of images: whole parts to freeze, how large they may be, and rows that name files.

Written for LLaMA-Factory 0.9.5 (`hparams/finetuning_args.py`, `hparams/model_args.py`, `data/template.py`).
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_trainer.config.algorithms import PretrainConfig
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.encode.row_images import RowImages
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.pictures import all_images
from llm_trainer.data.vision import ImageFormat
from llm_trainer.models.freezing import LANGUAGE, PROJECTOR, VISION, parts_to_freeze

FROZEN = {  # ours -> theirs
    VISION: "freeze_vision_tower",
    PROJECTOR: "freeze_multi_modal_projector",
    LANGUAGE: "freeze_language_model",
}
TEMPLATES = {  # kind of model -> the template that shows it images
    "llava": "llava",
    "llava_next": "llava_next",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "internvl": "intern_vl",
    "gemma3": "gemma3",
}


def family_of(model: Path) -> str | None:
    """What transformers calls the kind of a model in a folder; None: it sees nothing."""
    path = model / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values.get("model_type") if values.get("vision_config") else None


def arguments_of(config: TrainConfig, section: Any, family: str) -> tuple[dict[str, Any], list[str]]:
    """Its arguments for a model that sees, and what it cannot be told.

    Args:
        config: the whole run.
        section: the options of its algorithm.
        family: of the model.

    Raises:
        ConfigError: it has no template that shows such a model images.
    """
    if family not in TEMPLATES:
        raise ConfigError(
            f"model_config: a {family}, which LLaMA-Factory shows no images; expected one of {', '.join(TEMPLATES)}"
        )
    if isinstance(section, PretrainConfig):
        raise ConfigError(
            "pretrain_config: LLaMA-Factory shows no images in pretraining; expected an sft_config or a dpo_config"
        )
    # 1. parts; it freezes tower and projector where it is told nothing, and beside adapters
    wanted = parts_to_freeze(config.freeze, section)
    if config.adapter_config is not None:
        wanted = [VISION, PROJECTOR]
    arguments: dict[str, Any] = {theirs: ours in wanted for ours, theirs in FROZEN.items()}
    untold = [f"freeze: {part!r}; it freezes whole parts" for part in wanted if part not in FROZEN]

    # 2. sizes; by default it changes those of small and of large images before the processor sees them
    loader = config.data_loader_config
    arguments |= {"image_max_pixels": loader.max_pixels or sys.maxsize, "image_min_pixels": 1}

    # 3. turns
    template = TEMPLATES[family]
    arguments["template"] = template
    untold.append(f"the chat template of the tokenizer: it prints turns as its own template {template!r} does")
    return arguments, untold


def images_beside(config: TrainConfig, path: Path, images: ImageFormat) -> RowImages:
    """The images of the rows of a data file, as a run finds them."""
    loader, section = config.data_loader_config, config.sft_config
    tags = None if section is None else section.image_tags_file_dataset
    return RowImages.beside(images, path, loader.image_root, loader.bad_images, tags)


def files_shown(sample: Mapping[str, Any], folder: Path) -> list[str]:
    """Absolute paths of what the turns of a sample show; images that are in no file are written into `folder`."""
    turns = dict(sample)
    if "chosen" in sample:  # both answers show the same
        turns = {"messages": [*sample["prompt"], *sample["chosen"][:-1]]}
    return [_file_of(image, folder) for image in all_images(turns)]


def _file_of(image: ImageRef, folder: Path) -> str:
    if isinstance(image.source, str):
        return image.source
    path = folder / "images" / image.digest
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(image.source)
    return str(path)
