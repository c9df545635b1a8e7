"""Adapters from a configuration: every algorithm through one door, both styles alike, resumed bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import AdapterConfig, SFTTrainer, adapt, configure_optimizer, get_trainer_class
from llm_trainer.assemble import assemble
from llm_trainer.config.load import parse
from llm_trainer.config.options import Fsdp, Settings
from llm_trainer.config.schema import TrainConfig
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook
from llm_trainer.train.preflight import check_adapters
from llm_trainer.train_configs import ConfigError, ModelConfig

pytest.importorskip("peft", reason="needs peft")

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ASKED = [{"role": "user", "content": "count"}]
PAIRS = [{"prompt": "count", "chosen": "1 2 3" + " 4" * n, "rejected": "no"} for n in range(4)]
PROMPTS = [{"prompt": f"count to {n}", "answer": "x" * n} for n in range(4)]
ROWS: dict[str, list[Any]] = {
    "pretrain": [{"text": "one two three four five six seven eight nine ten"}] * 8,
    "sft": [[*ASKED, {"role": "assistant", "content": "1 2 3" + " 4" * n}] for n in range(4)],
    "dpo": PAIRS,
    "kto": [{"prompt": "count", "completion": "1 2" + " 3" * n, "label": n % 2 == 0} for n in range(4)],
    "reward": PAIRS,
    "grpo": PROMPTS,
    "ppo": PROMPTS,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 2, "gen_max_seq_len": 6},
    "ppo": {"gen_max_seq_len": 6, "ppo_epochs": 1, "ppo_batch_size": 2},
}


def short(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    return [-len(completion) / 10 for completion in completions]


def config(name: str, folder: Path, reference_dir: Path, **sections: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True, parents=True)
    data = folder.parent / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    values: dict[str, Any] = {
        "model_config": SHAPE,
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(data),
        "batch_size": 2,
        "adapter_config": {"rank": 2},
        "optim_config": {"initial_lr": 1e-2},
        "run_config": {
            "save_dir": str(folder),
            "log_interval": 1,
            "progress": False,
            "precision": "fp32",
            "device": "cpu",
        },
        f"{name}_config": SECTIONS.get(name, {}),
    }
    for key, section in sections.items():
        values[key] = values[key] | section if isinstance(section, dict) and key in values else section
    return parse(values, "test")


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ROWS)
def test_every_algorithm_trains_the_adapters_alone(name: str, tmp_path: Path, reference_dir: Path) -> None:
    given = {"reward_func": short} if name in ("grpo", "ppo") else {}
    described = config(name, tmp_path / "run", reference_dir, run_config={"max_steps": 2})
    trainer = get_trainer_class(name)(train_config=described, **given)
    model = trainer.base_model
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    trainer.train()
    changed = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    assert set(changed) <= set(trained_names(model)) and changed
    new_head = {"base_model.model.score.modules_to_save.default.weight"} if name == "reward" else set()
    assert {key for key in trained_names(model) if ".lora_" not in key} == new_head
    assert len(losses(tmp_path / "run")) == 2


def test_the_two_styles_are_bit_identical(tmp_path: Path, reference_dir: Path) -> None:
    described = config("sft", tmp_path / "config", reference_dir)
    SFTTrainer(train_config=described).train()
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SHAPE))
    torch.manual_seed(0)
    model = adapt(model, AdapterConfig(rank=2))
    optimizer = configure_optimizer(model, lr=1e-2)
    without = config("sft", tmp_path / "objects", reference_dir, adapter_config=None)
    SFTTrainer(train_config=without, model=model, optimizer=optimizer).train()
    assert losses(tmp_path / "config") == losses(tmp_path / "objects") and len(losses(tmp_path / "config")) == 2


def test_a_resumed_run_is_the_same_bits(tmp_path: Path, reference_dir: Path) -> None:
    """With dropout, in optimizer groups of different rates, in steps of several micro-batches."""
    sections = {
        "n_epochs": 3,
        "adapter_config": {"dropout": 0.2},
        "optim_config": {"lr_multipliers": {"lora_B": 16}, "enable_lr_scheduler": True, "warmup_iters": 2},
    }

    def dies(view: Any) -> None:
        raise KeyboardInterrupt

    def run(folder: Path, *hooks: Hook) -> None:
        described = config("sft", folder, reference_dir, **sections)
        described.run_config.save_interval_steps = 2
        SFTTrainer(train_config=described, hooks=hooks).train()

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in two", Hook("dies", dies, every_steps=3))
    run(tmp_path / "in two")
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "in two") == whole and len(whole) == 6


MIXTURE = {
    "architecture": "qwen3_moe",
    "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"data_loader_config": {"packing": "none"}},
    "recomputed": {"run_config": {"gradient_checkpointing": True}},
    "compiled": {"run_config": {"compile": True}},
}
SLOW = pytest.param("compiled", marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch compiles adapters of experts, which are no leaves
@pytest.mark.parametrize("way", ["padded", "recomputed", SLOW])
@pytest.mark.parametrize("experts", [False, True])
def test_rows_laid_flat_are_learned_alike_in_every_way(
    way: str, experts: bool, tmp_path: Path, reference_dir: Path
) -> None:
    sections: dict[str, Any] = {"n_epochs": 2, "adapter_config": {"experts": experts}}
    if experts:
        sections["model_config"] = MIXTURE
    for folder, more in (("flat", {"data_loader_config": {"packing": "flat"}}), (way, WAYS[way])):
        SFTTrainer(train_config=config("sft", tmp_path / folder, reference_dir, **(sections | more))).train()
    flat = losses(tmp_path / "flat")
    assert losses(tmp_path / way) == pytest.approx(flat, rel=1e-5) and len(set(flat)) == 4


def test_the_screen_and_the_log_say_what_is_trained(
    tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    multiples = {"lr_multipliers": {"lora_B": 16}}
    described = config("sft", tmp_path / "run", reference_dir, optim_config=multiples, run_config={"max_steps": 1})
    SFTTrainer(train_config=described).train()
    shown = capsys.readouterr().out
    assert "adapters  lora of rank 2, alpha 4\n" in shown
    assert "learning rate  0.01; x 16 for 7 of 14 tensors" in shown
    line = next(line.split() for line in shown.splitlines() if line.split()[:2] == ["language_model", "Linear"])
    first = json.loads((tmp_path / "run" / "log" / "metrics.jsonl").read_text().splitlines()[0])
    row = next(row for row in first["adapters"] if row["kind"] == "Linear")
    assert line[2:5] == [str(row["found"]), str(row["adapted"]), str(row["trained"])] and row["adapted"] == 7
    rates = (tmp_path / "run" / "log" / "lr.txt").read_text()
    assert "0.01" in rates and "0.16" not in rates


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_run_goes_on_from_the_adapters_of_another(init: str, tmp_path: Path, reference_dir: Path) -> None:
    """PiSSA's base is another one than the folder that it was loaded from, and lies beside the adapters."""
    torch.manual_seed(3)
    build_model(ModelConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    on = {"model_config": str(tmp_path / "base"), "run_config": {"max_steps": 1}}
    first = SFTTrainer(train_config=config("sft", tmp_path / "a", reference_dir, adapter_config={"init": init}, **on))
    first.train()
    folder = tmp_path / "a" / "model"
    section = {"adapter_config": None, "model_config": str(folder / "base" if init == "pissa" else tmp_path / "base")}
    described = config("sft", tmp_path / "b", reference_dir, **(on | section))
    described.adapter_config = AdapterConfig(path=str(folder))
    second = SFTTrainer(train_config=described)
    pairs = zip(first.base_model.named_parameters(), second.base_model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)
    assert trained_names(second.base_model) == trained_names(first.base_model)
    second.train()
    assert losses(tmp_path / "b")[0] < losses(tmp_path / "a")[0]
    other = build_model(ModelConfig(**SHAPE))
    with pytest.raises(ValueError, match=r"was trained on .*Expected model_config: .*base"):
        adapt(other, AdapterConfig(path=str(folder)))


def test_a_model_of_the_users_and_a_section_are_one_too_many(tmp_path: Path, reference_dir: Path) -> None:
    described = config("sft", tmp_path / "run", reference_dir)
    with pytest.raises(
        ValueError, match=r"adapter_config: the model is given as an object.*adapt\(model, AdapterConfig"
    ):
        assemble(described, SFTTrainer, {"model": build_model(ModelConfig(**SHAPE))})


def test_methods_that_were_not_tried_where_weights_are_sharded(tmp_path: Path, reference_dir: Path) -> None:
    described = config("sft", tmp_path / "run", reference_dir)
    described.adapter_config = AdapterConfig(kind="loha")
    trainer = SFTTrainer(train_config=described)

    class Sharding(TorchEngine):
        name, in_lockstep = "fsdp", True

    sharding = Sharding(torch.device("cpu"), "fp32")
    with pytest.raises(
        ConfigError, match="kind: got loha with engine: fsdp, which shards weights; expected lora, or eng"
    ):
        check_adapters(trainer.base_model, Settings(), sharding)
    split = Settings(fsdp=Fsdp(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="tensor_parallel_size: got 2"):
        check_adapters(trainer.base_model, split, sharding)


def test_new_tokens_that_nothing_would_train(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match="vocabulary_config: beside adapter_config, .* rows of new tokens would be neither"
    ):
        config("sft", tmp_path / "run", reference_dir, vocabulary_config={"add_tokens": ["<new>"]})


def test_tensor_parallelism_is_refused(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel_size: got 2, which splits matrices that adapters have replaced"
    ):
        config("sft", tmp_path / "run", reference_dir, fsdp_config={"tensor_parallel_size": 2})
