"""The sections of DeepSpeed (https://www.deepspeed.ai/docs/config-json): its keys and defaults, checked before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, field_validator

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.section import config_section


class _WithAuto:
    """'auto' in a key, as in the JSON that transformers takes, leaves it at its default."""

    means_default: ClassVar[tuple[str, ...]] = ("auto",)


class DsZeROConfig(_WithAuto):
    """What is sharded over ranks: `DsZeROConfig(stage=2, ...)` is a `DsZero2Config(...)`, and all of these are one."""

    def __new__(cls, *args: Any, **given: Any) -> DsZeROConfig:
        section = cls
        if cls is DsZeROConfig:
            section = _section_of(given.get("stage"))
        return object.__new__(section)


def _section_of(stage: object) -> Any:
    """The class of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if type(stage) is not int or stage not in STAGES:
        raise ConfigError(f"stage: got {stage!r}, expected one of 0, 1, 2, 3")
    return STAGES[stage]


# What means nothing in one of the two sections of offloading.
FOREIGN = {
    "offload_optimizer": {"buffer_size", "max_in_cpu"},
    "offload_param": {"pipeline_read", "pipeline_write", "fast_init"},
}


@config_section
class DsOffloadConfig(_WithAuto):
    """Where optimizer state, or the parameters of stage 3, are kept between uses."""

    device: Literal["cpu", "nvme"] = Field(default="cpu", description="host memory, or a fast disk")
    nvme_path: str | None = Field(default=None, description="folder on the disk (nvme)")
    pin_memory: StrictBool = Field(
        default=True, description="page-locked host memory: faster copies, cannot be swapped"
    )
    buffer_count: StrictInt | None = Field(
        default=None, ge=1, description="buffers for the disk; null: 4 for an optimizer, 5 for parameters"
    )
    pipeline_read: StrictBool = Field(
        default=False, description="read the next piece during the update of this one (optimizer, nvme)"
    )
    pipeline_write: StrictBool = Field(
        default=False, description="write the last piece during the update of this one (optimizer, nvme)"
    )
    fast_init: StrictBool = Field(default=False, description="faster start (optimizer, nvme)")
    buffer_size: StrictInt | None = Field(
        default=None, ge=1, description="elements of a buffer; null: 100,000,000 (parameters, nvme)"
    )
    max_in_cpu: StrictInt | None = Field(
        default=None, ge=0, description="elements that stay in host memory; null: 1,000,000,000 (parameters, nvme)"
    )

    def __post_init__(self) -> None:
        if (self.device == "nvme") == (self.nvme_path is None):
            expected = "a folder on the disk" if self.nvme_path is None else "device: nvme with it, or neither"
            raise ConfigError(f"nvme_path: got {self.nvme_path!r} with device {self.device}, expected {expected}")

    def to_json(self, key: str) -> dict[str, Any]:
        """The section of DeepSpeed's JSON that is called `key`, one of `FOREIGN`."""
        defaults = {name: field.default for name, field in fields_of(type(self)).items()}
        changed = {name: value for name, value in vars(self).items() if value != defaults[name]}
        if wrong := sorted(changed.keys() & FOREIGN[key]):
            (other,) = FOREIGN.keys() - {key}
            raise ConfigError(f"{key}.{wrong[0]}: got {changed[wrong[0]]!r}, expected it in {other} alone")
        return {"device": self.device, "pin_memory": self.pin_memory, **changed}


@config_section
class DsZero0Config(DsZeROConfig):
    """No sharding: gradients are averaged, everything else is whole on every rank."""

    stage: Literal[0] = Field(default=0, description="0: nothing is sharded")

    def to_json(self) -> dict[str, Any]:
        """The section `zero_optimization` of DeepSpeed's JSON."""
        return {"stage": self.stage}


