"""Adapters that begin with what the first rows of a run say: EVA, and LoRA-GA under the loss of the run."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import AdapterConfig, adapt, create_trainer
from llm_trainer.checkpoint import write_model
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model

peft = pytest.importorskip("peft", reason="needs peft")

SHAPE = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
INITS = ("eva", "lora_ga")
IDS = torch.arange(12).reshape(2, 6)


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(SHAPE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(base_model(), folder)
    return folder


def rows(number: int = 8) -> dict[str, torch.Tensor]:
    """One batch of padded rows, of which the first tokens are a prompt."""
    torch.manual_seed(2)
    ids = torch.randint(1, 64, (number, 12))
    mask = torch.ones_like(ids)
    mask[::2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(init: str, source: Path | None = None, **options: Any) -> Any:
    model = base_model() if source is None else build_model(str(source))
    torch.manual_seed(1)
    return adapt(model, AdapterConfig(rank=4, target=["q_proj", "down_proj"], init=init, **options))


def trainer_of(model: Any, folder: Path, batches: Any = None, name: str = "sft", **options: Any) -> Any:
    values: dict[str, Any] = {
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        "train_loader": batches or [rows()] * 4,
        "max_epochs": 1,
        "device": "cpu",
        "use_amp": False,
        "log_interval": 1,
        "save_interval": 0,
        "progress": False,
        "save_dir": str(folder),
    }
    return create_trainer(name, model=model, **(values | options))


def matrices(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in model.named_parameters() if name in key}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every decomposition begin alike: the signs of singular vectors depend on what was drawn before."""
    plain = torch.svd_lowrank

    def decompose(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return plain(*args, **options)

    monkeypatch.setattr(torch, "svd_lowrank", decompose)


def test_eva_is_pefts_on_the_rows_of_the_run(tmp_path: Path) -> None:
    batches = [rows()] * 2
    model = adapted("eva")
    state = torch.get_rng_state()
    trainer_of(model, tmp_path, batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), logits(base_model()), rtol=0, atol=0)

    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory
        theirs = peft.get_peft_model(base_model(), settings)
    peft.initialize_lora_eva_weights(theirs, [rows()] * 2, show_progress_bar=False)
    expected = matrices(theirs, "lora_A")
    found = matrices(model, "lora_A")
    assert found.keys() == expected.keys() and len(found) == 4
    for name, value in found.items():  # directions of unit length, whose last digits the kernels of a CPU decide
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_lora_ga_is_pefts_under_the_loss_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    seeded(monkeypatch)
    batch = rows()
    model = adapted("lora_ga")
    state = torch.get_rng_state()
    trainer_of(model, tmp_path, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), logits(base_model()), rtol=0, atol=1e-5)
    before = base_model().get_submodule("model.layers.0.mlp.down_proj").weight
    assert not torch.equal(model.get_base_model().model.layers[0].mlp.down_proj.get_base_layer().weight, before)

    theirs = base_model()
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about peft's hooks
        preprocess_loraga(theirs, settings, lambda: theirs(**batch).loss.backward())
        expected = dict(peft.get_peft_model(theirs, settings).named_parameters())
    for name, value in model.named_parameters():
        # Our head runs in chunks, and singular vectors enlarge what that rounds otherwise.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_how_rows_are_cut_changes_nothing(init: str, tmp_path: Path) -> None:
    """LoRA-GA under the mean over all terms; EVA sees the batches of a loader as they come."""
    whole, found = rows(), []
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 4), slice(4, 8))]
    for number, options in enumerate(({}, {"grad_accum_steps": 2}, {"micro_batch_tokens": 24})):
        model = adapted(init)
        trainer_of(model, tmp_path / str(number), halves, **options)
        found.append(matrices(model, "lora_"))
    if init == "lora_ga":
        model = adapted(init)
        trainer_of(model, tmp_path / "whole", [whole])
        found.append(matrices(model, "lora_"))
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=0, atol=1e-4)  # singular vectors enlarge rounding


