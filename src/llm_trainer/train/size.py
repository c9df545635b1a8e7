"""What is trained, counted before an engine takes it apart, and the share of a device's peak that its steps reach."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.model_group import MODEL, members_of
from llm_trainer.models.adapter_table import AdaptersTable
from llm_trainer.models.inside import adapted_model, has_adapters, language_config
from llm_trainer.models.quantize import num_values
from llm_trainer.optim.optimizers import state_bytes
from llm_trainer.plan.gpus import half_peak
from llm_trainer.plan.shapes import Shape
from llm_trainer.train.metrics import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@lru_cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five: the peak of a device that no table lists."""
    n = 2048 if device.type != "cpu" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # the read waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(engine: Engine) -> float:
    """FLOP/s that MFU is measured against: from the data sheet for known GPUs, else a timed matrix product."""
    dtype = torch.bfloat16 if engine.precision_name == "bf16" else torch.float32
    if engine.device.type == "cuda":
        known = half_peak(torch.cuda.get_device_name(engine.device))
        if known is not None and engine.precision_name != "fp32":
            return known
        dtype = torch.float16 if engine.precision_name == "fp16" else dtype
    return measured_peak(engine.device, dtype)


@dataclass(frozen=True)
class Size:
    """What is trained, counted before an engine takes it apart.

    Attributes:
        parameters: all of them, tied ones once.
        trained: those with gradients.
        bytes: of all.
        trained_bytes: of those with gradients.
        saved_bytes: of those that a checkpoint writes.
        optimizer_bytes: that the optimizer will keep as its state.
        flops_per_token: of a training step; None for modules that are no transformers language model.
        flops_per_pixel: of the towers, for each number of pixels.
        shape: as `plan` sees it; None for other models than those whose memory it knows.
        adapters: of a model with adapters, what they train; None: it has none.
    """

    parameters: int
    trained: int
    bytes: int
    trained_bytes: int
    saved_bytes: int
    optimizer_bytes: int
    flops_per_token: float | None
    shape: Shape | None
    adapters: AdaptersTable | None = None
    flops_per_pixel: float = 0.0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        row_length: int | None,
        saved_bytes: int | None = None,
        patches: float | None = None,
    ) -> Self:
        """The size of a model or group of models.

        Args:
            row_length: mean number of tokens, for FLOPs; None: not known.
            saved_bytes: what a checkpoint writes of the weights; None: all.
            patches: mean number in an image, for FLOPs; None: not known.
        """
        policy = members_of(model)[MODEL]
        table = AdaptersTable.of(policy) if has_adapters(policy) else None
        every = list(model.parameters())
        trained = [parameter for parameter in every if parameter.requires_grad]
        size = sum(p.numel() * p.element_size() for p in every)
        if saved_bytes is None:
            saved_bytes = size
        return cls(
            parameters=sum(num_values(p) for p in every),
            trained=sum(num_values(p) for p in trained),
            bytes=size,
            trained_bytes=sum(p.numel() * p.element_size() for p in trained),
            saved_bytes=saved_bytes,
            optimizer_bytes=state_bytes(optimizer),
            flops_per_token=_flops_per_token(model, row_length or 1),
            shape=_shape_of(model),
            adapters=table,
            flops_per_pixel=_flops_per_pixel(model, patches),
        )


def _learning(model: nn.Module) -> "list[PreTrainedModel] | None":
    """A model, or all that learn of a group; a body that several share counts once. None: one is none of transformers'."""
    from transformers import PreTrainedModel

    learning, counted_before = [], set[nn.Parameter]()
    for member in members_of(model).values():
        parameters = set(member.parameters())
        inner = adapted_model(member)
        if not isinstance(inner, PreTrainedModel):
            return None
        if parameters.isdisjoint(counted_before) and any(parameter.requires_grad for parameter in parameters):
            learning.append(inner)
        counted_before |= parameters
    return learning


def _shape_of(model: nn.Module) -> Shape | None:
    """Of all that learn, as one; None: their memory is not known."""
    from llm_trainer.models.build import ARCHITECTURES
    from llm_trainer.plan.shapes import shape_of
    from llm_trainer.plan.tower import is_known

    shape = None
    for member in _learning(model) or []:
        if language_config(member.config).model_type not in ARCHITECTURES or not is_known(member.config):
            return None
        own = shape_of(member)
        shape = own if shape is None else shape.beside(own)
    return shape


def _flops_per_token(model: nn.Module, row_length: int) -> float | None:
    """Of training all that learn; None: it is not known."""
    from llm_trainer.models.build import flops_per_token

    learning = _learning(model)
    if learning is None:
        return None
    return sum((flops_per_token(member, row_length) for member in learning), 0.0)


def _flops_per_pixel(model: nn.Module, patches: float | None) -> float:
    """Of training the towers of all that learn, for each number of pixels."""
    from llm_trainer.plan.tower import tower_of

    flops = 0.0
    for member in _learning(model) or []:
        tower = tower_of(member)
        if tower is not None:
            flops += tower.flops_per_patch(patches or tower.patches or 0.0) / tower.values_per_patch
    return flops


def shares_of_peak(size: Size, engine: Engine) -> Shares | None:
    """What of the peak of all processes is reached at one token or pixel per second; None for modules whose FLOPs are not
    known.
    """
    if size.flops_per_token is None:
        return None
    peak = peak_flops(engine) * dist.num_processes()
    return Shares(size.flops_per_token / peak, size.flops_per_pixel / peak)
