"""Which engine is chosen, what of a configuration it leaves out, and what is missing for it."""

from typing import Any

import pytest

from llm_trainer.config import errors
from llm_trainer.config.deepspeed import (
    DsActivationCheckpointingConfig,
    DsBf16Config,
    DsConfig,
    DsOffloadConfig,
    DsZero3Config,
)
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import Settings
from llm_trainer.engine import choose
from llm_trainer.engine.choose import engine_name, engine_of, left_out

ZERO_3 = DsConfig(
    zero_config=DsZero3Config(offload_optimizer=DsOffloadConfig()),
    bf16_config=DsBf16Config(),
    activation_checkpointing=DsActivationCheckpointingConfig(),
).to_json()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which optional packages there are."""

    def these(*packages: str) -> None:
        for module in (choose, errors):
            monkeypatch.setattr(module, "is_installed", lambda package: package in packages)

    monkeypatch.delenv("PARALLEL_TYPE", raising=False)
    return these


@pytest.mark.parametrize(
    ("wanted", "engine", "reason"),
    [
        (None, "deepspeed", None),
        ("none", "deepspeed", None),  # what smart_train sets where there is one device
        ("ds", "deepspeed", None),
        ("ddp", "torch", "PARALLEL_TYPE is ddp"),
        ("fsdp", "fsdp", "PARALLEL_TYPE is fsdp"),
    ],
)
def test_a_deepspeed_section_is_used_or_its_absence_is_said(
    installed: Any, monkeypatch: pytest.MonkeyPatch, wanted: str | None, engine: str, reason: str | None
) -> None:
    installed("deepspeed")
    if wanted is not None:
        monkeypatch.setenv("PARALLEL_TYPE", wanted)
    settings = Settings(deepspeed=ZERO_3)
    assert engine_of(settings) == engine
    asked_for = "ZeRO-3, offload_optimizer to cpu, bf16 weights, recomputed activations"
    assert left_out(settings) == ("" if reason is None else f"ds_config ({asked_for}), because {reason}")


@pytest.mark.parametrize("wanted", ["none", "ddp"])
def test_where_deepspeed_is_missing_a_run_stops_or_says_what_it_leaves_out(
    installed: Any, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    installed()
    monkeypatch.setenv("PARALLEL_TYPE", wanted)
    with pytest.raises(
        ConfigError, match="ds_config needs the package deepspeed.*pip install deepspeed, or set run_con"
    ):
        engine_of(Settings(deepspeed=ZERO_3))
    settings = Settings(deepspeed=ZERO_3, without_deepspeed="leave_out")
    assert engine_of(settings) == "torch" and left_out(settings).endswith("because DeepSpeed is not installed")


@pytest.mark.parametrize(("engine", "package"), [("hf", "accelerate"), ("deepspeed", "deepspeed")])
def test_an_engine_without_its_package_is_one_message(installed: Any, engine: str, package: str) -> None:
    installed()
    expected = f"engine: {engine} needs the package {package}, which is not installed: pip install {package}, or choose"
    with pytest.raises(ConfigError, match=expected):
        engine_name(engine, fsdp=False, deepspeed=False)
    assert engine_name("torch", fsdp=False, deepspeed=True) == "torch"  # asked for by name
