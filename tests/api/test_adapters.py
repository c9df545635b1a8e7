"""Adapters from a configuration: every algorithm through one door, both styles alike, resumed bit for bit."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_trainer import AdapterConfig, SFTTrainer, adapt, configure_optimizer, get_trainer_class
from llm_trainer.assemble import assemble
from llm_trainer.config.load import parse
from llm_trainer.config.options import Fsdp, Settings
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models.build import build_model
from llm_trainer.models.scored import ScoredModel
from llm_trainer.models.vocabulary import extend_rows, extend_vocabulary
from llm_trainer.train.hooks import Hook
from llm_trainer.train.preflight import check_adapters
from llm_trainer.train_configs import ConfigError, ModelConfig

peft = pytest.importorskip("peft", reason="needs peft")

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


def test_methods_that_do_not_stand_sharding(tmp_path: Path, reference_dir: Path) -> None:
    described = config("sft", tmp_path / "run", reference_dir)
    described.adapter_config = AdapterConfig(kind="deft")
    trainer = SFTTrainer(train_config=described)

    class Sharding(TorchEngine):
        name, in_lockstep = "fsdp", True

    sharding = Sharding(torch.device("cpu"), "fp32")
    with pytest.raises(
        ConfigError, match="kind: got deft on fsdp, where its curve is 2e-5 and more from .*; expected lora or another"
    ):
        check_adapters(trainer.base_model, Settings(), sharding)
    split = Settings(fsdp=Fsdp(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="tensor_parallel_size: got 2"):
        check_adapters(trainer.base_model, split, sharding)


TOKENS: dict[str, Any] = {"add_tokens": ["count", "1 2"], "add_special_tokens": ["<|end|>"], "pad_to_multiple_of": 64}
NEW = slice(512, 515)


def with_tokens(folder: Path, base: Path, reference_dir: Path, **sections: Any) -> SFTTrainer:
    """A run of six steps whose answers have new tokens."""
    more = {"model_config": str(base), "vocabulary_config": TOKENS, "n_epochs": 3}
    described = config("sft", folder, reference_dir, **(more | sections))
    described.run_config.save_interval_steps = 2
    return SFTTrainer(train_config=described)


def tables(model: Any) -> list[torch.Tensor]:
    """Embedding and head without adapters."""
    inner = model.get_base_model()
    return [layer.original_module.weight.detach() for layer in (inner.model.embed_tokens, inner.lm_head)]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a model."""
    torch.manual_seed(3)
    build_model(ModelConfig(**SHAPE, tie_word_embeddings=request.param)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers by its old name
def test_of_new_tokens_the_rows_alone_are_learned_and_saved(base: Path, tmp_path: Path, reference_dir: Path) -> None:
    trainer = with_tokens(tmp_path / "run", base, reference_dir)
    model: Any = trainer.base_model
    before = [table.clone() for table in tables(model)]
    rows = {key: value for key, value in model.named_parameters() if "trainable_tokens_delta" in key}
    is_tied = model.config.tie_word_embeddings
    assert len(rows) == (1 if is_tied else 2) and {value.shape for value in rows.values()} == {(3, 16)}
    assert all(torch.equal(value, before[0 if "embed" in key else 1][NEW]) for key, value in rows.items())
    first = {key: value.detach().clone() for key, value in rows.items()}
    trainer.train()
    assert len(losses(tmp_path / "run")) == 6

    # 1. what has learned
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tables(model), before, strict=True))
    assert all(not torch.isclose(rows[key], first[key]).any(1).all() for key in rows)
    # 2. what is saved, and that others open it
    folder = tmp_path / "run" / "model"
    saved = load_file(folder / "adapter_model.safetensors")
    assert sorted(value.shape[0] for key, value in saved.items() if "lora" not in key) == [3] * len(rows)
    ids = torch.tensor([[5, 512, 7, 513, 514, 9]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        theirs = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder)
        ).eval()
        assert torch.equal(theirs(ids).logits, expected)
        merged = build_model(str(folder)).eval()
        assert (merged(ids).logits - expected).abs().max() < 1e-5
    assert type(merged).__name__ == "Qwen3ForCausalLM"
    ends = [layer.weight.detach() for layer in (merged.model.embed_tokens, merged.lm_head)]
    assert (ends[0] is ends[1] or torch.equal(*ends)) == is_tied
    for table, old in zip(ends, before, strict=True):
        moved = (table != old).any(1).nonzero().flatten().tolist()
        assert set(moved) <= {512, 513, 514} and moved


