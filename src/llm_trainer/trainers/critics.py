"""The critic of PPO: whose weights it begins with, and how its parameters are updated."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.config.optim import OptimConfig
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained
from llm_trainer.models.rewarding import load_reward_model
from llm_trainer.trainers.said import different_ids

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build


CRITIC = "critic"  # its name in checkpoints, and the mark of its groups of parameters


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
        theirs = build.tokenizer_of(str(found.source), "value_model_checkpoint").get_vocab()
        different = different_ids(build.tokenizer.get_vocab(), theirs)
        if different:
            raise ValueError(
                f"{key}: {source} has another tokenizer than the policy: {different}. Expected the same tokens under the same "
                f"ids: train a reward model on this policy's family, or leave it out, and the critic is made of the policy"
            )
    if found.has_processor:  # such a critic has none of its own either
        build.check_images(source, key)
    if found.kind is Kind.LANGUAGE_MODEL:
        model: nn.Module = build.model(str(found.source))
    else:
        model = load_reward_model(found.source, resolve_attention(config.run_config.attention, build.device))
    build.leave_out(model)
    return model


def group_options(section: OptimConfig) -> dict[str, Any]:
    """What a section of the optimizer says about a group of parameters."""
    return {
        "lr": section.initial_lr,
        "weight_decay": section.weight_decay,
        "betas": section.betas,
        "eps": section.eps,
        "momentum": section.momentum,
    }


def check_learns(value_model: nn.Module | None, **frozen: nn.Module | None) -> None:
    """
    Raises:
        ValueError: the critic is one of the models that are `frozen`, by the names of their arguments, or is so already.
    """
    if value_model is None:
        return
    for name, model in frozen.items():
        if value_model is model:
            raise ValueError(
                f"value_model is the {name} itself, which is frozen, and a critic learns; expected a copy of it (copy.deepcopy)"
            )
    if not any(parameter.requires_grad for parameter in value_model.parameters()):
        raise ValueError("value_model: all of its parameters are frozen; expected a critic that learns")


def let_critic_alone(optimizer: torch.optim.Optimizer, policy_waits: Callable[[], bool]) -> None:
    """Let all but the critic's groups of `optimizer` take their steps with a rate of 0 while `policy_waits`.

    That leaves their parameters as they are, bit for bit, on every engine, weight decay and momentum included; the rates
    themselves are untouched between steps, where a schedule and a checkpoint read them.
    """
    held: list[tuple[dict[str, Any], Any]] = []

    def hold(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if policy_waits() and group.get("model") != CRITIC:
                held.append((group, group["lr"]))
                group["lr"] = 0.0

    def release(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        while held:
            group, rate = held.pop()
            group["lr"] = rate

    optimizer.register_step_pre_hook(hold)
    optimizer.register_step_post_hook(release)
