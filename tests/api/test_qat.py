"""Weights that are trained as they will be rounded: what they become, that nothing changes then, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from llm_trainer import SFTTrainer
from llm_trainer.builder.model import prepare_bits
from llm_trainer.config import errors
from llm_trainer.config.schema import TrainConfig
from llm_trainer.export.door import export
from llm_trainer.models import qat
from llm_trainer.models.build import build_model
from llm_trainer.plan.describe import describe
from llm_trainer.train_configs import ConfigError
from small_runs import SHAPE, losses, train_in_two_lives

IDS = torch.arange(3, 35)[None]


def config(folder: Path, reference_dir: Path, **sections: Any) -> TrainConfig:
    sections = {"quantization_config": {"qat": "int4"}} | sections
    return small_runs.config(folder, reference_dir, "fp32", **sections)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.filterwarnings("ignore")  # of torchao, as it is imported
def test_what_it_becomes_computes_what_was_trained(kind: str, tmp_path: Path, reference_dir: Path) -> None:
    """Exactly: converted in memory, from its folder, and as the numbers that an export writes."""
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")
    trainer = SFTTrainer(train_config=config(tmp_path, reference_dir, quantization_config={"qat": kind}))
    trainer.train()
    in_training = logits(trainer.base_model)
    folder = str(tmp_path / "run" / "model")

    export(folder, "hf", tmp_path / "exported")
    exported = build_model(str(tmp_path / "exported"))
    assert torch.equal(logits(exported), in_training) and qat.kind_of(exported) is None
    levels = exported.model.layers[0].mlp.up_proj.weight[0, : qat.GROUP].unique()  # type: ignore[index, union-attr]
    assert len(levels) <= (16 if kind == "int4" else qat.GROUP)

    opened = build_model(folder)
    assert qat.kind_of(opened) == kind and not torch.equal(logits(opened), in_training)
    for model in (trainer.base_model, opened):
        qat.convert(model, kind)  # type: ignore[arg-type]
        assert torch.equal(logits(model), in_training)

    SFTTrainer(train_config=config(tmp_path / "plain", reference_dir, quantization_config=None)).train()
    rounded, plain = losses(tmp_path), losses(tmp_path / "plain")
    assert rounded != plain and rounded == pytest.approx(plain, abs=0.1) and rounded[-1] < rounded[0] - 0.2


@pytest.mark.filterwarnings("ignore")
def test_it_goes_on_bit_for_bit(tmp_path: Path, reference_dir: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")
    SFTTrainer(train_config=config(tmp_path / "whole", reference_dir)).train()
    described = config(tmp_path / "in two", reference_dir)
    described.run_config.save_interval_steps = 1
    train_in_two_lives(described)
    assert losses(tmp_path / "in two") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4


def test_plan_does_not_guess(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config.qat: plan does not know what rounded weights take"):
        describe(config(tmp_path, reference_dir), "sft")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": (
        {"adapter_config": {}},
        "quantization_config.qat: got adapters beside it, under which weights are not trained",
    ),
    "bits": (
        {"quantization_config": {"qat": "int4", "bits": 8}},
        "bits: got 8 beside qat: int4, but it is an option of",
    ),
    "judged rows": (
        {"sft_config": None, "kto_config": {}},
        "quantization_config.qat: tried out with pretrain_config, sft_config, dpo_config only",
    ),
    "float8 of pairs": (
        {"quantization_config": {"float8": "rowwise"}, "sft_config": None, "dpo_config": {}},
        "quantization_config.float8: tried out with pretrain_config, sft_config only",
    ),
    "both": (
        {"quantization_config": {"float8": "rowwise", "qat": "int4"}},
        "float8: got 'rowwise' beside qat: int4, but whole weights",
    ),
    "kind": (
        {"quantization_config": {"qat": "int2"}},
        "quantization_config.qat: got 'int2', expected one of int4, int8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_had_together_is_said(name: str, tmp_path: Path, reference_dir: Path) -> None:
    sections, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, reference_dir, **sections)


def test_the_package_is_named_and_engines_that_were_not_tried(
    tmp_path: Path, reference_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "is_installed", lambda package: package != "torchao")
    with pytest.raises(ConfigError, match="quantization_config.qat needs the package torchao, .*: pip install torchao"):
        SFTTrainer(train_config=config(tmp_path, reference_dir))
    driven = config(tmp_path, reference_dir)
    driven.run_config.engine = "hf"
    with pytest.raises(ConfigError, match="quantization_config.qat: got engine hf, and it was tried out with torch"):
        SFTTrainer(train_config=driven)
    split = config(tmp_path, reference_dir, fsdp_config={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="size: got 2, which splits layers, beside quantization_config.qat"):
        prepare_bits(None, split, "fsdp")
    narrow = config(tmp_path, reference_dir, model_config=SHAPE | {"hidden_size": 48})
    monkeypatch.setattr(errors, "is_installed", lambda package: True)
    with pytest.raises(ConfigError, match="has 48 inputs, and weights are rounded in groups of 32 along them"):
        SFTTrainer(train_config=narrow)
