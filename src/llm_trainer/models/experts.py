"""Mixtures of experts: how many experts a model has, the routers that send tokens to them, and what these choose."""

from collections.abc import Iterator
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_trainer.models.inside import language_config, transformers_model

# Of routers that are balanced by a bias on what they choose by, and not by a loss (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
BALANCING_BIAS = "e_score_correction_bias"


def dtype_when_sent(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a sampler gets a tensor of a model.

    Biases that balance routers stay as they are: they move in steps smaller than what 16 bits tell apart, and which expert is
    chosen turns on them.

    Args:
        name: of the tensor.
        tensor: as the model has it.
        dtype: that the sampler decodes in; None: as the model.
    """
    if dtype is None or not tensor.is_floating_point() or name.endswith(BALANCING_BIAS):
        return tensor.dtype
    return dtype


class Experts(NamedTuple):
    """The experts of each layer of a model, and how many of them a token is sent to."""

    number: int
    per_token: int


def expert_shape(model: nn.Module) -> Experts | None:
    """The experts of a transformers model in `model`, whatever its routers are; None: it has none.

    Raises:
        ValueError: a token is sent to more experts than there are.
    """
    pretrained = transformers_model(model)
    if pretrained is None:
        return None
    settings = language_config(pretrained.config).to_dict()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    number = next((settings[name] for name in names if settings.get(name)), None)
    if number is None or "num_experts_per_tok" not in settings:
        return None
    experts = Experts(number, settings["num_experts_per_tok"])
    if experts.per_token > experts.number:
        raise ValueError(
            f"num_experts_per_tok: the configuration of the {type(pretrained).__name__} sends each token to "
            f"{experts.per_token} experts, and a layer has {experts.number}; expected at most that many"
        )
    return experts


def experts_of(model: nn.Module) -> Experts | None:
    """The experts of a model whose routers choose by the probabilities of their logits, and show these; else None.

    Raises:
        ValueError: a token is sent to more experts than there are.
    """
    pretrained = transformers_model(model)
    if pretrained is None or is_balanced_by_a_bias(model):
        return None
    shows_logits = "output_router_logits" in language_config(pretrained.config).to_dict()
    return expert_shape(model) if shows_logits else None


def is_balanced_by_a_bias(model: nn.Module) -> bool:
    """Whether the routers of `model` add a bias to what they choose by."""
    names = chain(model.named_buffers(), model.named_parameters())
    return any(name.endswith(BALANCING_BIAS) for name, _ in names)


def biased_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers that a bias of their own balances, by name and in the order of the layers, where it can be moved.

    Empty where the bias is elsewhere or is trained by gradients, or where a router does not say what it has chosen.
    """
    found = {}
    for name, module in recorded_routers(model).items():
        if isinstance(module._buffers.get(BALANCING_BIAS), Tensor):
            found[name] = module
    biases = [
        name for name, _ in chain(model.named_buffers(), model.named_parameters()) if name.endswith(BALANCING_BIAS)
    ]
    return found if len(found) == len(biases) else {}


def recorded_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of which transformers records `router_logits`, by name and in the order of the layers."""
    kinds: list[type[nn.Module]] = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                kinds.append(kind)
    found = {}
    for name, module in model.named_modules():
        if any(type(module) is kind for kind in kinds) and type(module) is not nn.Linear:
            found[name] = module
    return found


def fused_experts(model: nn.Module) -> Iterator[str]:
    """Names of the parameters `[E, ., .]` that hold a matrix of every expert."""
    for name, module in model.named_modules():
        if "experts" in name.split(".") or "Experts" in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{name}.{own}"


def set_experts(model: nn.Module, how: str) -> None:
    """Have the experts of a model computed by one grouped product ('grouped_mm') or one after the other ('eager').

    Args:
        how: 'auto': as transformers chooses, which is grouped wherever there is a kernel.

    Raises:
        ValueError: the model has no experts that can be computed in several ways.
    """
    pretrained = transformers_model(model)
    if how == "auto" or pretrained is None:
        return
    if next(fused_experts(model), None) is None or not pretrained._can_set_experts_implementation():
        raise ValueError(
            f"run_config.experts: got {how!r}, but a {type(pretrained).__name__} has no experts whose products can be chosen; "
            f"expected auto"
        )
    pretrained.set_experts_implementation(how)


def describe_experts(model: nn.Module) -> tuple[str, str] | None:
    """How the experts of a model are computed, and why; None: it has none, or computes them in a way of its own."""
    pretrained = transformers_model(model)
    if pretrained is None or next(fused_experts(model), None) is None:
        return None
    found = language_config(pretrained.config)._experts_implementation
    whys = {
        "grouped_mm": "one product for all experts of a layer",
        "eager": "one after the other; torch has no other here",
    }
    return (found, whys[found]) if found in whys else None


def replayed_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of `model`, in the order of the layers, whose weights can be told for experts that they did not choose.

    Raises:
        ValueError: they are not there, or their own weights are not those of `weights_of`, tried out on a few tokens.
    """
    routers = list(recorded_routers(model).values())
    for router in routers:
        weight = router._parameters.get("weight")
        if weight is None or weight.dim() != 2 or len(signature(router.forward).parameters) != 1:
            routers = []
            break
        if weight.is_meta:
            continue
        tokens = torch.linspace(-1, 1, 4 * weight.shape[1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            output = router(tokens.view(4, -1))
        if len(output) != 3 or not torch.equal(weights_of(router, output[0], output[2]).to(output[1]), output[1]):
            routers = []
            break
    if not routers:
        raise ValueError(
            f"replay_routes: the routers of a {type(model).__name__} are not of a kind whose routes can be told"
        )
    return routers


def weights_of(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """`[N, K]` how much the experts `chosen [N, K]` count, by `logits [N, E]`, whoever has chosen them: as routers say it."""
    if BALANCING_BIAS in router._buffers:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1, dtype=torch.float32)
    weights = scores.gather(1, chosen)
    if vars(router).get("norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * vars(router).get("routed_scaling_factor", 1.0)


class Routes:
    """Sees which experts the routers of a model choose, and may tell them which ones to take.

    Attributes:
        chosen: `[N, K]` of each layer, of the last forward.
        told: `[N, L * K]` or wider, the experts that each token takes in all layers; -1: those that it chooses. None: it
            chooses all. The weights of experts that are told are those of the live logits, with gradients (R3, Ma et al.
            2025, arXiv:2510.11370). It stays for the recomputation of the forward that was told, until the next one.
        is_inside: whether that forward is under way. Else only routers in training are told, by their recomputation: who calls
            the model itself, to sample or to evaluate, is not meant.

    Args:
        routers: in the order of the layers. Each returns logits `[N, E]`, weights `[N, K]` and the experts chosen, `[N, K]`.
    """

    def __init__(self, routers: list[nn.Module]) -> None:
        self.chosen: list[Tensor] = [Tensor() for _ in routers]
        self.told: Tensor | None = None
        self.is_inside = False
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._see, layer))

    def _see(self, layer: int, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = output
        if self.told is not None and (self.is_inside or router.training):
            own = chosen.shape[1]
            told = self.told[:, layer * own : (layer + 1) * own]
            is_told = told[:, :1] >= 0
            chosen = torch.where(is_told, told, chosen)
            weights = torch.where(is_told, weights_of(router, logits, chosen).to(weights.dtype), weights)
        # With recomputation it comes twice, with the same routes.
        self.chosen[layer] = chosen.detach()
        return logits, weights, chosen
