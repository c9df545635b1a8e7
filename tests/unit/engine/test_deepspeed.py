"""What the DeepSpeed engine decides before DeepSpeed runs; that it trains is shown in tests/distributed."""

import importlib.util
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from llm_trainer.engine.deepspeed import DeepSpeedEngine
from llm_trainer.engine.zero import DeepSpeedError, complete, recompute_layers, tied_together
from llm_trainer.optim.optimizers import configure_optimizer

CPU = torch.device("cpu")
STAGE_2 = {"zero_optimization": {"stage": 2}}


def test_the_loop_decides_batches_and_clipping() -> None:
    given = {"gradient_clipping": 7.0, **STAGE_2}
    whole, precision = complete(given, "fp32")
    assert whole["zero_optimization"] == {"stage": 2} and precision == "fp32"
    assert whole["gradient_clipping"] == 0.0 and given["gradient_clipping"] == 7.0
    assert whole["gradient_accumulation_steps"] > 1  # with 1, DeepSpeed would not add up offloaded gradients
    assert not {"fp16", "bf16", "torch_autocast"} & whole.keys()


def test_auto_leaves_the_decision_to_the_trainer() -> None:
    """As in the JSON that transformers takes, at any depth."""
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"}},
        "steps_per_print": 0,
    }
    whole, precision = complete(given, "fp32")
    assert whole["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}} and precision == "fp32"
    assert whole["steps_per_print"] == 0 and not {"bf16", "train_batch_size"} & whole.keys()


def test_without_a_json_it_is_zero_2_which_scales_the_losses_of_fp16() -> None:
    whole, precision = complete(None, "fp16")
    assert whole["zero_optimization"]["stage"] == 2 and precision == "fp16" and whole["fp16"] == {"enabled": True}
    with pytest.raises(DeepSpeedError, match="fp16 with ZeRO stage 0"):
        complete({}, "fp16")


@pytest.mark.parametrize(
    ("sections", "asked", "found", "key"),
    [
        ({}, "bf16", "bf16", "torch_autocast"),
        ({"bf16": {"enabled": False}}, "bf16", "bf16", "torch_autocast"),
        ({"bf16": {"enabled": True}}, "fp32", "bf16", "bf16"),
        ({"fp16": {"enabled": True}}, "bf16", "fp16", "fp16"),
        ({}, "fp16", "fp16", "fp16"),
    ],
)
def test_a_section_that_is_switched_on_wins_over_the_precision(
    sections: dict[str, Any], asked: str, found: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_trainer.engine.deepspeed.check_arithmetic", lambda *_: None)  # of this machine
    whole, precision = complete(STAGE_2 | sections, asked)
    switched_on = [name for name in ("torch_autocast", "bf16", "fp16") if whole.get(name, {}).get("enabled")]
    assert (precision, switched_on) == (found, [key])
    assert DeepSpeedEngine(CPU, asked, STAGE_2 | sections)._holds_16_bits == (key != "torch_autocast")


@pytest.mark.parametrize(
    ("config", "precision", "message"),
    [
        ({"optimizer": {"type": "Adam"}, "train_batch_size": 8}, "fp32", "got optimizer, train_batch_size, which the"),
        ({"fp16": {"enabled": True}}, "fp32", "got fp16 with ZeRO stage 0, which scales no loss; use stage 1, 2 or 3"),
        ({}, "fp16", "got fp16 with ZeRO stage 0"),
    ],
)
def test_what_it_cannot_do_is_refused(config: dict[str, Any], precision: str, message: str) -> None:
    with pytest.raises(DeepSpeedError, match=re.escape(message)):
        DeepSpeedEngine(CPU, precision, config)


@pytest.mark.parametrize("name", ["muon", "adafactor", "adamw8bit", "lion8bit"])
def test_optimizers_of_whole_matrices_are_refused_where_matrices_are_cut(name: str) -> None:
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
    optimizer = configure_optimizer(model=model, optimizer_type=name)
    with pytest.raises(DeepSpeedError, match=r"needs whole parameters, and ZeRO 2 gives it flat pieces"):
        DeepSpeedEngine(CPU, config=STAGE_2).prepare(model, model, optimizer)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_a_device_that_deepspeed_has_not_found_is_refused() -> None:
    model = nn.Linear(2, 2)
    engine = DeepSpeedEngine(torch.device("meta"), config=STAGE_2)
    with pytest.raises(DeepSpeedError, match=r"device: got meta, but DeepSpeed has found (cpu|cuda): choose that"):
        engine.prepare(model, model, configure_optimizer(model=model))
    assert not torch.distributed.is_initialized()


def test_a_model_without_layers_to_recompute_is_refused() -> None:
    with pytest.raises(
        DeepSpeedError, match="needs a transformers model that can recompute its layers, this is Linear"
    ):
        recompute_layers(nn.Linear(2, 2), lambda *_: None)


class Outputs(NamedTuple):
    loss: torch.Tensor
    scores: list[torch.Tensor]
    count: int
    absent: None = None


def test_every_output_gets_a_gradient_as_soon_as_one_does() -> None:
    """So that a rank that goes back from all outputs runs the hooks of one that goes back from the loss."""
    x = torch.ones(3, requires_grad=True)
    inside = [x.sum() * 2, x * 3]
    seen: list[list[float]] = []
    inside[1].register_hook(lambda gradient: seen.append(gradient.tolist()))
    outputs = tied_together(Outputs(inside[0], [inside[1], torch.ones(2)], 5))
    assert isinstance(outputs, Outputs) and outputs.count == 5 and outputs.absent is None
    assert outputs.loss.item() == 6 and outputs.scores[0].tolist() == [3, 3, 3] and not outputs.scores[1].requires_grad
    outputs.loss.backward()
    assert seen == [[0, 0, 0]] and x.grad is not None and x.grad.tolist() == [2, 2, 2]
