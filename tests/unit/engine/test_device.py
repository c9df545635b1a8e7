"""What a run learns of the machine it is on."""

import os

import pytest
import torch

from llm_trainer.engine.device import choose_precision, detect_device, has_fast_bf16, precision_choice

CPU = torch.device("cpu")


def test_precision_is_what_was_asked_for() -> None:
    assert choose_precision("auto", CPU) in ("fp32", "bf16")
    assert [choose_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="expected one of auto, fp32, bf16, fp16"):
        choose_precision("int3", CPU)
    with pytest.raises(ValueError, match="fp16 needs a GPU, this run is on cpu; use bf16 or fp32"):
        choose_precision("fp16", CPU)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert detect_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"device: got 'tpu:0', but this machine has cpu"):
        detect_device("tpu:0")


@pytest.mark.parametrize("given", [None, "64"])
def test_few_kernels_are_kept_from_the_first_product_on(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN reads the variable once; a configured run asks for its device before it tries its model out."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given or "")
    if given is None:
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    detect_device("cpu")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == (given or "128")


@pytest.mark.parametrize(
    ("isa", "left"), [("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True), ("DEFAULT", True)]
)
@pytest.mark.parametrize("machine", ["amx", "avx512_bf16", "neither"])
def test_the_cpu_has_what_is_there_and_not_hidden(
    isa: str, left: bool, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: machine == "amx")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: machine == "avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    expected = left and machine != "neither"
    assert has_fast_bf16(CPU) == expected
    chosen = "bf16" if expected else "fp32"
    assert choose_precision("auto", CPU) == chosen
    said = precision_choice(chosen, "cpu")
    assert said.value == chosen and said.key == f"run_config.precision: {'fp32' if expected else 'bf16'}"
