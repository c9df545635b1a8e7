"""Adapters as sums: of several with weights, and of those that have changed their base."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.adapter_names import base_tensors
from llm_trainer.checkpoint.weights import tensors_by_name
from llm_trainer.models.adapters import has_own_adapters

# How several adapters become one: their sum, which is exact, or as peft combines them (`add_weighted_adapter`).
SUM = "sum"
COMBINATIONS = (SUM, "linear", "svd", "ties")
KEPT = 0.2  # share of the numbers of each adapter that TIES keeps (Yadav et al. 2023, arXiv:2306.01708)


def weigh(adapted: Any, weights: Mapping[str, float]) -> None:
    """Let adapters compute together, each multiplied by its weight; those that are not named do not.

    The sum of W + w1 B1 A1 + w2 B2 A2 is exact: the ranks are not made one.

    Raises:
        ValueError: there is no adapter of such a name, or one is no sum with its layer.
    """
    _check_sums(adapted, weights)
    adapted.base_model.set_adapter(list(weights))
    for layer in adapted.modules():
        if has_own_adapters(layer):
            for name, weight in weights.items():
                layer.set_scale(name, weight)


def combine(adapted: Any, how: str) -> None:
    """Let one adapter compute that peft makes of several that were weighed; as a rule it is not their sum.

    Args:
        adapted: has them.
        how: one of `COMBINATIONS`, but the sum.

    Raises:
        ValueError: they cannot be combined so.
    """
    names = list(adapted.active_adapters)
    if len(names) < 2:
        raise ValueError(f"--combine {how}: found one adapter; expected several: --with DIR:WEIGHT, or --weights")
    density = None
    if how == "ties":
        density = KEPT
    try:
        adapted.base_model.add_weighted_adapter(
            names,
            [1.0] * len(names),
            "combined",
            combination_type=how,
            density=density,  # they are weighed already
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--combine {how}: peft refuses: {error}; expected --combine sum, which is exact") from error
    adapted.base_model.set_adapter(["combined"])


def _check_sums(adapted: Any, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: there is no adapter of such a name, or one is no sum with its layer.
    """
    known = adapted.peft_config
    for name in names:
        if name not in known:
            raise ValueError(f"adapters: found no {name!r}; expected some of {', '.join(known)}")
        config: Any = known[name]
        is_sum = config.peft_type == "LORA" and not config.use_dora and not config.target_parameters
        if not is_sum or config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"adapters: {name!r} is not only a sum with its layers (DoRA, experts, saved modules, or another method than "
                f"LoRA), so it cannot be multiplied by a weight; expected plain LoRA. Merge it by itself"
            )


class PlainLora(NamedTuple):
    """The content of a PEFT folder."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def plain_lora(
    adapted: Any, original: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> PlainLora:
    """Adapters whose initialisation has changed their base (PiSSA, OLoRA), as plain ones on the base as it was.

    The base W became W - s B0 A0, and W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]. B0 A0 is what the two bases differ in.

    Args:
        adapted: the adapters on the changed base, in fp32.
        original: the base as it was, in fp32.
        tensors: of the adapters' file, by key.
        config: their adapter_config.json.

    Raises:
        CheckpointError: the bases differ in something else, or the adapters are no sums with their layers.
    """
    if (
        config["peft_type"] != "LORA"
        or config.get("use_dora")
        or config.get("rank_pattern")
        or config.get("alpha_pattern")
    ):
        raise CheckpointError(
            "adapters that changed their base become plain ones only from LoRA of one rank without DoRA"
        )
    _check_rest(adapted, original)
    found, rank, scaling = dict(tensors), int(config["r"]), 1.0
    for name, layer in adapted.get_base_model().named_modules():  # type: ignore[operator]
        if not has_own_adapters(layer):
            continue
        scaling = layer.scaling["default"]
        key = f"base_model.model.{name}"
        key_a, key_b = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
        if key_a not in found:
            raise CheckpointError(f"the adapters of {name} are no plain product of two matrices")
        difference = original.get_submodule(name).weight - layer.get_base_layer().weight
        up, down = _product_of_rank(difference.detach(), rank, name)
        own_a, own_b = found[key_a], found[key_b]
        found[key_a] = torch.cat([own_a, (down / scaling).to(own_a.dtype)]).contiguous()
        found[key_b] = torch.cat([own_b, -up.to(own_b.dtype)], dim=1).contiguous()
    changed = {
        "r": 2 * rank,
        "lora_alpha": scaling * 2 * rank,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return PlainLora(found, {**config, **changed})


def _check_rest(adapted: Any, original: nn.Module) -> None:
    """
    Raises:
        CheckpointError: a weight without adapters is another one than before.
    """
    inner = adapted.get_base_model()
    with_adapters = {name for name, layer in inner.named_modules() if has_own_adapters(layer)}  # type: ignore[operator]
    before = tensors_by_name(original)
    for name, tensor in base_tensors(adapted).items():
        if name.removesuffix(".weight") in with_adapters:
            continue
        other = before.get(name)
        if other is None or not torch.equal(other, tensor):
            raise CheckpointError(f"{name} of the base is another one than before, and has no adapters")


def _product_of_rank(difference: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Two matrices `[O, R]`, `[R, I]` whose product is `difference [O, I]`.

    Raises:
        CheckpointError: there are none, by more than what 16 bits round.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(difference, q=min(rank + 8, *difference.shape), niter=4)
    up, down = left[:, :rank] * sizes[:rank].sqrt(), sizes[:rank, None].sqrt() * right[:, :rank].T
    if torch.linalg.norm(difference - up @ down) > 0.1 * torch.linalg.norm(difference):
        raise CheckpointError(f"the base differs from the one that it came from in more than the adapters of {name}")
    return up, down
