"""What a run makes of images: the processor of its model, their tokens, and the files that name them."""

from pathlib import Path
from typing import Any

from llm_trainer.builder.streams import paths_of
from llm_trainer.config.algorithms import SFTConfig
from llm_trainer.config.errors import ConfigError, counted
from llm_trainer.config.model import VLMConfig
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.images import is_address
from llm_trainer.data.provided import ProvidedImages
from llm_trainer.data.vision import ImageFormat
from llm_trainer.models.inside import sees_images, transformers_model
from llm_trainer.models.pretrained import REWARD_MODELS, find_pretrained
from llm_trainer.models.pretrained import Kind as Found
from llm_trainer.models.vision_build import processor_for, read_processor, side_of


def make_processor(config: TrainConfig, policy: Any, tokenizer: Any) -> Any:
    """Of a vision-language model: the tokenizer, and what makes numbers of images; None: another model."""
    model, wanted = transformers_model(policy), config.model_config
    if model is None or not sees_images(model.config):
        return None
    if isinstance(wanted, VLMConfig):
        return processor_for(model.config, tokenizer, wanted.vision_path)
    found = find_pretrained(str(wanted), (Found.LANGUAGE_MODEL, *REWARD_MODELS), key="model_config")
    return read_processor(found.processor_source, tokenizer)


def make_image_format(config: TrainConfig, section: Any, policy: Any, processor: Any) -> ImageFormat:
    """What an image is in tokens and in numbers.

    Args:
        config: the whole run.
        section: the options of the algorithm, which may name a provider of pixels.
        policy: a model that sees.
        processor: of this model.
    """
    model = transformers_model(policy)
    assert model is not None
    patch = getattr(model.config.vision_config, "patch_size", None)
    if patch is not None:
        patch = side_of(patch)
    if isinstance(section, SFTConfig) and section.pixel_values_provider is not None:
        return ProvidedImages(processor, section.pixel_values_provider, patch)
    return ImageFormat(processor, patch, config.data_loader_config.max_pixels)


def check_same_images(images: ImageFormat, source: str, tokenizer: Any, key: str) -> None:
    """
    Args:
        images: of the run.
        source: of another model, which is to see the same; one that reads text sees nothing.
        tokenizer: of the run.
        key: of the configuration that names it.

    Raises:
        ConfigError: it was trained on other tokens, or on other numbers, of an image.
    """
    found = find_pretrained(source, (Found.LANGUAGE_MODEL, *REWARD_MODELS), key=key)
    if not found.sees_images:
        return
    theirs = ImageFormat(read_processor(found.processor_source, tokenizer), max_pixels=images.max_pixels)
    difference = images.difference(theirs)
    if difference:
        raise ConfigError(
            f"{key}: the processor of {source} differs from that of this run ({difference}), so the model would be shown what "
            f"it was not trained on; expected a model of the policy's family with the same processor"
        )


def eval_tags(config: TrainConfig, section: Any) -> list[str | list[str]]:
    """`eval_image_tags`; paths among them begin where those of rows do, if a folder is named for that."""
    root = config.data_loader_config.image_root
    is_provided = isinstance(section, SFTConfig) and section.pixel_values_provider is not None
    if root is None or is_provided:
        return config.eval_image_tags
    found: list[str | list[str]] = []
    for tag in config.eval_image_tags:
        if isinstance(tag, str):
            found.append(_below(root, tag))
        else:
            found.append([_below(root, one) for one in tag])
    return found


def _below(root: str, tag: str) -> str:
    return tag if is_address(tag) else str(Path(root) / tag)


def image_tags(config: TrainConfig, section: Any) -> dict[str, str]:
    """For each file of the training data the csv of its images; nothing where none is named.

    Raises:
        ValueError: there is not one csv for each file.
    """
    if not isinstance(section, SFTConfig) or section.image_tags_file_dataset is None:
        return {}
    files, tags = paths_of(config.file_dataset), paths_of(section.image_tags_file_dataset)
    if len(files) != len(tags):
        raise ValueError(
            f"sft_config.image_tags_file_dataset: got {counted(len(tags), 'file')} for {counted(len(files), 'path')} of "
            "file_dataset, expected one each"
        )
    for file in files:
        if not Path(file).is_file():
            raise ValueError(
                f"sft_config.image_tags_file_dataset: {file} in file_dataset is no single file; expected one for each csv"
            )
    return {str(Path(file)): csv for file, csv in zip(files, tags, strict=True)}


def refuse_tags(section: Any) -> None:
    """
    Raises:
        ValueError: files name images for a model that reads text.
    """
    if isinstance(section, SFTConfig) and section.image_tags_file_dataset is not None:
        raise ValueError(
            "sft_config.image_tags_file_dataset: found a model that reads text; expected one that sees, a VLMConfig or "
            "the folder of a vision-language model"
        )
