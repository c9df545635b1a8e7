"""AdamW with moments in 8 bits, of matrices whose rows lie on several devices (FSDP2); the arithmetic is torchao's.

torchao's own optimizer cuts what a process holds into blocks of 256 values with a scale each, so that blocks depend on how
many processes there are, and its state is a tensor of a kind of its own. Here a block never leaves a row, and codes and
scales are plain tensors with a row for each row of the parameter. So a checkpoint holds the same on any number of processes.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from llm_trainer.optim.own import Closure, evaluate

SMALLEST = 4096  # values; the moments of smaller parameters stay in fp32
BLOCKS = (256, 128, 64)  # values with one scale: the first that divides a row
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # -> whether it has a sign
PACKAGE = "torchao"


def block_of(parameter: Tensor) -> int | None:
    """How many values of a parameter's moment have one scale, wherever its rows lie; None: it stays in fp32."""
    if parameter.ndim < 2 or parameter.numel() < SMALLEST:
        return None
    width = parameter.shape[1:].numel()
    return next((block for block in BLOCKS if width % block == 0), None)


class AdamW8bitOfShards(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), its moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861).

    The state of a parameter `[R, ...]`: `exp_avg`, `exp_avg_sq` of its shape, uint8, and `exp_avg_scale`,
    `exp_avg_sq_scale` `[R, blocks of a row]`; or the first two alone, in fp32.

    Attributes:
        of_rows: state that has a row for each row of its parameter, but not its shape.
    """

    of_rows = tuple(f"{name}_scale" for name in MOMENTS)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """
        Raises:
            ImportError: torchao is missing.
        """
        self._quantized = import_module(f"{PACKAGE}.optim.subclass_8bit")
        self._update = import_module(f"{PACKAGE}.optim.adam").single_param_adam
        self._values: dict[tuple[bool, torch.device], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure`, if given, recomputes the loss that is returned."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        if "exp_avg" not in state:
            raise ValueError(
                f"optimizer: the checkpoint holds {', '.join(sorted(state))} of a parameter, the state of another optimizer, "
                f"which this one cannot go on with; expected that optimizer (bitsandbytes' adamw8bit has engine: torch), or a "
                f"new run from the weights (init_weights_path)"
            )
        state["step"] += 1
        if not _local(parameter).numel():
            return  # its rows are all elsewhere
        arguments = (
            _local(parameter),
            _local(parameter.grad),
            state["step"],
            *(self._moment(state, name) for name in MOMENTS),
            None,  # no largest second moment
            torch.tensor(float(group["lr"])),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,  # the decay is not a part of the gradient
            False,  # weights are not rounded at random
        )
        if not _local(parameter).is_cuda:
            self._update(*arguments)
            return
        # As torchao has it: one kernel for each shape, of which there may be many.
        with torch._dynamo.utils.disable_cache_limit():
            torch.compile(self._update, fullgraph=True, dynamic=False)(*arguments)

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Moments of 0."""
        state["step"] = torch.tensor(0.0)
        block = block_of(parameter)
        for name in MOMENTS:
            if block is None:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                continue
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{name}_scale"] = _zeros_by_row(parameter, parameter.shape[1:].numel() // block)

    def _moment(self, state: dict[str, Any], name: str) -> Tensor:
        """What of a moment this process holds, as torchao reads and writes it."""
        codes, scale = _local(state[name]), state.get(f"{name}_scale")
        if scale is None:
            return codes
        signed = MOMENTS[name]
        values = self._values_of_codes(signed, codes.device)
        found: Tensor = self._quantized.OptimState8bit(codes, _local(scale).view(-1), values, signed, torch.float32)
        return found

    def _values_of_codes(self, signed: bool, device: torch.device) -> Tensor:
        """`[256]`, brought to each device once: a copy for each moment in each step would be waited for."""
        key = signed, device
        if key not in self._values:
            values = self._quantized.get_qmap_signed() if signed else self._quantized.get_qmap_unsigned()
            self._values[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._values[key]


def _local(tensor: Any) -> Tensor:
    """What of a tensor this process holds."""
    from torch.distributed.tensor import DTensor

    found: Tensor = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def _zeros_by_row(parameter: Tensor, width: int) -> Tensor:
    """Zeros `[rows of the parameter, width]` in fp32, whose rows lie where the parameter's do."""
    from torch.distributed.tensor import DTensor

    rows = len(_local(parameter))
    zeros = torch.zeros(rows, width, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((len(parameter), width))
    sharded = DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(width, 1)
    )
    return sharded.to(parameter.device)  # where parameters wait on the host, it would be on the mesh's devices
