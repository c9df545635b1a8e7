"""The configuration that DeepSpeed is given, and how a model is made ready for it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from llm_trainer.config.deepspeed import DsConfig
from llm_trainer.engine.device import DTYPES
from llm_trainer.models.inside import transformers_models

# What DeepSpeed wants to know beforehand and the loop decides step by step. More than one micro-batch makes it ready to
# add up offloaded gradients; neither number scales anything here.
BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
OF_THE_TRAINER = {"optimizer", "scheduler", "train_batch_size", *BATCH}


class DeepSpeedError(ValueError):
    """DeepSpeed cannot do what is asked for."""


def complete(given: Mapping[str, Any] | None, precision: str) -> tuple[dict[str, Any], str]:
    """DeepSpeed's JSON (None: ZeRO-2) with what this engine decides, and the precision that it then computes in.

    A `bf16` or `fp16` section that is switched on keeps the weights themselves in 16 bits, with fp32 copies in the
    optimizer. Without one, `precision` means what it means everywhere: bf16 multiplies in 16 bits on fp32 weights
    (autocast); only fp16, which needs a loss scale, is then DeepSpeed's own.

    Raises:
        DeepSpeedError: the JSON decides what the trainer decides.
    """
    given = DsConfig().to_json() if given is None else _without_auto(given)
    if decided := sorted(OF_THE_TRAINER & given.keys()):
        raise DeepSpeedError(
            f"deepspeed: got {', '.join(decided)}, which the trainer decides: expected neither optimizer, scheduler nor "
            "batch sizes; give them to the trainer (optim_config, batch_size, gradient_accumulation_steps)"
        )
    own = next((name for name in DTYPES if given.get(name, {}).get("enabled")), None)
    config: dict[str, Any] = {
        **given,
        **BATCH,
        "gradient_clipping": 0.0,  # the loop says at each step
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if own is None and precision == "bf16":
        # In modules that are called safe, gradients would be exchanged in 16 bits.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif own is None and precision == "fp16":
        config["fp16"] = {"enabled": True}
    if stage_of(config) == 0 and (own or precision) == "fp16":
        raise DeepSpeedError(  # 0.19.8 divides gradients by the scale there, and does not multiply the loss by it
            "deepspeed: got fp16 with ZeRO stage 0, which scales no loss; use stage 1, 2 or 3, or bf16"
        )
    return config, own or precision


def _without_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON without what it leaves to the trainer, as the JSON for transformers does: `"auto"` at any depth."""
    kept = {}
    for key, value in given.items():
        inner = _without_auto(value) if isinstance(value, Mapping) else value
        if value != "auto" and (inner or not value):  # a section with nothing else in it says nothing
            kept[key] = inner
    return kept


def stage_of(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's JSON."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def describe(config: Mapping[str, Any]) -> str:
    """What DeepSpeed's JSON asks for, in a few words."""
    words = [f"ZeRO-{stage_of(config)}"]
    for name in ("offload_optimizer", "offload_param"):
        section = config.get("zero_optimization", {}).get(name)
        if section:
            words.append(f"{name} to {section.get('device')}")
    words += [f"{name} weights" for name in DTYPES if config.get(name, {}).get("enabled")]
    if "activation_checkpointing" in config:
        words.append("recomputed activations")
    return ", ".join(words)


def recompute_layers(module: nn.Module, recompute: Callable[..., Any]) -> None:
    """Let the layers of a transformers model keep only their inputs, and `recompute` the rest in the backward.

    Raises:
        DeepSpeedError: there is no such model in `module`.
    """
    models = [model for model in transformers_models(module) if model.supports_gradient_checkpointing]
    if not models:
        raise DeepSpeedError(
            f"deepspeed: activation_checkpointing needs a transformers model that can recompute its layers, this is "
            f"{type(module).__name__}; call deepspeed.checkpointing.checkpoint in its forward and drop the section"
        )
    for model in models:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)


def gather_with_callers(
    module: nn.Module,
    register: Callable[[nn.Module, nn.Parameter], None],
    gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]],
) -> None:
    """Have ZeRO-3 gather the parameters that vision-language models themselves have, such as what LLaVA-Next puts between
    the rows of an image, also where features of images are made before the forward in which it would gather them.

    That is in the forwards of the modules around them, and, without gradients, wherever else all ranks ask for features.

    Args:
        module: with all models inside.
        register: DeepSpeed's `register_external_parameter`.
        gathered: its `GatheredParameters`.
    """
    models = list(transformers_models(module))
    for model in models:
        own = list(model.parameters(recurse=False))
        if not own or getattr(model, "get_image_features", None) is None:
            continue
        for caller in module.modules():
            is_around = any(inner is model for inner in caller.modules())
            if is_around and not any(caller is inner for inner in models):
                for parameter in own:
                    register(caller, parameter)
        _gather_for_features(model, own, gathered)


def _gather_for_features(
    model: Any, own: list[nn.Parameter], gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
) -> None:
    make_features = model.get_image_features

    @wraps(make_features)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or all(parameter.numel() for parameter in own):  # they are gathered already
            return make_features(*args, **kwargs)
        with gathered(own):
            return make_features(*args, **kwargs)

    model.get_image_features = call


class _TiedTogether(torch.autograd.Function):
    """The tensors it is given; in the backward each has a gradient as soon as one of them has."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


def tied_together(outputs: Any) -> Any:
    """What a module returned, as one for the backward.

    ZeRO-3 runs a hook for each tensor that a gradient comes back to, and its ranks must run the same hooks, also those
    whose micro-batch only fills up the step and goes back from other tensors than a loss does.
    """
    leaves, structure = tree_flatten(outputs)
    chosen = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if chosen:
        for i, tensor in zip(chosen, _TiedTogether.apply(*(leaves[i] for i in chosen)), strict=True):
            leaves[i] = tensor
    return tree_unflatten(leaves, structure)
