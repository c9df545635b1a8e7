"""QLoRA from a configuration: what is in few bits, that it learns as much, goes on bit for bit, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_trainer import AdapterConfig, GRPOTrainer, SFTTrainer, adapt
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.adapter_bases import find_base, fingerprint_of
from llm_trainer.config.load import parse
from llm_trainer.config.schema import TrainConfig
from llm_trainer.models.adapter_folder import load_pretrained
from llm_trainer.models.build import build_model
from llm_trainer.models.pretrained import find_pretrained
from llm_trainer.models.quantize import is_quantized, keep_layout
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.train.hooks import Hook
from llm_trainer.train_configs import ConfigError, ModelConfig, QuantizationConfig

pytest.importorskip("peft", reason="needs peft")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ASKED = [{"role": "user", "content": "count"}]
ROWS = [[*ASKED, {"role": "assistant", "content": "1 2 3" + " 4" * n}] for n in range(4)]
FOUR_BITS: dict[str, Any] = {"bits": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    build_model(ModelConfig(**SIZES)).save_pretrained(folder)
    return folder


def config(folder: Path, base: Path, reference_dir: Path, rows: Any = ROWS, **sections: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True, parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"save_dir": str(folder), "log_interval": 1, "progress": False, "precision": "fp32", "device": "cpu"}
    values: dict[str, Any] = {
        "model_config": str(base),
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(data),
        "batch_size": 2,
        "n_epochs": 3,
        "adapter_config": {"rank": 2},
        "quantization_config": FOUR_BITS,
        "optim_config": {"initial_lr": 1e-2},
        "run_config": run,
        "sft_config": {},
    }
    return parse(values | sections, "test")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def trained(described: TrainConfig, **given: Any) -> nn.Module:
    trainer = SFTTrainer(train_config=described, **given)
    trainer.train()
    model: nn.Module = trainer.base_model
    return model


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"bits": 4}, "Linear4bit"),
        ({"bits": 4, "double": False, "kind": "fp4", "storage": "bf16"}, "Linear4bit"),
        ({"bits": 8}, "Linear8bitLt"),
    ],
    ids=lambda value: str(value),
)
def test_layers_in_few_bits_learn_nearly_as_plain_ones(
    how: dict[str, Any], kind: str, base: Path, tmp_path: Path, reference_dir: Path
) -> None:
    model = trained(config(tmp_path / "few", base, reference_dir, quantization_config=how))
    kinds = [
        type(module.base_layer).__name__ for module in model.modules() if "base_layer" in dict(module.named_children())
    ]
    assert kinds == [kind] * 7
    trained(config(tmp_path / "plain", base, reference_dir, quantization_config=None))
    few, plain = losses(tmp_path / "few"), losses(tmp_path / "plain")
    assert few != plain and few == pytest.approx(plain, abs=0.05) and few[-1] < few[0] - 0.2


def test_gradients_are_those_of_the_same_weights_in_32_bits(base: Path) -> None:
    """Whatever forward came before: without gradients, some CPUs pack the weights, and gradients end there."""
    how = loading_options(QuantizationConfig(), base, torch.device("cpu"), torch.float32)
    quantized = build_model(str(base), options=how)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        quantized.eval()(ids)
    keep_layout(quantized)
    plain = build_model(str(base))
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            in_bits = quantized.get_submodule(name).weight
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(in_bits.data, in_bits.quant_state)
    gradients = []
    for model in (quantized, plain):
        model.train()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3
    with torch.no_grad():
        assert torch.allclose(quantized.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-5)


def test_layers_that_are_named_stay_as_they_are(base: Path, tmp_path: Path, reference_dir: Path) -> None:
    described = config(
        tmp_path,
        base,
        reference_dir,
        quantization_config={"skip_modules": ["o_proj"]},
        run_config={"save_dir": str(tmp_path)},
    )
    model = SFTTrainer(train_config=described).base_model
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}
    assert {kind for name, kind in kinds.items() if "o_proj" in name} == {"Linear"}
    assert {kind for name, kind in kinds.items() if "o_proj" not in name} == {"Linear4bit"}


def test_a_run_goes_on_bit_for_bit(base: Path, tmp_path: Path, reference_dir: Path) -> None:
    """With moments in 8 bits."""

    def described(folder: Path) -> TrainConfig:
        optimizer = {"optim_type": "adamw8bit", "initial_lr": 1e-2}
        found = config(folder, base, reference_dir, optim_config=optimizer)
        found.run_config.save_interval_steps = 1
        return found

    def breaks(view: Any) -> None:
        raise RuntimeError("broken off")

    trained(described(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="broken off"):
        trained(described(tmp_path / "in two"), hooks=[Hook("breaks", breaks, every_steps=3)])
    trained(described(tmp_path / "in two"))
    in_two, whole = losses(tmp_path / "in two"), losses(tmp_path / "whole")
    assert in_two == whole and len(whole) == 6


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_trained_is_opened_again(bits: int, base: Path, tmp_path: Path, reference_dir: Path) -> None:
    """Beside the same weights in few bits exactly; merged onto the numbers that these stand for."""
    model = trained(config(tmp_path / "run", base, reference_dir, quantization_config={"bits": bits})).eval()
    found = find_pretrained(str(tmp_path / "run" / "model"))
    beside = load_pretrained(AutoModelForCausalLM, found, merged=False).eval()
    merged = build_model(str(tmp_path / "run" / "model")).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits, of_beside, of_merged = (one(ids).logits for one in (model, beside, merged))
    assert torch.equal(of_beside, logits)
    assert torch.allclose(of_merged, logits, atol=1e-5 if bits == 4 else 0.05)  # of 8 bits the products are rounded too
    assert not is_quantized(merged) and all(parameter.requires_grad for parameter in merged.parameters())


def adapted(folder: Path, bits: int) -> Any:
    """A model in few bits with adapters, as a configuration makes it."""
    how = loading_options(QuantizationConfig(bits=bits), folder, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    return adapt(build_model(str(folder), options=how), AdapterConfig(rank=2))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_that_bits_were_made_of_are_compared(bits: int, base: Path, tmp_path: Path) -> None:
    """When a run begins, and when adapters are opened; not the last digits of scales, which another machine has others of."""
    model = adapted(base, bits)
    found = find_base(model)
    assert found is not None and found.source == str(base) and found.fingerprint
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer

    # 1. on another machine
    if bits == 4:
        state = layer.weight.quant_state
        state.offset = torch.nextafter(state.offset, torch.tensor(1.0))
        state.absmax[3] += 1
        again = find_base(model)
        assert again is not None and again.fingerprint == found.fingerprint == fingerprint_of(model)

    # 2. of another kind
    assert fingerprint_of(adapted(base, 12 - bits)) != found.fingerprint

    # 3. of another folder
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5, 7] *= -3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(adapted(other, bits)) != found.fingerprint

    # 4. changed by hand: a checkpoint holds all of it
    with torch.no_grad():
        layer.weight.data.view(-1)[7] ^= 3
    assert find_base(model) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_that_lie_in_a_folder_are_compared_as_they_are(bits: int, base: Path, tmp_path: Path) -> None:
    how = loading_options(QuantizationConfig(bits=bits), base, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    build_model(str(base), options=how).save_pretrained(tmp_path / "bits")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "bits"), AdapterConfig(rank=2))
    found = find_base(model)
    assert found is not None and found.source == str(tmp_path / "bits")
    assert found.fingerprint not in (None, fingerprint_of(adapted(base, bits)))
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    with torch.no_grad():
        layer.weight.data.view(-1)[7] ^= 3
    assert find_base(model) is None


def test_another_base_is_refused_where_adapters_are_opened(base: Path, tmp_path: Path, reference_dir: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    trained(config(tmp_path / "run", own, reference_dir))
    weights = load_file(own / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5, 7] *= -3
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="base has the fingerprint .*: it is another model"):
        build_model(str(tmp_path / "run" / "model"))
    again = config(tmp_path / "on", own, reference_dir, adapter_config={"path": str(tmp_path / "run" / "model")})
    with pytest.raises(ValueError, match="another"):
        SFTTrainer(train_config=again)


def test_adapters_of_bits_and_of_plain_weights_are_not_confused(
    base: Path, tmp_path: Path, reference_dir: Path
) -> None:
    trained(config(tmp_path / "bits", base, reference_dir))
    trained(config(tmp_path / "plain", base, reference_dir, quantization_config=None))
    of_bits, of_plain = ({"path": str(tmp_path / run / "model")} for run in ("bits", "plain"))
    again = config(tmp_path / "on", base, reference_dir, quantization_config=None, adapter_config=of_bits)
    with pytest.raises(
        ValueError, match=f"in few bits, with .* Expected model_config: {base}, and the quantization_co"
    ):
        SFTTrainer(train_config=again)
    merged = config(tmp_path / "on", tmp_path / "plain" / "model", reference_dir)
    with pytest.raises(
        ConfigError, match=f"plain/model holds adapters on '{base}' .* cannot be merged into weights in f"
    ):
        SFTTrainer(train_config=merged)
    again = config(tmp_path / "on", base, reference_dir, adapter_config=of_plain)
    with pytest.raises(ValueError, match=f"in few bits: other .* Expected model_config: {base}, and no quantization_c"):
        SFTTrainer(train_config=again)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no adapters": (
        {"adapter_config": None},
        "quantization_config: weights in few bits cannot be trained; expected an",
    ),
    "a shape": ({"model_config": SIZES}, "quantization_config: model_config is a shape"),
    "weights": (
        {"init_weights_path": "x.pt"},
        "init_weights_path: its weights cannot be put into matrices that are in 4 or 8",
    ),
    "pissa": (
        {"adapter_config": {"init": "pissa"}},
        "adapter_config.init: pissa takes what it begins with out of the weights",
    ),
    "8 bits": ({"quantization_config": {"bits": 8, "kind": "fp4"}}, "kind: got 'fp4' beside bits: 8"),
    "5 bits": ({"quantization_config": {"bits": 5}}, "quantization_config.bits: got 5, expected one of 4, 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_had_together_is_said(name: str, tmp_path: Path, base: Path, reference_dir: Path) -> None:
    sections, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, base, reference_dir, **sections)


def of_grpo(
    folder: Path, base: Path, reference_dir: Path, bits: int = 4, precision: str = "fp32", **section: Any
) -> GRPOTrainer:
    prompts = [{"prompt": f"count {n}", "answer": "1"} for n in range(2)]
    section = {"group_size": 4, "gen_max_seq_len": 6, "loss_beta": 0.1} | section
    quantization = {"quantization_config": {"bits": bits}}
    described = config(folder, base, reference_dir, prompts, sft_config=None, grpo_config=section, **quantization)
    described.run_config.precision = precision  # type: ignore[assignment]

    def distinct(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    return GRPOTrainer(train_config=described, reward_func=distinct)


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_policy_in_4_bits_draws_with_its_own_weights(
    precision: str, rounding: float, tmp_path: Path, base: Path, reference_dir: Path
) -> None:
    of_grpo(tmp_path, base, reference_dir, precision=precision).train()
    lines = list(map(json.loads, (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()))
    steps = [line for line in lines if "kl" in line]
    assert len(steps) == 3 and all(step["sampling/sampling_logp_difference/max"] < rounding for step in steps)
    assert steps[0]["kl"] < rounding**2 and steps[-1]["kl"] > 1e-6 and steps[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, "bits: got 8, which treats a token by the others of its micro-batch"),
        ({"rollout_servers": ["http://127.0.0.1:1"]}, "in place, in turns with learning, and rollout_servers are"),
        ({"max_staleness": 1}, "in place, in turns with learning, and max_staleness is 1; expected"),
    ],
)
def test_policies_in_few_bits_that_others_would_draw_from_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, base: Path, reference_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        of_grpo(tmp_path, base, reference_dir, **options)


def test_8_bits_and_shards_are_refused(tmp_path: Path, base: Path, reference_dir: Path) -> None:
    described = config(tmp_path, base, reference_dir, quantization_config={"bits": 8}, fsdp_config={})
    with pytest.raises(ValueError, match="quantization_config.bits: got 8, and FSDP shards numbers that are floats"):
        SFTTrainer(train_config=described)


def test_what_the_model_does_not_have_is_said(tmp_path: Path, base: Path, reference_dir: Path) -> None:
    described = config(tmp_path, base, reference_dir, quantization_config={"skip_modules": ["o_prj"]})
    with pytest.raises(
        ConfigError, match="skip_modules: o_prj matches no layer of this .*; its layers end in q_proj, k_proj"
    ):
        SFTTrainer(train_config=described)
