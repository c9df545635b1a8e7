"""The model that a policy is compared with: a frozen copy, or the policy itself as it was before it learned."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from llm_trainer.models.experts import is_balanced_by_a_bias
from llm_trainer.models.heads import evaluating, logits_of
from llm_trainer.models.inside import has_adapters
from llm_trainer.models.quantize import num_values

LITTLE = 0.2  # share of a model's parameters up to which copies of those that are trained stand for a copy of all
Context = AbstractContextManager[Any]
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # of LoRA's initialisations


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is now, without gradients and in evaluation mode."""
    return freeze(deepcopy(model))


def freeze(model: nn.Module) -> nn.Module:
    """`model` itself, without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()


def choose_reference(model: nn.Module, ref_model: nn.Module | None, which: str) -> tuple[nn.Module, bool]:
    """What a policy is compared with, and whether both must say the same at the start.

    `model` itself stands for what it was (`StartingPoint`); else a frozen copy is made, of it as it is now.

    Args:
        model: the policy.
        ref_model: what the user names; None: nothing.
        which: 'start', or 'base', the policy without its adapters.

    Raises:
        ValueError: the user names the policy itself, or two references, or there is no such base.
    """
    if ref_model is model:
        raise ValueError(
            "ref_model is the policy itself, which changes while it learns; expected another model, or None for the policy as "
            "it is now"
        )
    if which == "base":
        check_base(model, has_model=ref_model is not None)
        return model, False  # adapters may have learned before
    if ref_model is not None:
        return ref_model, same_weights(model, ref_model)
    if learns_little(model):
        return model, not drops_out(model)
    return frozen_copy(model), True


def why_not_base(model: nn.Module) -> str:
    """Why a policy with its adapters off is not the base that it was made of, in words; empty: it is."""
    if not has_adapters(model):
        return f"a {type(model).__name__} has none"
    for name, config in model.peft_config.items():  # type: ignore[union-attr,operator]
        how = getattr(config, "init_lora_weights", True)
        if how not in KEEP_THE_BASE:
            return f"the initialisation of the adapter '{name}', {how!r}, changes the base"
        if getattr(config, "bias", "none") != "none":
            return f"the adapter '{name}' trains biases of the base, which stay"
    # What is trained beside the adapters would go on learning: tried out, for there are many kinds of them.
    with evaluating(model), model.disable_adapter():  # type: ignore[operator]
        device = next(model.parameters()).device
        outputs = logits_of(model(torch.tensor([[0, 1]], device=device)), type(model).__name__)
    return "parameters beside them are trained, which cannot be switched off" if outputs.requires_grad else ""


def check_base(model: nn.Module, has_model: bool) -> None:
    """Say why the policy with its adapters off cannot be the reference.

    Args:
        model: the policy.
        has_model: the user names another reference.

    Raises:
        ValueError: then, and where that is not the base that the policy was made of.
    """
    if has_model:
        raise ValueError(
            "reference: got 'base', the policy with its adapters off, and a model to compare with (ref_model, "
            "ref_model_checkpoint); leave one of the two out"
        )
    why = why_not_base(model)
    if why:
        raise ValueError(
            f"reference: got 'base', the policy with its adapters off, but {why}. Expected reference: start, the policy as it "
            f"is where the run begins, or a model to compare with (ref_model, ref_model_checkpoint)"
        )


def learns_little(model: nn.Module) -> bool:
    """Whether so few of a model's parameters are trained that copies of these alone say what it was before.

    Running statistics change with them and are no parameters, so that a model which has some is copied whole; so is one whose
    routers a bias balances, but under adapters, where it stays.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(num_values(parameter) for parameter in model.parameters())
    has_statistics = any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
    has_statistics |= is_balanced_by_a_bias(model) and not has_adapters(model)
    return 0 < trained <= LITTLE * total and not has_statistics


def drops_out(model: nn.Module) -> bool:
    """Whether a part of `model`, such as its adapters, drops something out in training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name the parameters of `model` that are trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class StartingPoint(nn.Module):
    """The policy as it was where the run began, or with its adapters off, called like a reference model.

    It is no second model: its forward is the policy's own, in a context in which that is what it was.

    Args:
        model: the user's module.
        policy: the module around it that is called, as the engine has wrapped it.
        knows_branches: that of the policy's `ScoredModel`.
        which: 'start', the policy as it is now; or 'base', with its adapters off.
        hold: keeps values of parameters (`machine.Machine.hold`).

    Attributes:
        description: of what it is, for people.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: nn.Module,
        knows_branches: Callable[[torch.device], bool],
        which: str,
        hold: Callable[[Mapping[str, nn.Parameter], nn.Module], Callable[[], Context]],
    ) -> None:
        super().__init__()
        self.knows_branches = knows_branches
        self._models = model, policy  # a tuple, so that no parameter gets a second name
        trained = trained_parameters(model)
        self._trained = trained.keys()
        if which == "base":
            hold({}, self)  # nothing to keep, but all ranks call it together
            self._as_it_was: Callable[[], Context] = model.disable_adapter  # type: ignore[assignment]
            self.description = "the policy with its adapters off"
        else:
            self._as_it_was = hold(trained, self)
            self.description = "the policy where the run began"

    @property
    def policy(self) -> nn.Module:
        """What is called, as the engine has wrapped it."""
        return self._models[1]

    def forward(self, **inputs: Any) -> Any:
        """What the policy returned then, without dropout and without gradients.

        Raises:
            ValueError: parameters are trained by now that were not when it was made.
        """
        model, policy = self._models
        later = sorted(trained_parameters(model).keys() - self._trained)
        if later:
            raise ValueError(
                f"the reference is the policy where the run began, of which it keeps the parameters that were trained when the "
                f"trainer was made; {len(later)} more are trained now, such as {later[0]}. Expected them to be trained "
                f"(requires_grad) from the beginning, with a learning rate of 0 for as long as they are to stay, or a ref_model"
            )
        with torch.no_grad(), evaluating(policy), self._as_it_was():
            return policy(**inputs)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have parameters of the same names and values."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if ours.keys() != theirs.keys():
        return False
    return all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def fingerprint(model: nn.Module) -> str:
    """A short key of a model's weights: of names, shapes, sums and sums of squares of its parameters."""
    key = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        sums = torch.stack([values.sum(), values.square().sum()]).tolist()
        key.update(f"{name} {tuple(parameter.shape)} {sums}\n".encode())
    return key.hexdigest()[:16]
