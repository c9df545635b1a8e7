"""Optimizers: one visible table from names to builders.

`OPTIMIZERS` lists what `create_optimizer` knows; a new optimizer is one function and one line there. Memory plans and the
engines' checks ask the line.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.models.quantize import hush
from llm_trainer.optim.groups import Params, as_groups, get_parameter_groups
from llm_trainer.optim.multipliers import multiplied
from llm_trainer.optim.own import Lion, Muon, separate, vocabulary_tables
from llm_trainer.optim.state_size import (
    Group,
    adafactor_state,
    adam_state,
    in_eight_bits,
    muon_state,
    one_moment,
    rows_in_eight_bits,
    sgd_state,
)


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
    state: Callable[[Tensor, Group], float] = adam_state
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
    "sgd": Recipe(torch.optim.SGD, ("momentum",), frozenset({"nesterov", "dampening"}), state=sgd_state),
    # A decay ten times AdamW's, for a learning rate a tenth of it (Chen et al. 2023, section 5).
    "lion": Recipe(Lion, ("betas",), weight_decay=0.1, betas=(0.9, 0.99), state=one_moment),
    "muon": Recipe(
        Muon,
        (*_ADAM, "momentum"),
        frozenset({"nesterov"}),
        momentum=0.95,
        state=muon_state,
        takes_pieces=False,
        also=(torch.optim.Muon,),
    ),
    "adafactor": Recipe(
        torch.optim.Adafactor,
        options=frozenset({"beta2_decay", "d"}),
        state=adafactor_state,
        takes_pieces=False,
        takes_shards=False,  # torch does not offer its sums over rows and columns for DTensors
    ),
    # Their scales are of blocks of a whole parameter: a piece of one has others.
    "adamw8bit": Recipe(
        InPackage("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
        ("betas", "eps"),
        state=in_eight_bits(2),
        scratch=5,  # gradient, both moments, and the root of one before and after its correction
        takes_pieces=False,
        takes_shards=False,
        of_shards="adamw8bit_fsdp",
    ),
    "adamw8bit_fsdp": Recipe(
        InPackage("llm_trainer.optim.shards", "AdamW8bitOfShards", "torchao"),
        ("betas", "eps"),
        state=rows_in_eight_bits,
        scratch=7,  # weight and gradient in fp32, both moments, the root of one, and what is divided
        takes_pieces=False,
    ),
    "lion8bit": Recipe(
        InPackage("bitsandbytes.optim", "Lion8bit", "bitsandbytes"),
        ("betas",),
        weight_decay=0.1,
        betas=(0.9, 0.99),
        state=in_eight_bits(1),
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
        state = adam_state if "betas" in optimizer.defaults else one_moment
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
    groups = as_groups(params)
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
