"""What is inside of a module: the transformers model that others were put around, and what its configuration says of text.

Engines, the compiler, adapters and modules of ours or of a user wrap a model, and a vision-language model nests the
configuration of its language part. Who looks through either asks here. The file imports nothing of ours, so that every
room may import it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Adapters that do more than change layers: they look at the ids of the whole batch before the model runs.
READ_IDS = ("XLORA", "POLY")


def transformers_models(module: nn.Module) -> "Iterator[PreTrainedModel]":
    """All transformers models in `module`, itself among them; outer ones come first."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None:  # it takes seconds to import, and where nobody has done so, there is no such model
        return
    for inner in module.modules():
        if isinstance(inner, library.PreTrainedModel):
            yield inner


def transformers_model(module: nn.Module) -> "PreTrainedModel | None":
    """The transformers model that `module` is or was put around, however deep; None: there is none."""
    return next(transformers_models(module), None)


def language_config(config: Any) -> "PretrainedConfig":
    """The part of a transformers configuration that describes the language model: mostly all of it."""
    found: PretrainedConfig = config.get_text_config()
    return found


def sees_images(config: Any) -> bool:
    """Whether a model of this transformers configuration has a tower of images beside its language model."""
    return getattr(config, "vision_config", None) is not None


def beside_language(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of what sees images in a model, tower and projector; none of another model."""
    model: Any = transformers_model(module)
    if model is None or not sees_images(model.config):
        return []
    language = set(map(id, model.get_decoder().parameters()))
    return [parameter for parameter in model.base_model.parameters() if id(parameter) not in language]


def auto_class(config: Any) -> Any:
    """The class of transformers that makes language models of such configurations, or models of images and language."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def context_of(config: Any) -> int | None:
    """The most tokens that a model of this configuration takes; None: it does not say, as where positions are relative."""
    return getattr(language_config(config), "max_position_embeddings", None)


def model_context(module: nn.Module) -> int | None:
    """The most tokens that the transformers model in `module` takes; None: there is none, or it does not say."""
    model = transformers_model(module)
    return None if model is None else context_of(model.config)


def vocab_size_of(module: nn.Module) -> int | None:
    """How many ids the transformers model in `module` knows; None: there is none, or it does not say."""
    model = transformers_model(module)
    return None if model is None else getattr(language_config(model.config), "vocab_size", None)


def is_tied(model: Any) -> bool:
    """Whether head and embeddings of a transformers model are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie(config: Any) -> None:
    """Note in a transformers configuration that head and embeddings are two matrices.

    NOTE: of a vision-language model transformers reads the outer word, and other programs that of its language model.
    """
    for one in (config, language_config(config)):
        one.tie_word_embeddings = False


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and `torch.compile`, whose names are those of a single process."""
    while isinstance(module, DistributedDataParallel) or "_orig_mod" in dict(module.named_children()):
        module = module.module if isinstance(module, DistributedDataParallel) else module.get_submodule("_orig_mod")
    return module


def has_adapters(module: nn.Module) -> bool:
    """Whether `module` is a model of the `peft` library, whose base stays as it is while its adapters learn."""
    # By name, so that `peft` is not imported where nobody uses it.
    return is_kind_of(module, "peft.", "PeftModel")


def is_kind_of(thing: object, library: str, name: str) -> bool:
    """Whether `thing` is of the class `name`, or of one derived from it, of a library that need not be installed.

    Args:
        library: how the dotted name of the class's module begins.
    """
    return any(kind.__module__.startswith(library) and kind.__name__ == name for kind in type(thing).__mro__)


def adapted_model(module: nn.Module) -> nn.Module:
    """What computes the same as `module` without wrappers: the model in whose layers the adapters are.

    Adapters that are not in layers alone (prompts, ids that they look for) stay around their model.
    """
    module = unwrapped(module)
    if not has_adapters(module):
        return module
    configs: Any = module.peft_config.values()  # type: ignore[operator, union-attr]
    for config in configs:
        reads_ids = config.peft_type in READ_IDS or getattr(config, "alora_invocation_tokens", None)
        if config.is_prompt_learning or reads_ids:
            return module
    inner: nn.Module = module.get_base_model()  # type: ignore[operator]
    return inner


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module inside is back in its own mode (a frozen part may have been in another)."""
    was_training = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in was_training:
            inner.training = training
