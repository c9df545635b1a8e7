"""The sections of DeepSpeed: each field changes the JSON key of its name and no other, and DeepSpeed reads it so."""

import importlib.util
import re
import warnings
from dataclasses import asdict
from typing import Any

import pytest

from llm_trainer.config.deepspeed import (
    FOREIGN,
    STAGES,
    DsActivationCheckpointingConfig,
    DsBf16Config,
    DsConfig,
    DsFp16Config,
    DsOffloadConfig,
    DsZero0Config,
    DsZero1Config,
    DsZero2Config,
    DsZero3Config,
    DsZeROConfig,
)
from llm_trainer.config.errors import ConfigError, fields_of

NVME = {"device": "nvme", "nvme_path": "disk"}
# What else a field needs.
WITH = {"contiguous_memory_optimization": {"partition_activations": True, "number_checkpoints": 2}}


def other(default: Any) -> Any:
    """A value that is not the default."""
    if isinstance(default, bool):
        return not default
    return 6 if default is None else default + 2


def parse(json: dict[str, Any]) -> Any:
    """DeepSpeed's own reading of its JSON."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is deprecated
        from deepspeed.runtime.config import DeepSpeedConfig
    return DeepSpeedConfig(json | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2})


def flat(json: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Nested keys as tuples."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in json.items():
        inner = flat(value) if isinstance(value, dict) else {(): value}
        found |= {(key, *rest): item for rest, item in inner.items()}
    return found


ZERO_FIELDS = [
    (section, name)
    for section in STAGES.values()
    for name, field in fields_of(section).items()
    if name not in ("stage", "offload_optimizer", "offload_param")
]


@pytest.mark.parametrize(("section", "name"), ZERO_FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_each_zero_option_is_deepspeeds_key_of_that_name(section: Any, name: str) -> None:
    default = getattr(section(), name)
    changed = DsConfig(zero_config=section(**{name: other(default)})).to_json()
    before = flat(DsConfig(zero_config=section()).to_json())
    assert set(flat(changed).items()) - set(before.items()) == {(("zero_optimization", name), other(default))}
    for json, value in ((changed, other(default)), (DsConfig(zero_config=section()).to_json(), default)):
        zero = parse(json).zero_config.model_dump(by_alias=True)
        assert zero[name] == value and zero["stage"] == section().stage


@pytest.mark.parametrize("section", [*STAGES.values()], ids=lambda value: value.__name__)
def test_our_defaults_are_deepspeeds(section: Any) -> None:
    ours = parse(DsConfig(zero_config=section()).to_json()).zero_config
    assert ours == parse({"zero_optimization": {"stage": section().stage}}).zero_config


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (key, name)
        for key, foreign in FOREIGN.items()
        for name in fields_of(DsOffloadConfig)
        if name not in foreign | {"device"}
    ],
)
def test_each_option_of_offloading_arrives(key: str, name: str) -> None:
    value = "elsewhere" if name == "nvme_path" else other(getattr(DsOffloadConfig(), name))
    json = DsConfig(zero_config={"stage": 3, key: NVME | {name: value}}).to_json()
    plain = DsConfig(zero_config={"stage": 3, key: NVME}).to_json()
    assert set(flat(json).items()) - set(flat(plain).items()) == {(("zero_optimization", key, name), value)}
    section = getattr(parse(json).zero_config, key)
    assert str(getattr(section, name)) == str(value) and section.device == "nvme"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_to_the_host_needs_no_more_than_a_section(stage: int) -> None:
    json = DsConfig(zero_config={"stage": stage, "offload_optimizer": {}}).to_json()
    assert json["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert parse(json).zero_config.offload_optimizer.device == "cpu"


@pytest.mark.parametrize("name", [*fields_of(DsFp16Config)])
def test_each_option_of_fp16_arrives(name: str) -> None:
    value = other(getattr(DsFp16Config(), name))
    json = DsConfig(fp16_config=DsFp16Config(**{name: value})).to_json()
    assert json["fp16"] == asdict(DsFp16Config()) | {name: value}
    assert getattr(parse(json).float16_config, name) == value
    assert getattr(parse(DsConfig(fp16_config={}).to_json()).float16_config, name) == getattr(DsFp16Config(), name)


def test_bf16_and_clipping_arrive() -> None:
    parsed = parse(DsConfig(bf16_config={}, gradient_clipping=0.5).to_json())
    assert parsed.bfloat16_config.enabled and parsed.gradient_clipping == 0.5
    assert not parse(DsConfig(bf16_config={"enabled": False}).to_json()).bfloat16_config.enabled
    assert parse(DsConfig().to_json()).gradient_clipping == 1.0
    assert not {"fp16", "bf16", "activation_checkpointing"} & DsConfig().to_json().keys()


@pytest.mark.parametrize("name", [*fields_of(DsActivationCheckpointingConfig)])
def test_each_option_of_checkpointing_arrives(name: str) -> None:
    value = other(getattr(DsActivationCheckpointingConfig(), name))
    given = WITH.get(name, {}) | {name: value}
    json = DsConfig(activation_checkpointing=given).to_json()
    assert json["activation_checkpointing"] == asdict(DsActivationCheckpointingConfig()) | given
    assert getattr(parse(json).activation_checkpointing_config, name) == value


def test_the_stage_chooses_the_class() -> None:
    sections = [type(DsConfig(zero_config={"stage": stage}).zero_config) for stage in (0, 1, 2, 3)]
    assert sections == [DsZero0Config, DsZero1Config, DsZero2Config, DsZero3Config]
    assert DsConfig(zero_config=DsZero3Config(sub_group_size=5)).zero_config.sub_group_size == 5
    assert DsConfig().to_json()["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_config": {"stage": 4}}, "zero_config: stage: got 4, expected one of 0, 1, 2, 3"),
        ({"zero_config": {"stage": True}}, "zero_config: stage: got True"),
        ({"zero_config": {}}, "zero_config: stage: got None"),
        (
            {"zero_config": {"stage": 2, "offload_param": {}}},
            "offload_param: got stage 2, which has none; expected stage 3",
        ),
        (
            {"zero_config": {"stage": 0, "overlap_comm": True}},
            "got stage 0, which has none; expected stage 1 or 2 or 3",
        ),
        ({"zero_config": {"stage": 2, "reduce_buckt_size": 1}}, "did you mean reduce_bucket_size?"),
        (
            {"zero_config": {"stage": 2, "reduce_bucket_size": 0}},
            "reduce_bucket_size: got 0, expected an integer of at",
        ),
        ({"zero_config": {"stage": 1, "allgather_bucket_size": 3}}, "got 3, expected an even number"),
        (
            {"zero_config": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "nvme_path: got None with device nvme, expected a folder on the disk",
        ),
        (
            {"zero_config": {"stage": 3, "offload_param": {"nvme_path": "x"}}},
            "nvme_path: got 'x' with device cpu, expected device: nvme with it, or neither",
        ),
        (
            {"zero_config": {"stage": 3, "offload_optimizer": NVME | {"max_in_cpu": 4}}},
            "offload_optimizer.max_in_cpu: got 4, expected it in offload_param alone",
        ),
        ({"fp16_config": {}, "bf16_config": {}}, "bf16_config: fp16_config is enabled as well; expected one of them"),
        ({"fp16_config": {"loss_scale": -1.0}}, "fp16_config.loss_scale: got -1.0, expected a number of at least 0"),
        ({"gradient_clipping": -1.0}, "gradient_clipping: got -1.0, expected a number of at least 0"),
        (
            {"activation_checkpointing": {"contiguous_memory_optimization": True}},
            "expected partition_activations: true and number_checkpoints with it",
        ),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DsConfig(**given)


def test_one_of_two_precisions_may_be_switched_off() -> None:
    json = DsConfig(fp16_config=DsFp16Config(enabled=False), bf16_config=DsBf16Config()).to_json()
    assert (json["fp16"]["enabled"], json["bf16"]["enabled"]) == (False, True)


def test_auto_in_a_key_is_its_default() -> None:
    zero = DsZero3Config(reduce_bucket_size="auto", sub_group_size="auto", offload_param={"pin_memory": "auto"})
    assert (zero.reduce_bucket_size, zero.sub_group_size, zero.offload_param.pin_memory) == (500_000_000, 10**9, True)
    assert DsConfig(gradient_clipping="auto").gradient_clipping == 1.0
    with pytest.raises(ConfigError, match="stage: got 'auto', expected one of 0, 1, 2, 3"):
        DsConfig(zero_config={"stage": "auto"})


def test_a_precision_that_is_auto_is_that_of_the_run() -> None:
    both = {"fp16_config": DsFp16Config(enabled="auto", loss_scale="auto"), "bf16_config": {"enabled": "auto"}}
    assert not {"fp16", "bf16"} & DsConfig(**both).to_json().keys()
    assert DsConfig(**both | {"bf16_config": DsBf16Config()}).to_json()["bf16"] == {"enabled": True}


def test_a_stage_by_its_number() -> None:
    zero = DsZeROConfig(stage=3, sub_group_size=7)
    assert type(zero) is DsZero3Config and zero.sub_group_size == 7
    assert all(isinstance(section(), DsZeROConfig) for section in STAGES.values())
    assert DsConfig(zero_config=DsZeROConfig(stage=1)).to_json()["zero_optimization"]["stage"] == 1
    for wrong in ({}, {"stage": 4}):
        with pytest.raises(ConfigError, match=f"stage: got {wrong.get('stage')}, expected one of 0, 1, 2, 3"):
            DsZeROConfig(**wrong)
    with pytest.raises(ConfigError, match="sub_group_size is not a known key"):
        DsZeROConfig(stage=2, sub_group_size=7)
