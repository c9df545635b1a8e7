"""Which models are mixtures of experts whose routers can be seen."""

from itertools import chain
from typing import NamedTuple

from torch import nn

from llm_trainer.models.inside import language_config, transformers_model

# Of routers that are balanced by a bias on what they choose by, and not by a loss (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
BALANCING_BIAS = "e_score_correction_bias"


class Experts(NamedTuple):
    """The experts of each layer of a model, and how many of them a token is sent to."""

    number: int
    per_token: int


def experts_of(model: nn.Module) -> Experts | None:
    """The experts of a transformers model in `model`, whose routers choose by the probabilities of their logits; else None.

    Raises:
        ValueError: a token is sent to more experts than there are.
    """
    pretrained = transformers_model(model)
    if pretrained is None or is_balanced_by_a_bias(model):
        return None
    settings = language_config(pretrained.config).to_dict()
    number = settings.get("num_experts") or settings.get("num_local_experts")
    if not number or "output_router_logits" not in settings:
        return None
    experts = Experts(number, settings["num_experts_per_tok"])
    if experts.per_token > experts.number:
        raise ValueError(
            f"num_experts_per_tok: the configuration of the {type(pretrained).__name__} sends each token to "
            f"{experts.per_token} experts, and a layer has {experts.number}; expected at most that many"
        )
    return experts


def is_balanced_by_a_bias(model: nn.Module) -> bool:
    """Whether the routers of `model` add a bias to what they choose by."""
    names = chain(model.named_buffers(), model.named_parameters())
    return any(name.endswith(BALANCING_BIAS) for name, _ in names)
