"""Optimizers: one visible table from names to builders, and which parameters decay.

`OPTIMIZERS` lists what `create_optimizer` knows; a new optimizer is one function and one line there. Memory plans and the
engines' checks ask the line.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from llm_trainer.models.quantize import hush
from llm_trainer.optim.multipliers import multiplied
from llm_trainer.optim.shards import block_of

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
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
        loss = _evaluate(closure)
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
        loss = _evaluate(closure)
        for half in self._halves:
            # Groups and state live here and are only lent: loading a state or re-pointing parameters replaces them.
            of_muon = isinstance(half, torch.optim.Muon)
            half.param_groups = [group for group in self.param_groups if group["use_muon"] == of_muon]
            half.state = self.state
            half.step()
        return loss


def _evaluate(closure: Closure | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _split_for_muon(params: Params) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split parameters or groups into (groups of matrices for Muon, groups of everything else)."""
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in _as_groups(params):
        not_matrices = {param for param in group["params"] if not _is_for_muon(param, group)}
        for part in separate(group, not_matrices):
            (matrices if part["use_muon"] else rest).append(part)
    return matrices, rest


def _is_for_muon(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    return bool(group.get("use_muon", True)) and parameter.ndim == 2


def _as_groups(params: Params) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as a list of groups whose `params` are lists."""
    entries = list(params)
    groups = [entry for entry in entries if isinstance(entry, dict)]
    if not groups:
        return [{"params": entries}]
    listed = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        listed.append({**group, "params": members})
    return listed


Group: TypeAlias = Mapping[str, Any]  # a parameter group with its hyperparameters


def _adam_state(parameter: Tensor, group: Group) -> int:
    """First and second moment, and with amsgrad the largest second moment so far."""
    return (3 if group.get("amsgrad") else 2) * parameter.numel()


def _one_moment(parameter: Tensor, group: Group) -> int:
    return parameter.numel()


def _sgd_state(parameter: Tensor, group: Group) -> int:
    return parameter.numel() if group["momentum"] else 0


def _muon_state(parameter: Tensor, group: Group) -> int:
    """A momentum for each hidden matrix; the rest is AdamW's."""
    state = _one_moment if _is_for_muon(parameter, group) else _adam_state
    return state(parameter, group)


def _adafactor_state(parameter: Tensor, group: Group) -> int:
    """A row and a column of statistics for each matrix `[..., R, C]`."""
    if parameter.ndim < 2:
        return parameter.numel()
    return sum(parameter.shape[-2:]) * parameter.shape[:-2].numel()


# bitsandbytes keeps a moment of a small parameter in 32 bits; of others it keeps a byte per value and a scale per block.
_SMALL, _BLOCK, _SCALE_BYTES = 4096, 256, 4


def _in_eight_bits(moments: int) -> Callable[[Tensor, Group], float]:
    """What so many moments in 8 bits are, in values of the parameter (Dettmers et al. 2021, arXiv 2110.02861)."""

    def state(parameter: Tensor, group: Group) -> float:
        count = parameter.numel()
        num_bytes = 4 * count
        if count >= _SMALL:
            num_bytes = count + _SCALE_BYTES * -(-count // _BLOCK)
        return moments * num_bytes / parameter.element_size()

    return state


def _rows_in_eight_bits(parameter: Tensor, group: Group) -> float:
    """Both moments of `AdamW8bitOfShards`, in values of the parameter."""
    count, block = parameter.numel(), block_of(parameter)
    num_bytes = 4 * count if block is None else count + _SCALE_BYTES * count // block
    return 2 * num_bytes / parameter.element_size()


@dataclass(frozen=True)
class InPackage:
    """A class that needs a package that may not be installed.

    Attributes:
        module: where it stands.
        name: of the class.
        package: that it needs.
    """

    module: str
    name: str
    package: str

    def load(self, optimizer_type: str) -> type[torch.optim.Optimizer]:
        """The class.

        Raises:
            ValueError: the package is not installed.
        """
        hush()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what torchao deprecates in itself
                import_module(self.package)
                module = import_module(self.module)
        except ImportError as error:
            without = ", ".join(name for name, recipe in OPTIMIZERS.items() if isinstance(recipe.build, type))
            raise ValueError(
                f"the optimizer {optimizer_type!r} needs the package {self.package}, which cannot be imported ({error}): pip "
                f"install {self.package}, or take one of {without}"
            ) from None
        found: type[torch.optim.Optimizer] = getattr(module, self.name)
        return found

    def is_class_of(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(
            kind.__name__ == self.name and kind.__module__.partition(".")[0] == self.module.partition(".")[0]
            for kind in type(optimizer).__mro__
        )


@dataclass(frozen=True)
class Recipe:
    """All that is known about one optimizer.

    Attributes:
        build: its class, or where it is to be had.
        uses: arguments that `create_optimizer` names and it takes, besides `lr` and `weight_decay`.
        options: arguments that only this optimizer understands.
        weight_decay, betas, momentum: vetted defaults.
        state: values that it keeps for a parameter of a group.
        scratch: values in fp32 that an update makes for each value of a parameter, on CPUs; those of one parameter at a time.
        takes_pieces: it may be given flat pieces of matrices, as ZeRO 1 to 3 hand them out.
        takes_shards: it may be given matrices whose rows lie on several devices, as FSDP2 does (`DTensor`).
        also: further classes that are known by this line.
        of_shards: the line that does the same where FSDP2 shards matrices; empty: this one.
    """

    build: type[torch.optim.Optimizer] | InPackage
    uses: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    state: Callable[[Tensor, Group], float] = _adam_state
    scratch: int = 0
    takes_pieces: bool = True
    takes_shards: bool = True
    also: tuple[type[torch.optim.Optimizer], ...] = ()
    of_shards: str = ""

    def is_of(self, optimizer: torch.optim.Optimizer, derived: bool) -> bool:
        """Whether it is of one of these classes, or, if `derived`, of one made of them."""
        if isinstance(self.build, InPackage):
            return self.build.is_class_of(optimizer)
        kinds = (self.build, *self.also)
        return isinstance(optimizer, kinds) if derived else type(optimizer) in kinds


_ADAM = ("betas", "eps", "fused")
OPTIMIZERS: dict[str, Recipe] = {
    "adamw": Recipe(torch.optim.AdamW, _ADAM, frozenset({"amsgrad"})),
    "adam": Recipe(torch.optim.Adam, _ADAM, frozenset({"amsgrad"})),
    # Not fused: sharded tensors (DTensor) have the fused kernels of Adam only.
    "sgd": Recipe(torch.optim.SGD, ("momentum",), frozenset({"nesterov", "dampening"}), state=_sgd_state),
    # A decay ten times AdamW's, for a learning rate a tenth of it (Chen et al. 2023, section 5).
    "lion": Recipe(Lion, ("betas",), weight_decay=0.1, betas=(0.9, 0.99), state=_one_moment),
    "muon": Recipe(
        Muon,
        (*_ADAM, "momentum"),
        frozenset({"nesterov"}),
        momentum=0.95,
        state=_muon_state,
        takes_pieces=False,
        also=(torch.optim.Muon,),
    ),
    "adafactor": Recipe(
        torch.optim.Adafactor,
        options=frozenset({"beta2_decay", "d"}),
        state=_adafactor_state,
        takes_pieces=False,
        takes_shards=False,  # torch does not offer its sums over rows and columns for DTensors
    ),
    # Their scales are of blocks of a whole parameter: a piece of one has others.
    "adamw8bit": Recipe(
        InPackage("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
        ("betas", "eps"),
        state=_in_eight_bits(2),
        scratch=5,  # gradient, both moments, and the root of one before and after its correction
        takes_pieces=False,
        takes_shards=False,
        of_shards="adamw8bit_fsdp",
    ),
    "adamw8bit_fsdp": Recipe(
        InPackage("llm_trainer.optim.shards", "AdamW8bitOfShards", "torchao"),
        ("betas", "eps"),
        state=_rows_in_eight_bits,
        scratch=7,  # weight and gradient in fp32, both moments, the root of one, and what is divided
        takes_pieces=False,
    ),
    "lion8bit": Recipe(
        InPackage("bitsandbytes.optim", "Lion8bit", "bitsandbytes"),
        ("betas",),
        weight_decay=0.1,
        betas=(0.9, 0.99),
        state=_in_eight_bits(1),
        scratch=4,  # gradient, momentum, and two on the way to the direction
        takes_pieces=False,
        takes_shards=False,
    ),
}


def recipe_of(optimizer: torch.optim.Optimizer) -> Recipe | None:
    """The line of `OPTIMIZERS` that `optimizer` belongs to; None: it is none of them."""
    exact = [recipe for recipe in OPTIMIZERS.values() if recipe.is_of(optimizer, derived=False)]
    derived = [recipe for recipe in OPTIMIZERS.values() if recipe.is_of(optimizer, derived=True)]
    return next(iter(exact + derived), None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that `optimizer` will keep for its parameters, each in the parameter's own precision.

    One that is none of `OPTIMIZERS` counts as Adam if it has betas, else as one value per parameter.
    """
    recipe = recipe_of(optimizer)
    if recipe is not None:
        state = recipe.state
    else:
        state = _adam_state if "betas" in optimizer.defaults else _one_moment
    num_bytes = 0.0
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        num_bytes += sum(state(parameter, group) * parameter.element_size() for parameter in trained)
    return int(num_bytes)


_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


def describe_kernel(optimizer: torch.optim.Optimizer) -> tuple[str, str] | None:
    """How `optimizer`, whose kernel was left open, updates, and why; None: there is nothing to choose from."""
    recipe = recipe_of(optimizer)
    if recipe is None or "fused" not in recipe.uses:
        return None
    device = optimizer.param_groups[0]["params"][0].device.type
    return _kernel(type(optimizer), device, any(group.get("fused") for group in optimizer.param_groups))


def kernel_on(name: str, device: str) -> tuple[str, str] | None:
    """The same of an optimizer that is not there yet: the one called `name`, on a kind of device such as 'cuda'."""
    recipe = _recipe_called(name)
    if "fused" not in recipe.uses or isinstance(recipe.build, InPackage):
        return None
    return _kernel(recipe.build, device, device in _FUSED_DEVICES)


def _kernel(kind: type[torch.optim.Optimizer], device: str, is_fused: bool) -> tuple[str, str]:
    if is_fused:
        return f"{kind.__name__}, fused", f"one kernel for the whole update on {device}"
    return kind.__name__, f"no fused kernel on {device}"


def slow_kernel(optimizer: torch.optim.Optimizer) -> str:
    """What is slow about an optimizer that the user has made; empty: nothing.

    It stays as it is. On a CPU torch's Adam and AdamW take an operation at a time unless they are told otherwise.
    """
    recipe = recipe_of(optimizer)
    if recipe is None or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return ""
    for group in optimizer.param_groups:
        is_open = group.get("fused") is None and group.get("foreach") is None and not group.get("differentiable")
        if not is_open or any(parameter.device.type != "cpu" for parameter in group["params"]):
            return ""
    name = type(optimizer).__name__
    return f"{name}, an operation at a time; {name}(..., fused=True) and configure_optimizer are 2 to 3 times faster"


def create_optimizer(
    params: Params,
    optimizer_type: str = "adamw",
    lr: float = 1e-3,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    momentum: float | None = None,
    fused: bool | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer called `optimizer_type` (a key of `OPTIMIZERS`, in any case).

    Args:
        params: parameters, or parameter groups such as `get_parameter_groups` returns.
        optimizer_type: `adamw`, `adam` (the decay is added to the gradient), `sgd`, `lion`, `muon`, or `adafactor` (row
            and column statistics in place of the second moment: least memory; Shazeer & Stern, arXiv 1804.04235).
            `adamw8bit` and `lion8bit` keep their moments in 8 bits (bitsandbytes); `adamw8bit_fsdp` does so for matrices that
            FSDP2 shards (torchao).
        lr: learning rate.
        betas: decay rates of the moments; `None`: (0.9, 0.999), and (0.9, 0.99) for lion.
        eps: added to the denominator of Adam's update; `None`: 1e-8.
        weight_decay: for groups that do not state their own; `None`: 0.01, and 0.1 for lion.
        momentum: of sgd and muon; `None`: 0 for sgd, 0.95 for muon.
        fused: one kernel per update of adam and adamw; `None`: wherever the parameters' device has it.
        **options: `amsgrad` (adam, adamw), `nesterov` (sgd, muon), `dampening` (sgd), `beta2_decay`, `d` (adafactor).

    Raises:
        ValueError: for an unknown name or option, a number out of its range, or no parameters at all.
    """
    recipe = _recipe_called(optimizer_type)
    unknown = options.keys() - recipe.options
    if unknown:
        known = ", ".join(sorted(recipe.options)) or "none of its own"
        raise ValueError(f"{optimizer_type!r} has no option {', '.join(sorted(unknown))}; its options: {known}")
    groups = _as_groups(params)
    tensors: list[Tensor] = sum((group["params"] for group in groups), [])
    if not tensors:
        raise ValueError("there is no parameter to optimize: is every parameter of the model frozen?")
    if fused and "fused" not in recipe.uses:
        having = ", ".join(sorted(name for name, other in OPTIMIZERS.items() if "fused" in other.uses))
        raise ValueError(f"fused: {optimizer_type!r} has no fused kernel, expected one of {having}; or leave fused out")
    if fused is None:
        fused = all(param.device.type in _FUSED_DEVICES and param.is_floating_point() for param in tensors)
    hyper: dict[str, Any] = {
        "lr": lr,
        "weight_decay": recipe.weight_decay if weight_decay is None else weight_decay,
        "betas": recipe.betas if betas is None else betas,
        "eps": 1e-8 if eps is None else eps,
        "momentum": recipe.momentum if momentum is None else momentum,
        "fused": fused,
    }
    _check(hyper)
    build = recipe.build.load(optimizer_type) if isinstance(recipe.build, InPackage) else recipe.build
    return build(groups, **{name: hyper[name] for name in ("lr", "weight_decay", *recipe.uses)}, **options)


def _recipe_called(name: str) -> Recipe:
    recipe = OPTIMIZERS.get(name.lower())
    if recipe is None:
        raise ValueError(f"unknown optimizer {name!r}; known optimizers: {', '.join(sorted(OPTIMIZERS))}")
    return recipe


def _check(hyper: dict[str, Any]) -> None:
    """Raise ValueError for the first number that is out of its range (also for NaN, which no comparison accepts)."""
    for name in ("lr", "weight_decay", "eps", "momentum"):
        if not hyper[name] >= 0:
            raise ValueError(f"{name} is {hyper[name]!r}, expected a number >= 0")
    if len(hyper["betas"]) != 2 or not all(0 <= beta < 1 for beta in hyper["betas"]):
        raise ValueError(f"betas is {hyper['betas']!r}, expected two numbers in [0, 1), such as (0.9, 0.999)")


def get_parameter_groups(
    model: nn.Module, weight_decay: float = 0.01, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Two groups: what decays and what does not. Matrices decay; biases and norm weights (1-D) do not.

    Embeddings and the LM head are matrices and decay, as in transformers. Frozen parameters are left out, tied ones
    come once, and a group without parameters is left out.

    Args:
        model: the model whose trainable parameters are grouped.
        weight_decay: of the first group; the second has 0.
        no_decay: pieces of parameter names that must not decay either, such as `("embed",)`.
    """
    decaying: list[Tensor] = []
    plain: list[Tensor] = []
    for name, param in model.named_parameters():  # yields a tied parameter once
        if param.requires_grad:
            is_exempt = param.ndim < 2 or any(piece in name for piece in no_decay)
            (plain if is_exempt else decaying).append(param)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def configure_optimizer(
    model: nn.Module,
    optimizer_type: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float | None = 0.01,
    no_decay: Sequence[str] = (),
    use_parameter_groups: bool = True,
    lr_multipliers: Mapping[str, float] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer for `model` with the groups of `get_parameter_groups`, or without them, so that all decay alike.

    `muon` gets the hidden matrices; embeddings and the LM head are tables of vectors, which its post says to leave to
    AdamW. A `weight_decay` of None is the optimizer's own. `lr_multipliers` are those of `multipliers.multiplied`, and
    `options` those of `create_optimizer`.
    """
    if weight_decay is None:
        weight_decay = _recipe_called(optimizer_type).weight_decay
    groups = get_parameter_groups(model, weight_decay, no_decay)
    if not use_parameter_groups:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    groups = multiplied(groups, model, lr, lr_multipliers or {})
    if optimizer_type.lower() == "muon":
        tables = vocabulary_tables(model)
        groups = sum((separate(group, tables) for group in groups), [])
    return create_optimizer(groups, optimizer_type, lr=lr, weight_decay=weight_decay, **options)


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
