"""The routes that completions were drawn with, as columns of a rollout, and back: what a policy is then learned on.

A number of a column holds seven experts in nine bits each, so that a token has few columns of one number, which are laid,
shared and padded as all others are. 0 is no expert: the token takes the routes of the weights that learn.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.generation.slots import reads_slots
from llm_trainer.models.experts import expert_shape, replayed_routers
from llm_trainer.models.inside import adapted_model, transformers_model
from llm_trainer.models.quantize import is_quantized

ROUTES = "routes_"  # how the names of the columns begin
BITS, PER_NUMBER = 9, 7


def num_route_columns(model: nn.Module) -> int:
    """How many columns the routes of a token of `model` take.

    Raises:
        ValueError: it has no experts whose routes can be replayed.
    """
    routers, experts = replayed_routers(model), expert_shape(model)
    assert experts is not None
    if experts.number >= 2**BITS:
        raise ValueError(f"replay_routes: got a layer of {experts.number} experts, expected fewer than {2**BITS}")
    return -(-len(routers) * experts.per_token // PER_NUMBER)


def route_columns(routes: np.ndarray | None, length: int, count: int) -> dict[str, np.ndarray]:
    """`routes [T, R]`, the experts of a token in all layers, -1: none, as `count` columns `[T]`; None: nobody knows them."""
    padded = np.zeros((length, count * PER_NUMBER), dtype=np.int64)
    if routes is not None:
        padded[:, : routes.shape[1]] = routes + 1
    shifts = BITS * np.arange(PER_NUMBER)
    packed = (padded.reshape(length, count, PER_NUMBER) << shifts).sum(-1)
    return {f"{ROUTES}{number}": packed[:, number].copy() for number in range(count)}


def routes_of(rows: Mapping[str, Tensor]) -> Tensor | None:
    """`[B, T, R]` what `route_columns` packed, of a micro-batch `[B, T]`; R is rounded up. None: it has no such columns."""
    count = sum(name.startswith(ROUTES) for name in rows)
    if not count:
        return None
    packed = torch.stack([rows[f"{ROUTES}{number}"] for number in range(count)], -1)  # (B, T, count)
    shifts = BITS * torch.arange(PER_NUMBER, device=packed.device)
    experts = (packed[..., None] >> shifts) & (2**BITS - 1)
    return experts.flatten(-2) - 1


def check_replay(model: nn.Module, how: RolloutOptions, has_service: bool, has_partners: bool) -> None:
    """
    Raises:
        ConfigError: whoever draws completions does not say which routes it took, or these cannot be replayed.
    """
    found = ""
    inner = transformers_model(adapted_model(model))
    if how.rollout_servers or has_service:
        found = "others than this process draw completions (rollout_servers, generation_service), and say no routes"
    elif has_partners:
        found = "an episode of several turns is read anew in every turn"
    elif is_quantized(model):
        found = "weights in few bits draw in place, in the modules that learn"
    elif inner is None or expert_shape(model) is None:
        found = f"a {type(model).__name__} has no experts"
    elif not reads_slots(inner):
        found = f"the sampler reads a {type(inner).__name__} through transformers' own cache, where prompts are padded"
    if found:
        raise ConfigError(f"replay_routes: got true, but {found}; leave it out")
    try:
        num_route_columns(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