@config_section
class _Sharded(DsZeROConfig):
    """What all stages that shard something have in common."""

    reduce_bucket_size: StrictInt = Field(
        default=500_000_000, ge=1, description="gradient elements that are reduced at a time"
    )
    allgather_bucket_size: StrictInt = Field(
        default=500_000_000, ge=2, description="parameter elements that are gathered at a time, an even number"
    )
    allgather_partitions: StrictBool = Field(
        default=True, description="gather updated parameters with all-gather; false: a series of broadcasts"
    )
    reduce_scatter: StrictBool = Field(default=True, description="reduce gradients to their owners; false: all-reduce")
    contiguous_gradients: StrictBool = Field(
        default=True, description="copy gradients to one buffer as they are made, against fragmentation"
    )
    offload_optimizer: DsOffloadConfig | None = Field(
        default=None, description="keep and update the optimizer state in host memory or on disk"
    )

    def __post_init__(self) -> None:
        if self.allgather_bucket_size % 2:
            raise ConfigError(f"allgather_bucket_size: got {self.allgather_bucket_size}, expected an even number")

    def to_json(self) -> dict[str, Any]:
        """The section `zero_optimization` of DeepSpeed's JSON."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, DsOffloadConfig | None)}
        if self.offload_optimizer is not None:
            plain["offload_optimizer"] = self.offload_optimizer.to_json("offload_optimizer")
        return plain


@config_section
class _WholeWeights(_Sharded):
    """What stages 1 and 2 have in common: every rank has the weights."""

    overlap_comm: StrictBool = Field(default=False, description="reduce gradients during the backward")
    round_robin_gradients: StrictBool = Field(
        default=False, description="spread the copies of gradients to the host over ranks (offload)"
    )


@config_section
class DsZero1Config(_WholeWeights):
    """Optimizer state is sharded."""

    stage: Literal[1] = Field(default=1, description="1: optimizer state is sharded")


@config_section
class DsZero2Config(_WholeWeights):
    """Optimizer state and gradients are sharded."""

    stage: Literal[2] = Field(default=2, description="2: optimizer state and gradients are sharded")


@config_section
class DsZero3Config(_Sharded):
    """Optimizer state, gradients and parameters are sharded."""

    stage: Literal[3] = Field(default=3, description="3: optimizer state, gradients and parameters are sharded")
    overlap_comm: StrictBool = Field(default=True, description="reduce gradients during the backward")
    offload_param: DsOffloadConfig | None = Field(
        default=None, description="keep the parameters in host memory or on disk between uses"
    )
    sub_group_size: StrictInt = Field(
        default=1_000_000_000, ge=1, description="elements that the optimizer updates at a time"
    )
    stage3_prefetch_bucket_size: StrictInt = Field(
        default=50_000_000, ge=0, description="parameter elements that are gathered ahead of their use"
    )
    stage3_param_persistence_threshold: StrictInt = Field(
        default=100_000, ge=0, description="parameters of fewer elements stay whole on every rank"
    )
    stage3_max_live_parameters: StrictInt = Field(
        default=1_000_000_000, ge=0, description="gathered elements that a device holds at most"
    )
    stage3_max_reuse_distance: StrictInt = Field(
        default=1_000_000_000, ge=0, description="keep a parameter that is used again within so many elements"
    )
    zero_hpz_partition_size: StrictInt = Field(
        default=1,
        ge=1,
        description="ranks of a node that keep a second copy, for backwards without other nodes (ZeRO++)",
    )

    def to_json(self) -> dict[str, Any]:
        """The section `zero_optimization` of DeepSpeed's JSON."""
        plain = _Sharded.to_json(self)
        if self.offload_param is not None:
            plain["offload_param"] = self.offload_param.to_json("offload_param")
        return plain


STAGES: dict[int, Any] = {0: DsZero0Config, 1: DsZero1Config, 2: DsZero2Config, 3: DsZero3Config}


@config_section
class DsFp16Config(_WithAuto):
    """Weights, gradients and activations in fp16, with a loss scale and fp32 copies of the weights."""

    enabled: StrictBool | Literal["auto"] = Field(
        default=True, description="whether fp16 is used; auto: if run_config.precision says so"
    )
    loss_scale: StrictFloat = Field(default=0.0, ge=0, description="a fixed loss scale; 0: it adapts")
    initial_scale_power: StrictInt = Field(default=16, ge=0, description="the scale starts at 2 to this power")
    loss_scale_window: StrictInt = Field(
        default=1000, ge=1, description="steps without overflow before the scale doubles"
    )
    hysteresis: StrictInt = Field(default=2, ge=1, description="overflows before the scale is halved")
    min_loss_scale: StrictInt = Field(default=1, ge=1, description="the scale does not fall below")


