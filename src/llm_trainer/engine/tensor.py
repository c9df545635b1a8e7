"""Tensor parallelism: the matrices of every layer split over neighbouring processes, by the plan of transformers models.

Megatron's scheme (Shoeybi et al. 2019, arXiv:1909.08053, section 3): the first matrices of attention and feed-forward are
sharded by columns and the last ones by rows, so that a layer needs two sums over the processes in its forward and two in
its backward. Every other parameter is replicated.
"""

import re
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llm_trainer.models.inside import transformers_model


class Replicated(ParallelStyle):
    """A module whose parameters are the same on every process.

    Args:
        dim: of its input and output that is sharded (the heads that a norm inside attention sees), for which the gradient
            of the parameters is the sum over the processes; None: input and output are replicated too.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.placement = Replicate() if dim is None else Shard(dim)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def wrap(value: Any) -> Any:
            return DTensor.from_local(value, device_mesh, [self.placement], run_check=False)

        def wrap_inputs(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> tuple:
            return tuple(wrap(value) if isinstance(value, Tensor) else value for value in inputs)

        def unwrap_output(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[self.placement]).to_local()

        return distribute_module(module, device_mesh, None, wrap_inputs, unwrap_output)  # type: ignore[arg-type]


STYLES: dict[str, Any] = {  # of transformers' plans
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "replicated_with_grad_allreduce": partial(Replicated, 2),  # norms of heads, [B, T, heads, D]
}


def split_layers(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the transformers model inside `module` over the processes of a one-dimensional `mesh`.

    Raises:
        ValueError: there is no such model, it has no plan, the plan has a part that is not known here, or its heads
            cannot be divided evenly.
    """
    model = transformers_model(module)
    plan: dict[str, str] = {} if model is None else model.config.base_model_tp_plan or {}
    if model is None or not plan:
        raise ValueError(
            f"tensor_parallel_size: {type(model or module).__name__} comes with no plan of how to split its layers "
            f"(base_model_tp_plan); use tensor_parallel_size 1"
        )
    _check(type(model).__name__, model.config, plan, mesh.size())
    body = cast(nn.Module, model.base_model)

    # 1. the body: what the plan names, and everything else that has parameters of its own
    styles: dict[str, ParallelStyle] = {}
    for name, inner in body.named_modules():
        wanted = next((style for pattern, style in plan.items() if _matches(pattern, name)), None)
        if wanted is not None:
            styles[name] = STYLES[wanted]()
        elif _has_own_parameters(inner):
            styles[name] = Replicated()
    parallelize_module(body, mesh, styles)

    # 2. around it: the head
    inside = set(body.modules())
    for inner in model.modules():
        if inner not in inside and _has_own_parameters(inner):
            parallelize_module(inner, mesh, Replicated())
    model.tie_weights()


def _has_own_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _check(name: str, config: Any, plan: dict[str, str], size: int) -> None:
    if unknown := sorted(set(plan.values()) - STYLES.keys()):
        raise ValueError(
            f"tensor_parallel_size: the plan of {name} asks for {', '.join(unknown)}, expected only "
            f"{', '.join(STYLES)}; use tensor_parallel_size 1"
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, heads) % size:
            raise ValueError(
                f"tensor_parallel_size: got {size}, expected a divisor of {heads}, {getattr(config, heads)} in {name}"
            )


def _matches(pattern: str, name: str) -> bool:
    """Whether a module's name fits a plan's, in which `*` stands for a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
