"""A vision-language model put together of a tower, a projector and a language model, and the processor that goes with it."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llm_trainer.checkpoint.weights import without_progress_bars
from llm_trainer.config.vision import check_tokens
from llm_trainer.models.pretrained import PROCESSOR_FILES, Kind, find_pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_trainer.config.model import VLMConfig

VIDEOS = "video_processor"  # the part of a processor that takes videos
# What a vision-language model may be put together of: kinds of transformers' models, and which class reads them.
LANGUAGE_MODELS = ("qwen3", "llama")
SIGLIP = ("siglip_vision_model", "siglip")
INTERN_VIT = ("internvl_vision",)
# Numbers of a pixel, 0 to 1, are brought to -1 to 1, as SigLIP was trained.
MEAN = DEVIATION = (0.5, 0.5, 0.5)


def vision_language_config(c: "VLMConfig", text: "PretrainedConfig") -> "PretrainedConfig":
    """The transformers configuration of a LLaVA, or, where four patches become a token, of an InternVL.

    Args:
        c: what is wanted.
        text: of its language model.

    Raises:
        ValueError: the tower of `vision_path` is none that is known here, or does not make so many tokens.
    """
    from transformers import InternVLConfig, LlavaConfig

    is_shuffled = _is_shuffled(c)
    tower = _tower_config(c, is_shuffled)
    if c.image_token_id is None:
        raise ValueError(
            "model_config.image_token_id: none given, and no tokenizer that would tell; expected the id of the image_token"
        )
    values: dict[str, Any] = {
        "text_config": text,
        "vision_config": tower,
        "image_seq_length": num_tokens(tower, is_shuffled),
        "tie_word_embeddings": text.tie_word_embeddings,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
    }
    if is_shuffled:
        values |= {"image_token_id": c.image_token_id, "vision_feature_select_strategy": "default"}
        return InternVLConfig(**values)
    # SigLIP has no token of the whole image that would be left out.
    values |= {"image_token_index": c.image_token_id, "vision_feature_select_strategy": "full"}
    return LlavaConfig(**values)


def _is_shuffled(c: "VLMConfig") -> bool:
    """Whether four patches become one token."""
    if c.vision is not None:
        return check_tokens(c.tokens_per_image, c.vision.image_size, c.vision.patch_size)
    found = _found_tower(c)
    return check_tokens(c.tokens_per_image, side_of(found.image_size), side_of(found.patch_size))


def num_tokens(tower: Any, is_shuffled: bool) -> int:
    """Tokens of an image."""
    patches = (side_of(tower.image_size) // side_of(tower.patch_size)) ** 2
    return patches // 4 if is_shuffled else patches


def side_of(size: Any) -> int:
    """Of a square that is one number, or height and width."""
    return size if isinstance(size, int) else int(size[0])


def _tower_config(c: "VLMConfig", is_shuffled: bool) -> "PretrainedConfig":
    from transformers import InternVLVisionConfig, SiglipVisionConfig

    if c.vision is None:
        found = _found_tower(c)
        kinds = INTERN_VIT if is_shuffled else SIGLIP[:1]
        if found.model_type not in kinds:
            raise ValueError(
                f"model_config.vision_path: {c.vision_path} holds a {found.model_type}, and tokens_per_image: "
                f"{c.tokens_per_image} expects a {' or '.join(kinds)}"
            )
        return found
    shape = c.vision
    values: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    if is_shuffled:  # the one tower that transformers opens an InternVL with
        return InternVLVisionConfig(**values, initializer_range=c.initializer_range)
    # NOTE: its head makes one vector of an image, which nothing here reads.
    return SiglipVisionConfig(**values, vision_use_head=False)


def _found_tower(c: "VLMConfig") -> Any:
    """The configuration of the tower in `vision_path`."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(find_pretrained(cast(str, c.vision_path), key="model_config.vision_path").source)
    if found.model_type == "siglip":
        found = found.vision_config
    if found.model_type in SIGLIP:
        found.vision_use_head = False
    return found


def language_part(c: "VLMConfig") -> "PretrainedConfig":
    """The configuration of the language model in `language_path`.

    Raises:
        ValueError: it is none of those that a vision-language model is made of.
    """
    from transformers import AutoConfig

    found = find_pretrained(cast(str, c.language_path), (Kind.LANGUAGE_MODEL,), "model_config.language_path")
    if found.base is not None or found.config["model_type"] not in LANGUAGE_MODELS:
        held = "adapters" if found.base is not None else f"a {found.config['model_type']}"
        raise ValueError(
            f"model_config.language_path: {c.language_path} holds {held}, and a vision-language model is put together of "
            f"{' or '.join(LANGUAGE_MODELS)}; expected such a model"
        )
    return cast("PretrainedConfig", AutoConfig.from_pretrained(found.source))