@pytest.mark.parametrize("init", INITS)
def test_a_run_goes_on_bit_for_bit(init: str, base: Path, tmp_path: Path) -> None:
    whole = adapted(init, base, dropout=0.1)
    trainer_of(whole, tmp_path / "whole", max_steps=4).train()
    trainer_of(adapted(init, base, dropout=0.1), tmp_path / "half", max_steps=2, resume="auto").train()
    second = adapted(init, base, dropout=0.1)
    trainer_of(second, tmp_path / "half", [rows()] * 4, max_steps=4, resume="auto").train()
    for (name, value), other in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(value, other), name
    folder = tmp_path / "half" / "checkpoint-00000004" / "model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["eva_config"] is None and config["lora_ga_config"] is None
    assert (folder / "base").is_dir() == (init == "lora_ga")


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("init", INITS)
def test_a_policy_begins_as_its_reference(init: str, name: str, tmp_path: Path) -> None:
    parts = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion")}[name]
    torch.manual_seed(1)
    batch = {f"{part}_input_ids": torch.randint(1, 64, (4, 5)) for part in parts}
    batch |= {f"{part}_attention_mask": torch.ones(4, 5, dtype=torch.long) for part in parts}
    if name == "kto":
        batch["desirable"] = torch.tensor([1, 0, 1, 0])
    model = adapted(init)
    trainer = trainer_of(model, tmp_path, [batch] * 3, name)
    assert "where the run began" in trainer.reference.description
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["loss"] for line in lines if "loss" in line]
    assert first == pytest.approx(math.log(2) if name == "dpo" else 0.5, abs=1e-5)
    assert last < first


def test_rewards_begin_too(tmp_path: Path) -> None:
    from llm_trainer.models.rewarding import reward_model

    torch.manual_seed(1)
    parts = ("prompt", "chosen", "rejected")
    batch = {f"{part}_input_ids": torch.randint(1, 64, (4, 5)) for part in parts}
    batch |= {f"{part}_attention_mask": torch.ones(4, 5, dtype=torch.long) for part in parts}
    model = adapt(reward_model(base_model(), pad_token_id=0), AdapterConfig(rank=4, target=["q_proj"], init="lora_ga"))
    trainer_of(model, tmp_path, [batch], "reward")
    assert all(value.abs().sum() > 0 for value in matrices(model, "lora_B").values())


def test_a_base_in_four_bits_is_seen_and_has_no_gradients(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from llm_trainer.config.quantization import QuantizationConfig
    from llm_trainer.models.quantized_loading import loading_options

    how = loading_options(QuantizationConfig(), base, torch.device("cpu"), torch.float32)
    model = build_model(str(base), options=how)
    before = logits(model)
    adapted = adapt(model, AdapterConfig(rank=4, target=["q_proj"], init="eva"))
    drawn = matrices(adapted, "lora_A")
    trainer_of(adapted, tmp_path)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)
    assert all(not torch.equal(value, drawn[name]) for name, value in matrices(adapted, "lora_A").items())
    with pytest.raises(
        ValueError, match="init: got lora_ga, and found a Qwen3ForCausalLM: its weights are in few bits and"
    ):
        adapt(build_model(str(base), options=how), AdapterConfig(rank=4, init="lora_ga"))


# What is refused.


def test_new_tokens_beside_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"init: got eva, and found a Qwen3ForCausalLM: it gets rows of new tokens"):
        adapt(base_model(), AdapterConfig(rank=4, init="eva"), [3])


def test_what_has_no_rows_before_its_first_step_is_refused(tmp_path: Path) -> None:
    from llm_trainer import Distillation

    with pytest.raises(
        ValueError, match="init: eva looks at the rows that are learned from, and SFTTrainer has none, or"
    ):
        trainer_of(adapted("eva"), tmp_path, kd=Distillation(teacher_model=base_model()))


def test_rows_that_say_too_little_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = rows(1)
    few["labels"][:, :7] = -100
    with pytest.raises(
        ValueError, match="eva wants twice as many tokens with labels in one forward as the rank, 8, and"
    ):
        trainer_of(adapted("eva"), tmp_path, [few])
    with monkeypatch.context() as patched:
        patched.setattr(
            "llm_trainer.models.adapter_start._MOST_PASSES", 1
        )  # it takes a second one to see that nothing moves
        with pytest.raises(ValueError, match=r"init: eva found no directions that stay the same after"):
            trainer_of(adapted("eva"), tmp_path, [rows()])
    nothing = rows()
    nothing["labels"][:] = -100
    with pytest.raises(
        ValueError, match="init: lora_ga begins along the gradient of the first rows' loss, and this does"
    ):
        trainer_of(adapted("lora_ga"), tmp_path, [nothing])


def test_a_loader_that_is_read_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be read only once"):
        trainer_of(adapted("lora_ga"), tmp_path, (batch for batch in [rows()] * 2), max_epochs=1)


def test_ranks_without_weights_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build_model(SHAPE, empty=True)
    with pytest.raises(ValueError, match="on this rank its weights are not there yet"):
        trainer_of(adapt(model, AdapterConfig(rank=4, init="eva")), tmp_path)
