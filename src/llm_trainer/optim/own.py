"""Optimizers that torch does not have: Lion, and Muon with AdamW for what is no hidden matrix."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from llm_trainer.optim.groups import Params, as_groups

Closure: TypeAlias = Callable[[], float]


class Lion(torch.optim.Optimizer):
    """Lion: the sign of an interpolated momentum, one state tensor per parameter (Chen et al. 2023, arXiv 2302.06675).

    With momentum m and gradient g of the parameter's shape, and sign(0) = 0::

        p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g)
        m <- b2 m + (1 - b2) g

    Every entry moves by `lr`, so a good `lr` is 3 to 10 times smaller than AdamW's and `weight_decay` as much larger.
    """

    def __init__(
        self, params: Params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure`, if given, recomputes the loss that is returned."""
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"]
                direction = momentum.lerp(param.grad, 1 - beta1).sign_()
                param.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                momentum.lerp_(param.grad, 1 - beta2)
        return loss


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, as one optimizer with one `state_dict`.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix. Its update is scaled
    by 0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one
    `lr` and one `weight_decay`, tuned for AdamW, serve both halves.

    A parameter goes to Muon if it has two dimensions and its group does not say `"use_muon": False`, as
    `configure_optimizer` does for embeddings and the LM head.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        fused: bool = False,
    ) -> None:
        matrices, rest = _split_for_muon(params)
        inner: list[torch.optim.Optimizer] = []
        if matrices:
            inner.append(
                torch.optim.Muon(matrices, lr, weight_decay, momentum, nesterov, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            inner.append(torch.optim.AdamW(rest, lr, betas, eps, weight_decay, fused=fused))
        super().__init__(sum((half.param_groups for half in inner), []), {})
        self._halves = inner

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure`, if given, recomputes the loss that is returned."""
        loss = evaluate(closure)
        for half in self._halves:
            # Groups and state live here and are only lent: loading a state or re-pointing parameters replaces them.
            of_muon = isinstance(half, torch.optim.Muon)
            half.param_groups = [group for group in self.param_groups if group["use_muon"] == of_muon]
            half.state = self.state
            half.step()
        return loss


def evaluate(closure: Closure | None) -> float | None:
    """The loss that a step returns; None where no closure computes one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _split_for_muon(params: Params) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split parameters or groups into (groups of matrices for Muon, groups of everything else)."""
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in as_groups(params):
        not_matrices = {param for param in group["params"] if not is_for_muon(param, group)}
        for part in separate(group, not_matrices):
            (matrices if part["use_muon"] else rest).append(part)
    return matrices, rest


def is_for_muon(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    return bool(group.get("use_muon", True)) and parameter.ndim == 2


def vocabulary_tables(model: nn.Module) -> set[Tensor]:
    """Embedding weights, and linear weights shaped [V, D] like the tallest of them: the LM head when it is not tied."""
    tables: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        return set()
    shape = max((table.shape for table in tables), key=lambda shape: shape[0])
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == shape]
    return {*tables, *heads}


def separate(group: dict[str, Any], tables: set[Tensor]) -> list[dict[str, Any]]:
    """Split one group into (the rest, for Muon) and (`tables`, for AdamW), dropping an empty part."""
    matrices = [parameter for parameter in group["params"] if parameter not in tables]
    others = [parameter for parameter in group["params"] if parameter in tables]
    parts = [{**group, "params": matrices, "use_muon": True}, {**group, "params": others, "use_muon": False}]
    return [part for part in parts if part["params"]]
