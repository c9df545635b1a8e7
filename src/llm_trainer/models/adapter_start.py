"""Initialisations of adapters that look at rows: EVA at what enters the layers, LoRA-GA at the gradient of the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.models.adapters import WAITS, has_own_adapters, library

_MOST_PASSES = 50  # over the rows


def awaited_init(model: nn.Module) -> str | None:
    """The initialisation for which the adapters of `model` still wait; None: they are as they begin."""
    return getattr(model, WAITS, None)


def begin_with_inputs(
    model: Any, batches: Sequence[Mapping[str, Any]], forward: Callable[[Mapping[str, Any]], object]
) -> None:
    """EVA (Paischer et al. 2024, arXiv:2410.07170): A begins with the main directions of what enters each layer.

    B stays 0, and all layers keep their rank. No random number is consumed.

    Args:
        model: as `adapt` made it.
        batches: of which the inputs at tokens with a label count, `input_ids [B, T]`, `labels [B, T]`, and perhaps
            `attention_mask [B, T]`. They are gone over until the directions settle.
        forward: lets the model see one of them.

    Raises:
        ValueError: no batch has enough such tokens, or the directions do not settle.
    """
    # 1. what peft looks at: it finds as many directions again as it needs, in each batch by itself
    described: Any = model.peft_config["default"]
    layers, ignored = layers_with_adapters(model), described.eva_config.label_mask_value
    needed = 2 * max(layer.r["default"] for layer in layers.values())
    seen, most = list[dict[str, Tensor]](), 0
    for number, batch in enumerate(batches):
        count = int((batch["labels"] != ignored).sum())
        most = max(most, count)
        if count >= needed:
            shown = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
            seen.append(shown | {"number": torch.tensor(number)})
    if not seen:
        raise ValueError(
            f"adapter_config.init: eva wants twice as many tokens with labels in one forward as the rank, {needed}, and the "
            f"first rows have {most}; expected a smaller rank, or longer rows (batches, of a loader)"
        )

    # 2. its directions
    forwards = 0

    def run(_: nn.Module, shown: Mapping[str, Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > _MOST_PASSES * len(seen):
            raise ValueError(
                f"adapter_config.init: eva found no directions that stay the same after {_MOST_PASSES} passes over the first "
                f"rows: what enters some layer has fewer than adapter_config.rank. Expected a smaller rank, or more and "
                f"more varied rows"
            )
        forward(batches[int(shown["number"])])

    found = library().get_eva_state_dict(
        model, seen, forward_fn=run, gather_distributed_inputs=False, show_progress_bar=False
    )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(found[name])
    delattr(model, WAITS)


def begin_with_gradients(model: Any, add_gradients: Callable[[], None]) -> None:
    """LoRA-GA (Wang et al. 2024, arXiv:2407.05000): B A begins along the gradient of the loss, and the base loses it.

    So nothing changes yet. No random number of the caller is consumed.

    Args:
        model: as `adapt` made it.
        add_gradients: runs forward and backward of some rows. The gradients of the adapted layers' own weights are taken,
            as many numbers as these have.

    Raises:
        ValueError: the loss of these rows does not reach a layer.
    """
    layers = layers_with_adapters(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        add_gradients()
        found = {name: weight.grad for name, weight in weights.items()}
    finally:
        model.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
        for weight in weights.values():
            weight.grad = None
    devices = {weight.device for weight in weights.values() if weight.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(sorted(devices, key=str)):
        torch.manual_seed(0)  # of the decomposition
        for name, layer in layers.items():
            gradient = found[name]
            if gradient is None or not gradient.any():
                raise ValueError(
                    f"adapter_config.init: lora_ga begins along the gradient of the first rows' loss, and this does not reach "
                    f"{name}; expected a target without it, or rows with labels"
                )
            _begin_along(layer, gradient, model.peft_config["default"])
    delattr(model, WAITS)


def _begin_along(layer: Any, gradient: Tensor, described: Any) -> None:
    """Let peft begin a layer's adapter along a gradient, and give the adapter its own type back: it takes that of the layer."""
    layer.get_base_layer()._peft_loraga_grad = gradient  # where peft's own `preprocess_loraga` puts it
    matrices = [layer.lora_A["default"], layer.lora_B["default"]]
    types = [matrix.weight.dtype for matrix in matrices]
    layer.lora_ga_init("default", described.lora_ga_config)
    for matrix, dtype in zip(matrices, types, strict=True):
        matrix.weight.data = matrix.weight.data.to(dtype)


def values_at_start(model: Any) -> list[Tensor]:
    """What an initialisation by rows may have changed: of each layer A, B and the weight below them."""
    found = []
    for layer in layers_with_adapters(model).values():
        for module in (layer.lora_A["default"], layer.lora_B["default"], layer.get_base_layer()):
            found.append(module.weight.data)
    return found


def layers_with_adapters(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if has_own_adapters(module)}
