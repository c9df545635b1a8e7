"""Products in 8 bits while a model is trained: which layers, what is learned, what is saved, and where they are refused.

No machine of these tests has such products: torchao computes the same rounding with plain ones.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import small_runs
from llm_trainer import SFTTrainer
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.config.schema import TrainConfig
from llm_trainer.engine import device
from llm_trainer.engine.device import check_float8
from llm_trainer.export.door import export
from llm_trainer.models import float8
from llm_trainer.models.build import build_model
from llm_trainer.models.inside import is_kind_of
from llm_trainer.train_configs import ConfigError
from small_runs import losses, train_in_two_lives

SHAPE = small_runs.SHAPE | {"num_hidden_layers": 2}
SCALINGS = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")
    monkeypatch.setattr(float8, "EMULATES", True)
    monkeypatch.setattr(device, "compute_capability", lambda device: (9, 0))


def config(folder: Path, reference_dir: Path, scaling: str | None, **sections: Any) -> TrainConfig:
    bits = None if scaling is None else {"float8": scaling}
    sections = {"model_config": SHAPE, "quantization_config": bits} | sections
    return small_runs.config(folder, reference_dir, "bf16", **sections)


def rounded(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_kind_of(module, "torchao.", "Float8Linear")]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.filterwarnings("ignore")  # of torchao, as it is imported
def test_it_learns_and_what_is_saved_are_plain_weights(
    scaling: str, tmp_path: Path, reference_dir: Path, emulated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = SFTTrainer(train_config=config(tmp_path / "f8", reference_dir, scaling))
    trainer.train()
    assert "float8  14 of 15 linear layers multiply in 8 bits" in capsys.readouterr().out
    SFTTrainer(train_config=config(tmp_path / "bf16", reference_dir, None)).train()
    ours, plain = losses(tmp_path / "f8"), losses(tmp_path / "bf16")
    assert ours != plain and ours == pytest.approx(plain, rel=0.03) and ours[-1] < ours[0] - 0.2

    # What others open has no trace of it, and the gate of an export finds what the model answered.
    folder = tmp_path / "f8" / "run" / "model"
    opened = AutoModelForCausalLM.from_pretrained(folder)
    trained = dict(trainer.base_model.named_parameters())
    assert not rounded(opened) and len(rounded(trainer.base_model)) == 14
    assert all(
        torch.equal(value, trained[name]) and value.dtype == torch.float32 for name, value in opened.named_parameters()
    )
    export(str(folder), "hf", tmp_path / "exported")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, trainer.base_model.eval()(ids).logits)
        assert not torch.equal(opened(ids).logits, trainer.base_model.train()(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_it_goes_on_bit_for_bit_and_recomputes(tmp_path: Path, reference_dir: Path, emulated: None) -> None:
    SFTTrainer(train_config=config(tmp_path / "whole", reference_dir, "rowwise")).train()
    again = {"run_config": {"save_interval_steps": 1, "gradient_checkpointing": True}}
    train_in_two_lives(config(tmp_path / "in two", reference_dir, "rowwise", **again))
    assert losses(tmp_path / "in two") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4


@pytest.mark.filterwarnings("ignore")
def test_head_embeddings_routers_and_odd_sizes_stay(emulated: None) -> None:
    moe = MoeConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=32)
    mixture = build_model(ModelConfig(**SHAPE, architecture="qwen3_moe", moe=moe))
    float8.prepare(mixture, "tensorwise")
    assert {name.rpartition(".")[2] for name in rounded(mixture)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    odd = build_model(ModelConfig(**SHAPE | {"intermediate_size": 72}))
    float8.prepare(odd, "tensorwise")
    assert {name.rpartition(".")[2] for name in rounded(odd)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    narrow = build_model(ModelConfig(**SHAPE | {"hidden_size": 40, "intermediate_size": 72}))
    with pytest.raises(ConfigError, match="no layer of this Qwen3ForCausalLM has sides that are multiples of 16"):
        float8.prepare(narrow, "tensorwise")


@pytest.mark.parametrize(
    ("scaling", "capability", "precision", "message"),
    [
        (
            "tensorwise",
            (0, 0),
            "bf16",
            "got tensorwise, which needs a GPU of compute capability 8.9 .* is on cpu; leave it out",
        ),
        ("rowwise", (8, 0), "bf16", "capability 9.0 or later .*precision: bf16 is the nearest that works here"),
        ("rowwise", (8, 9), "bf16", "expected tensorwise, which works here"),
        ("rowwise", (9, 0), "fp32", "got it beside precision: fp32, .*expected run_config.precision: bf16"),
    ],
)
def test_where_there_are_no_such_products_the_nearest_is_named(
    scaling: str, capability: tuple[int, int], precision: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "compute_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=f"quantization_config.float8: .*{message}"):
        check_float8(scaling, torch.device("cpu"), precision)


def test_it_is_refused_before_anything_is_read(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config.float8: got tensorwise, .* this run is on cpu"):
        SFTTrainer(train_config=config(tmp_path, reference_dir, "tensorwise", tokenizer="nowhere"))
