"""Lesson 2: optimizers. A gradient g says how the loss changes with a parameter p; an optimizer says what p becomes.

Everything is elementwise: each state tensor has the shape of its parameter.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SGDFromScratch:
    """Stochastic gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013).

    Args:
        params: the parameters, each of any shape.
        lr: learning rate.
        momentum: how much of the previous direction is kept; 0 for none.
        weight_decay: pulls parameters towards 0, added to the gradient (the derivative of weight_decay / 2 * p^2).
        nesterov: look one step ahead along the momentum.
        dampening: the part of each new gradient that does not enter the momentum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, found {momentum} and {dampening}")
        self.params = [p for p in params if p.requires_grad]
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.dampening = dampening
        self.velocity: dict[int, Tensor] = {}  # index of a parameter -> its velocity, made when first needed

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            # g = dL/dp + wd p
            g = p.grad + self.weight_decay * p  # shape of p
            if self.momentum != 0:
                if i not in self.velocity:
                    # v_1 = g: the first velocity is the whole gradient, not a dampened one
                    self.velocity[i] = g.clone()
                else:
                    # v <- mu v + (1 - dampening) g
                    self.velocity[i] = self.momentum * self.velocity[i] + (1 - self.dampening) * g
                # Nesterov: g <- g + mu v (the gradient, and where momentum will carry us).  Otherwise: g <- v
                g = g + self.momentum * self.velocity[i] if self.nesterov else self.velocity[i]
            # p <- p - lr g
            p -= self.lr * g

    def zero_grad(self) -> None:
        """Forget the gradients: backward() adds to what is there."""
        for p in self.params:
            p.grad = None

    def get_lr(self) -> float:
        """The learning rate of the next step."""
        return self.lr

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.lr = lr

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything the next step depends on besides the parameters and the fixed settings."""
        return {"lr": self.lr, "velocity": {i: v.clone() for i, v in self.velocity.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, with the same parameters in the same order."""
        self.lr = state["lr"]
        self.velocity = {i: v.to(self.params[i].device, copy=True) for i, v in state["velocity"].items()}


class AdamWFromScratch:
    """AdamW: Adam (Kingma & Ba 2014, arXiv 1412.6980) with decoupled weight decay (Loshchilov & Hutter 2017).

    arXiv 1711.05101. Dividing a gradient by its own typical size makes steps of about `lr`, whatever its scale.

    Args:
        params: the parameters, each of any shape.
        lr: learning rate.
        betas: (beta1, beta2), the part of the running means of g and g^2 that is kept each step.
        eps: keeps the division finite where the gradient is 0.
        weight_decay: shrinks p by lr * weight_decay each step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.t: dict[int, int] = {}  # index of a parameter -> its number of updates
        self.m: dict[int, Tensor] = {}  # ... -> running mean of g
        self.v: dict[int, Tensor] = {}  # ... -> running mean of g^2

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; for the others no time passes."""
        beta1, beta2 = self.betas
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            g = p.grad  # shape of p, as are m and v
            if i not in self.t:
                # t_0 = 0, m_0 = 0, v_0 = 0
                self.t[i], self.m[i], self.v[i] = 0, torch.zeros_like(p), torch.zeros_like(p)
            # t <- t + 1
            self.t[i] += 1
            # p <- p - lr wd p: the decay acts on p itself; through g it would be divided by sqrt(v) like all of g
            p -= self.lr * self.weight_decay * p
            # m <- b1 m + (1 - b1) g
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            # v <- b2 v + (1 - b2) g^2
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
            # m^ = m / (1 - b1^t): after t steps from 0, the weights inside m only add up to 1 - b1^t
            m_hat = self.m[i] / (1 - beta1 ** self.t[i])
            # v^ = v / (1 - b2^t)
            v_hat = self.v[i] / (1 - beta2 ** self.t[i])
            # p <- p - lr m^ / (sqrt(v^) + eps)
            p -= self.lr * m_hat / (v_hat.sqrt() + self.eps)

    def zero_grad(self) -> None:
        """Forget the gradients: backward() adds to what is there."""
        for p in self.params:
            p.grad = None

    def get_lr(self) -> float:
        """The learning rate of the next step."""
        return self.lr

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.lr = lr

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything the next step depends on besides the parameters and the fixed settings."""
        return {
            "lr": self.lr,
            "t": dict(self.t),
            "m": {i: m.clone() for i, m in self.m.items()},
            "v": {i: v.clone() for i, v in self.v.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, with the same parameters in the same order."""
        self.lr = state["lr"]
        self.t = dict(state["t"])
        self.m = {i: m.to(self.params[i].device, copy=True) for i, m in state["m"].items()}
        self.v = {i: v.to(self.params[i].device, copy=True) for i, v in state["v"].items()}