@config_section
class DsBf16Config(_WithAuto):
    """Weights, gradients and activations in bf16, with fp32 copies of the weights in the optimizer."""

    enabled: StrictBool | Literal["auto"] = Field(
        default=True, description="whether bf16 is used; auto: if run_config.precision says so"
    )


@config_section
class DsActivationCheckpointingConfig(_WithAuto):
    """Activations are recomputed in the backward; what is kept of them, and where."""

    partition_activations: StrictBool = Field(default=False, description="shard what is kept over model-parallel ranks")
    cpu_checkpointing: StrictBool = Field(default=False, description="keep it in host memory")
    contiguous_memory_optimization: StrictBool = Field(
        default=False, description="keep it in one buffer, against fragmentation"
    )
    number_checkpoints: StrictInt | None = Field(
        default=None, ge=1, description="checkpoints that the one buffer has room for"
    )
    synchronize_checkpoint_boundary: StrictBool = Field(
        default=False, description="wait for the device at every checkpoint"
    )
    profile: StrictBool = Field(default=False, description="time every checkpoint")

    def __post_init__(self) -> None:
        if self.contiguous_memory_optimization and not (self.partition_activations and self.number_checkpoints):
            raise ConfigError(
                "contiguous_memory_optimization: got true, expected partition_activations: true and number_checkpoints with it"
            )


@config_section
class DsConfig(_WithAuto):
    """Training with DeepSpeed."""

    zero_config: DsZero3Config | DsZero2Config | DsZero1Config | DsZero0Config = Field(
        default_factory=DsZero2Config, description="what is sharded over ranks, by stage"
    )
    fp16_config: DsFp16Config | None = Field(default=None, description="weights in fp16; null: fp32 weights")
    bf16_config: DsBf16Config | None = Field(default=None, description="weights in bf16; null: fp32 weights")
    gradient_clipping: StrictFloat | None = Field(
        default=1.0, ge=0, description="gradients are scaled down to this norm; 0 or null: never"
    )
    activation_checkpointing: DsActivationCheckpointingConfig | None = Field(
        default=None, description="recompute activations, as DeepSpeed does it"
    )

    @field_validator("zero_config", mode="before")
    @classmethod
    def _of_its_stage(cls, given: Any) -> Any:
        """A mapping as the class of its stage, whose keys it may have."""
        if not isinstance(given, Mapping):
            return given
        stage = given.get("stage")
        section = _section_of(stage)
        for name in given.keys() - fields_of(section).keys():
            if knowing := [str(other) for other, section in STAGES.items() if name in fields_of(section)]:
                raise ConfigError(f"{name}: got stage {stage}, which has none; expected stage {' or '.join(knowing)}")
        return section(**given)

    def __post_init__(self) -> None:
        self.gradient_clipping = self.gradient_clipping or 0.0
        switched_on = [s for s in (self.fp16_config, self.bf16_config) if s is not None and s.enabled is True]
        if len(switched_on) == 2:
            raise ConfigError("bf16_config: fp16_config is enabled as well; expected one of them")
        self.zero_config.to_json()  # a field of offloading in the wrong place shows now

    def to_json(self) -> dict[str, Any]:
        """DeepSpeed's JSON, without what the engine decides: optimizer, schedule and batch sizes."""
        sections: dict[str, Any] = {
            "fp16": self.fp16_config,
            "bf16": self.bf16_config,
            "activation_checkpointing": self.activation_checkpointing,
        }
        given = {key: asdict(section) for key, section in sections.items() if section is not None}
        given = {key: values for key, values in given.items() if values.get("enabled") != "auto"}
        return {"zero_optimization": self.zero_config.to_json(), "gradient_clipping": self.gradient_clipping, **given}
