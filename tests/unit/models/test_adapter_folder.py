"""Folders of adapters are opened like those of models: the base that they name, checked, and the adapters on it."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from llm_trainer import SFTTrainer
from llm_trainer.checkpoint import CheckpointError, write_model
from llm_trainer.models.adapter_folder import load_pretrained, load_start
from llm_trainer.models.build import build_model
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.models.rewarding import load_reward_model, reward_model

peft = pytest.importorskip("peft", reason="needs peft")

IDS = torch.arange(12).reshape(2, 6)
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def train(model: Any, folder: Path, **options: Any) -> Any:
    """The model with adapters after a step, saved in a run's folder."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        adapted = peft.get_peft_model(model, peft.LoraConfig(**(LORA | options)))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    quiet: dict[str, Any] = {"device": "cpu", "progress": False, "use_amp": False, "save_interval": 0}
    trainer = SFTTrainer(
        adapted, optimizer, [{"input_ids": IDS, "labels": IDS}], max_epochs=1, save_dir=str(folder), **quiet
    )
    if "task_type" in options:  # no language model
        trainer.save_checkpoint()
    else:
        trainer.train()
    return adapted


def other_model() -> Any:
    torch.manual_seed(9)
    return build_model(tiny_config())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tiny_model(), tmp_path / "base")
    return tmp_path / "base"


def test_a_run_of_adapters_is_opened_as_a_model(base: Path, tmp_path: Path) -> None:
    trained = train(build_model(str(base)), tmp_path / "run", modules_to_save=["lm_head"])
    expected = logits(trained)
    for place in ("run", "run/model", "run/checkpoint-00000001"):
        found = find_pretrained(tmp_path / place)
        assert found.kind is Kind.LANGUAGE_MODEL and found.place == base
        merged = build_model(tmp_path / place)
        assert type(merged).__name__ == "Qwen3ForCausalLM" and "lora" not in str(merged)
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
        assert all(parameter.requires_grad for parameter in merged.parameters())
        assert not merged.config.tie_word_embeddings  # training took them apart
    with pytest.raises(CheckpointError, match="a head of their own, and this model ties"):
        load_start(other_model(), str(tmp_path / "run"))
    write_model(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(build_model(tmp_path / "merged")), expected, rtol=0, atol=1e-5)
    beside = load_pretrained(type(merged), find_pretrained(tmp_path / "run"), merged=False)
    assert "lora" in str(beside)
    torch.testing.assert_close(logits(beside), expected, rtol=0, atol=1e-6)


def test_a_run_starts_from_adapters_merged(base: Path, tmp_path: Path) -> None:
    trained = train(build_model(str(base)), tmp_path / "run")
    model = other_model()
    load_start(model, str(tmp_path / "run"))
    torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-5)
    write_model(model, tmp_path / "plain")
    other = other_model()
    with pytest.raises(CheckpointError):  # a folder of weights is no checkpoint, as before
        load_start(other, str(tmp_path / "plain"))


def test_two_adapters_compute_together(tmp_path: Path) -> None:
    """On a base that was made in memory, which is in the folder."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**LORA))
        model.add_adapter("second", peft.LoraConfig(**(LORA | {"target_modules": ["o_proj"]})))
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options: dict[str, Any] = {"device": "cpu", "progress": False, "save_dir": str(tmp_path)}
    SFTTrainer(model, optimizer, [{"input_ids": IDS, "labels": IDS}], **options).save_checkpoint()
    torch.testing.assert_close(logits(build_model(tmp_path)), logits(model), rtol=0, atol=1e-5)


def test_a_base_that_moved_or_changed_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(train(build_model(str(base)), tmp_path / "run"))
    base.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"adapters on '.*base' with the fingerprint \w+, and the base is not to be had"
    ):
        build_model(tmp_path / "run")
    monkeypatch.setenv("BASE_MODEL", str(tmp_path / "moved"))
    torch.testing.assert_close(logits(build_model(tmp_path / "run")), expected, rtol=0, atol=1e-5)
    monkeypatch.delenv("BASE_MODEL")
    write_model(other_model(), base)
    with pytest.raises(CheckpointError, match=r"were trained on '.*base'.*another model.*BASE_MODEL=path"):
        build_model(tmp_path / "run")


def test_a_base_in_16_bits_keeps_small_differences(base: Path, tmp_path: Path) -> None:
    """Merged in fp32: the sum would be rounded to what a weight has room for."""
    trained = train(build_model(str(base), dtype=torch.bfloat16), tmp_path / "run")
    model = build_model(tmp_path / "run")  # fp32, as configurations build it
    weight = model.model.layers[0].self_attn.q_proj.weight
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(
        weight, layer.base_layer.weight.float() + layer.get_delta_weight("default").float(), rtol=0, atol=1e-6
    )
    assert load_pretrained(type(model), find_pretrained(tmp_path / "run")).dtype is torch.bfloat16


def test_a_folder_that_peft_wrote_is_opened_too(base: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(build_model(str(base)), peft.LoraConfig(**LORA))
        model.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(build_model(tmp_path / "theirs")), logits(model), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    shutil.rmtree(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="the base is not to be had"):
        build_model(tmp_path / "theirs")


def test_a_reward_model_with_adapters_is_a_reward_model(base: Path, tmp_path: Path) -> None:
    """Its head is new, so its base lies nowhere else, and is kept."""
    torch.manual_seed(3)
    model = reward_model(build_model(str(base)), pad_token_id=0)
    trained = train(model, tmp_path / "run", task_type="SEQ_CLS")
    folder = next((tmp_path / "run").glob("checkpoint-*")) / "model"
    assert "is not the model at" in json.loads((folder / "base.json").read_text())["kept_because"]
    assert find_pretrained(tmp_path / "run").kind is Kind.ANSWER_REWARD_MODEL
    found = load_reward_model(tmp_path / "run")
    torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)


def test_experts_made_in_memory(tmp_path: Path) -> None:
    """Whose weights transformers translates on their way to a folder and back."""
    trained = train(build_model(tiny_config("qwen3_moe")), tmp_path / "run", target_modules=["q_proj"])
    torch.testing.assert_close(logits(build_model(tmp_path / "run")), logits(trained), rtol=0, atol=1e-5)


def test_rounding_a_merged_model_leaves_its_positions_alone(base: Path, tmp_path: Path) -> None:
    """Frequencies are in no folder: whoever opens it computes them in fp32."""
    train(build_model(str(base)), tmp_path / "run")
    merged = load_pretrained(AutoModelForCausalLM, find_pretrained(tmp_path / "run"), dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert merged.dtype is torch.bfloat16
    assert torch.equal(merged.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=" and ".join)
def test_an_adapter_on_one_of_two_tied_layers_is_merged_into_that_alone(
    targets: list[str], base: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what they are
        trained = train(build_model(str(base)), tmp_path / "run", target_modules=["q_proj", *targets])
    merged = build_model(tmp_path / "run")
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-5)
    before = build_model(str(base)).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before) == ("embed_tokens" not in targets)
    assert torch.equal(merged.get_output_embeddings().weight, before) == ("lm_head" not in targets)
    assert not merged.config.tie_word_embeddings