def test_new_rows_get_the_gradients_that_they_have_in_the_whole_table(base: Path, tmp_path: Path) -> None:
    """Of a tied table those of embedding and head together; B is 0, so that both models are the same."""
    ids = torch.tensor([[5, 512, 7, 513, 514, 9, 512, 1]])
    model = build_model(str(base))
    extend_rows(model, {512: [1, 2], 513: [3], 514: [4, 5]}, 515, 64)
    whole = deepcopy(model)
    whole(input_ids=ids, labels=ids).loss.backward()
    adapted: Any = adapt(model, AdapterConfig(rank=2), [512, 513, 514])
    scored = ScoredModel(adapted)
    assert not scored.whole_logits  # the head runs in chunks
    (-scored(ids, torch.ones_like(ids), labels=ids, differentiable_logprobs=True).logprobs[:, 1:].mean()).backward()
    for key, value in adapted.named_parameters():
        if "trainable_tokens_delta" in key:
            table = whole.model.embed_tokens if "embed" in key else whole.lm_head
            assert value.grad == pytest.approx(table.weight.grad[NEW], rel=1e-5, abs=1e-7)


def test_a_run_with_new_rows_goes_on_bit_for_bit_and_is_that_of_objects(
    base: Path, tmp_path: Path, reference_dir: Path
) -> None:
    with_tokens(tmp_path / "whole", base, reference_dir).train()
    for steps in (3, 6):
        with_tokens(tmp_path / "in two", base, reference_dir, run_config={"max_steps": steps}).train()
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "in two") == whole and len(set(whole)) == 6

    model, tokenizer = build_model(str(base)), load_tokenizer(reference_dir / "tokenizer")
    words = {"tokens": TOKENS["add_tokens"], "special_tokens": TOKENS["add_special_tokens"]}
    new = extend_vocabulary(model, tokenizer, **words, pad_to_multiple_of=64)
    torch.manual_seed(0)
    adapted = adapt(model, AdapterConfig(rank=2), new)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    without = {"adapter_config": None, "tokenizer": str(tmp_path / "tokenizer"), "n_epochs": 3}
    described = config("sft", tmp_path / "objects", reference_dir, **without)
    described.run_config.save_interval_steps = 2
    optimizer = configure_optimizer(adapted, lr=1e-2)
    SFTTrainer(train_config=described, model=adapted, optimizer=optimizer).train()
    assert losses(tmp_path / "objects") == whole


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"adapter_config": {"rank": None, "path": "somewhere"}},
            "the adapter in adapter_config.path was trained on the rows",
        ),
        (
            {"adapter_config": {"rank": None, "kind": "loha"}},
            "kind: loha trains no rows of new tokens, which lora does",
        ),
        ({"quantization_config": {"bits": 4}}, "a base in few bits is not saved, nor would its new rows be"),
    ],
)
def test_new_tokens_that_nothing_would_train(
    sections: dict[str, Any], message: str, tmp_path: Path, reference_dir: Path
) -> None:
    more = {"model_config": str(tmp_path), "vocabulary_config": TOKENS}
    with pytest.raises(ConfigError, match=f"vocabulary_config: .*{message}"):
        config("sft", tmp_path / "run", reference_dir, **(more | sections))


def test_tables_of_new_tokens_that_are_trained_otherwise_too(base: Path) -> None:
    for values in ({"target": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(ValueError, match="of .*, which target or modules_to_save|, to which they are tied"):
            adapt(build_model(str(base)), AdapterConfig(rank=2, **values), [5])
    model = build_model(str(base))
    model.config.tie_word_embeddings = not model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="are tied: (True|False), and its configuration says"):
        adapt(model, AdapterConfig(rank=2), [5])
    with_bias = build_model(str(base))
    with_bias.lm_head.bias = nn.Parameter(torch.zeros(512))
    with pytest.raises(ValueError, match="the head of this Qwen3ForCausalLM has a bias"):
        adapt(with_bias, AdapterConfig(rank=2), [5])


def test_tensor_parallelism_is_refused(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel_size: got 2, which splits matrices that adapters have replaced"
    ):
        config("sft", tmp_path / "run", reference_dir, fsdp_config={"tensor_parallel_size": 2})
