"""The critic of a configuration: whose weights it begins with, and how its parameters are updated."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llm_trainer.config.optim import OptimConfig
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained
from llm_trainer.models.rewarding import load_reward_model
from llm_trainer.trainers.references import different_ids

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build


def critic_of_folder(source: str | None, config: "TrainConfig", build: "Build") -> nn.Module | None:
    """The reward model or language model of a folder; None: none is named.

    Raises:
        ValueError: its tokenizer is not the policy's.
    """
    if source is None:
        return None
    key = "value_model_checkpoint"
    found = find_pretrained(source, (Kind.LANGUAGE_MODEL, *REWARD_MODELS), key=key)
    if (Path(found.source) / "tokenizer_config.json").exists():  # the critic of a run of ours has none of its own
        theirs = build.tokenizer_of(str(found.source)).get_vocab()
        different = different_ids(build.tokenizer.get_vocab(), theirs)
        if different:
            raise ValueError(
                f"{key}: {source} has another tokenizer than the policy: {different}. Expected the same tokens under the same "
                f"ids: train a reward model on this policy's family, or leave it out, and the critic is made of the policy"
            )
    if found.kind is Kind.LANGUAGE_MODEL:
        model: nn.Module = build.model(str(found.source))
        return model
    return load_reward_model(found.source, resolve_attention(config.run_config.attention, build.device))


def group_options(section: OptimConfig) -> dict[str, Any]:
    """What a section of the optimizer says about a group of parameters."""
    return {
        "lr": section.initial_lr,
        "weight_decay": section.weight_decay,
        "betas": section.betas,
        "eps": section.eps,
        "momentum": section.momentum,
    }