def put_parts(model: "PreTrainedModel", c: "VLMConfig") -> None:
    """Give a model that was built from `c` the weights of the folders that it names, in place."""
    from transformers import AutoModelForCausalLM

    body: Any = model.base_model
    if c.language_path is not None:
        found = find_pretrained(c.language_path, (Kind.LANGUAGE_MODEL,), "model_config.language_path")
        with without_progress_bars():
            language = AutoModelForCausalLM.from_pretrained(found.source, dtype=model.dtype)
        body.language_model.load_state_dict(language.base_model.state_dict())
        _copy(language.get_output_embeddings().weight, model.get_output_embeddings().weight)
    if c.vision_path is not None:
        tower = body.vision_tower
        with without_progress_bars():
            read, report = type(tower).from_pretrained(
                c.vision_path, config=tower.config, dtype=model.dtype, output_loading_info=True
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"model_config.vision_path: {c.vision_path} lacks {', '.join(missing[:3])}; expected the weights of a "
                f"{type(tower).__name__}"
            )
        tower.load_state_dict(read.state_dict())


@torch.no_grad()
def _copy(source: Tensor, target: Any) -> None:
    target.copy_(source)


def processor_for(model_config: "PretrainedConfig", tokenizer: Any, vision_path: str | None = None) -> Any:
    """The processor of a model that was built of a `VLMConfig`: every image is made a square of the tower's size.

    Args:
        model_config: of the model.
        tokenizer: of the run, with the placeholder in it.
        vision_path: folder of the tower, whose own image processor is taken if it has one.
    """
    from transformers import LlavaProcessor

    c: Any = model_config
    side, patch = side_of(c.vision_config.image_size), side_of(c.vision_config.patch_size)
    is_shuffled = c.image_seq_length < (side // patch) ** 2
    # NOTE: this processor fits both models: it counts squares of pixels, of which a token of the second has four patches.
    square = 2 * patch if is_shuffled else patch
    return LlavaProcessor(
        _image_processor(side, vision_path),
        tokenizer,
        patch_size=square,
        vision_feature_select_strategy="full",
        image_token=tokenizer.convert_ids_to_tokens(c.image_token_id),
        chat_template=tokenizer.chat_template,
    )


def _image_processor(side: int, vision_path: str | None) -> Any:
    from transformers import AutoImageProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    square = {"height": side, "width": side}
    if vision_path is not None:
        source = Path(find_pretrained(vision_path, key="model_config.vision_path").source)
        if not source.is_dir() or (source / "preprocessor_config.json").is_file():
            return AutoImageProcessor.from_pretrained(source, use_fast=False, size=square, crop_size=square)
    return SiglipImageProcessorPil(size=square, crop_size=square, image_mean=MEAN, image_std=DEVIATION)


def read_processor(folder: str | Path, tokenizer: Any) -> Any:
    """The processor in a folder, with the tokenizer of the run in it; None: the folder has none.

    Raises:
        ValueError: it has one that cannot be made here.
    """
    try:
        processor = processor_class(folder).from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}: a vision-language model, whose processor cannot be read: {said}; expected processor_config.json or "
            f"preprocessor_config.json beside it, and pillow installed"
        ) from None
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{folder}: a vision-language model, and a {type(processor).__name__} beside it, which takes no images; expected "
            f"its processor"
        )
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template or processor.chat_template
    return processor


def processor_class(folder: str | Path) -> Any:
    """The class of the processor in a folder: `AutoProcessor`; without torchvision its own, without what needs that."""
    from importlib.util import find_spec

    import transformers
    from transformers import AutoProcessor

    if find_spec("torchvision") is not None:
        return AutoProcessor
    found = getattr(transformers, _named_processor(Path(folder)), None)
    if found is None or VIDEOS not in found.get_attributes():
        return AutoProcessor
    return without_videos(found)


def _named_processor(folder: Path) -> str:
    """The name of the processor's class: as its files say, else that of the model's kind."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
            if said:
                return str(said)
    return str(PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(folder).model_type, ""))


@cache
def without_videos(processor_class: Any) -> Any:
    """A class of processors without the part that takes videos, which needs torchvision; it is saved under the same name."""
    names = [name for name in processor_class.get_attributes() if name != VIDEOS]
    changes = {
        "get_attributes": classmethod(lambda cls: names),
        "__module__": processor_class.__module__,
        # NOTE: by its name a pickle would find the class with videos; workers that are spawned get pickles.
        "__reduce__": lambda self: (_empty_without_videos, (processor_class,), self.__dict__),
    }
    return type(processor_class.__name__, (processor_class,), changes)


def _empty_without_videos(processor_class: Any) -> Any:
    """A processor without videos, which a pickle or a copy then fills."""
    made = without_videos(processor_class)
    return made.__new__(made)
