"""Who draws completions: the process that trains, rollout servers, or a service of the user."""

from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.servers import Servers
from llm_trainer.generation.service import GenerationService
from llm_trainer.generation.transports import Broadcast, Files, Transport
from llm_trainer.generation.weights import is_sharded
from llm_trainer.machine import Machine
from llm_trainer.models.inside import has_adapters
from llm_trainer.models.quantize import has_8_bits, is_quantized
from llm_trainer.trainers.said import config_of


def service_of(how: RolloutOptions, given: GenerationService | None, model: nn.Module) -> GenerationService | None:
    """The service that is given, or the rollout servers of a section; None: the process that trains draws.

    Raises:
        ConfigError: there are both, or it is said how weights come to servers where there are none; or they cannot take the
            weights of `model`, or nobody can.
        ValueError: something is no address.
    """
    if is_quantized(model):
        _check_in_place(model, how, given)
    if (how.rollout_servers or isinstance(given, Servers)) and has_adapters(model):
        raise ConfigError(
            "rollout_servers: the policy has adapters (peft), and servers take the weights of a plain model, by its names; "
            "expected a policy without adapters, or no rollout_servers: the process that trains then draws"
        )
    if given is not None and how.rollout_servers:
        raise ConfigError(
            f"rollout_servers: got {how.rollout_servers}, and a generation_service too, so two would draw completions; "
            f"expected one of them"
        )
    if not how.rollout_servers:
        for name, unset in (("weight_transport", "files"), ("weight_folder", None)):
            value = getattr(how, name)
            if value != unset:
                raise ConfigError(
                    f"{name}: got {value!r}, but there are no servers that weights could come to; expected rollout_servers: "
                    f"[http://host:port, ...], or neither"
                )
        return given
    if how.weight_transport == "nccl" and how.weight_folder is not None:
        raise ConfigError(
            f"weight_folder: got {how.weight_folder!r}, but weight_transport nccl writes no files; leave one of them out"
        )
    transport: Transport = Broadcast() if how.weight_transport == "nccl" else Files(how.weight_folder)
    return Servers(how.rollout_servers, transport)


def drawing(
    service: GenerationService | None, model: nn.Module, machine: Machine, sees_routes: bool = False
) -> tuple[GenerationService, str]:
    """The service of a run, which knows the processes of the run, and its name in messages."""
    if service is None and is_quantized(model):
        if is_sharded(model):
            raise ConfigError(
                "quantization_config: the policy's weights are in 4 bits and sharded, and completions are drawn with the "
                "trained weights in place, which no process has all of; expected engine: torch, or ds_config with zero_config "
                "of stage 0 to 2"
            )
        return InProcess(model, around=partial(_autocast, machine)), "the sampler of this process"
    if service is None:
        return InProcess(model, machine.dtype, sees_routes=sees_routes), "the sampler of this process"
    if isinstance(service, Servers):
        service.join(machine.process_number, machine.gather, config_of(model), machine.say)
        return service, "the rollout servers"
    return service, f"the given {type(service).__name__}"


def _check_in_place(model: nn.Module, how: RolloutOptions, given: GenerationService | None) -> None:
    """
    Raises:
        ConfigError: a policy in few bits is in 8, or not the one that is to draw.
    """
    if has_8_bits(model):
        raise ConfigError(
            "quantization_config.bits: got 8, which treats a token by the others of its micro-batch, so that log-probs of what "
            "was drawn would not be those that are learned from; expected bits: 4"
        )
    found = ""
    if how.rollout_servers:
        found = f"rollout_servers are {how.rollout_servers}"
    elif given is not None:
        found = f"generation_service is a {type(given).__name__}"
    elif how.max_staleness:
        found = f"max_staleness is {how.max_staleness}"
    if found:
        raise ConfigError(
            f"quantization_config: the policy's weights are in 4 bits, so that completions are drawn with them in place, in "
            f"turns with learning, and {found}; expected neither rollout_servers, nor a generation_service, nor max_staleness"
        )


def _autocast(machine: Machine) -> AbstractContextManager[object]:
    """The precision in which the trained weights compute."""
    return torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32)
