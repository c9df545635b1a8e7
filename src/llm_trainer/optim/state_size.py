"""How much an optimizer keeps for a parameter, in values of the parameter: what memory plans add up."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from llm_trainer.optim.own import is_for_muon
from llm_trainer.optim.shards import block_of

Group: TypeAlias = Mapping[str, Any]  # a parameter group with its hyperparameters


def adam_state(parameter: Tensor, group: Group) -> int:
    """First and second moment, and with amsgrad the largest second moment so far."""
    return (3 if group.get("amsgrad") else 2) * parameter.numel()


def one_moment(parameter: Tensor, group: Group) -> int:
    return parameter.numel()


def sgd_state(parameter: Tensor, group: Group) -> int:
    return parameter.numel() if group["momentum"] else 0


def muon_state(parameter: Tensor, group: Group) -> int:
    """A momentum for each hidden matrix; the rest is AdamW's."""
    state = one_moment if is_for_muon(parameter, group) else adam_state
    return state(parameter, group)


def adafactor_state(parameter: Tensor, group: Group) -> int:
    """A row and a column of statistics for each matrix `[..., R, C]`."""
    if parameter.ndim < 2:
        return parameter.numel()
    return sum(parameter.shape[-2:]) * parameter.shape[:-2].numel()


# bitsandbytes keeps a moment of a small parameter in 32 bits; of others it keeps a byte per value and a scale per block.
_SMALL, _BLOCK, _SCALE_BYTES = 4096, 256, 4


def in_eight_bits(moments: int) -> Callable[[Tensor, Group], float]:
    """What so many moments in 8 bits are, in values of the parameter (Dettmers et al. 2021, arXiv 2110.02861)."""

    def state(parameter: Tensor, group: Group) -> float:
        count = parameter.numel()
        num_bytes = 4 * count
        if count >= _SMALL:
            num_bytes = count + _SCALE_BYTES * -(-count // _BLOCK)
        return moments * num_bytes / parameter.element_size()

    return state


def rows_in_eight_bits(parameter: Tensor, group: Group) -> float:
    """Both moments of `AdamW8bitOfShards`, in values of the parameter."""
    count, block = parameter.numel(), block_of(parameter)
    num_bytes = 4 * count if block is None else count + _SCALE_BYTES * count // block
    return 2 * num_bytes / parameter.element_size()
