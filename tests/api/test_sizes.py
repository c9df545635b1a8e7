"""Pretraining that goes on from a foreign checkpoint: with more tokens, longer rows and dropout of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llm_trainer import Trainer, configure_optimizer
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import load_config
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.models.vocabulary import extend_vocabulary

ROPE = {"rope_type": "yarn", "factor": 2.0}
TOKENS, SPECIAL = ["banana", " orchard"], ["<|tool|>"]
TEXT = "A banana in the orchard, and <|tool|> counts: " + " ".join(map(str, range(40)))
STEPS, LEARNING_RATE = 3, 1e-2


@pytest.fixture
def base(tmp_path: Path, reference_dir: Path) -> Path:
    """The folder of somebody's llama with a context of 64 tokens, and its tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=520, max_position_embeddings=64, tie_word_embeddings=False, **shape)
    )
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(reference_dir / "tokenizer").save_pretrained(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(4 * STEPS)))
    return tmp_path / "base"


def described(base: Path, save_dir: Path, **changes: Any) -> Any:
    """The run, from YAML."""
    values: dict[str, Any] = {
        "model_config": str(base),
        "model_overrides": {"rope_parameters": ROPE},
        "vocabulary_config": {"add_tokens": TOKENS, "add_special_tokens": SPECIAL, "pad_to_multiple_of": 64},
        "file_dataset": str(base.parent / "text.jsonl"),
        "batch_size": 4,
        "data_loader_config": {"data_loader_shuffle": False, "packing": "none", "parse_special_tokens": True},
        "optim_config": {"optim_type": "adamw", "initial_lr": LEARNING_RATE, "weight_decay": 0.0},
        "run_config": {"save_dir": str(save_dir), "device": "cpu", "precision": "fp32", "log_interval": 1}
        | {"max_steps": STEPS, "progress": False, "attention": "sdpa", "save_interval_steps": 2},
        "pretrain_config": {},
    }
    path = base.parent / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    return load_config(path, overrides)


def curve(save_dir: Path) -> list[tuple[float, float]]:
    lines = (save_dir / "log" / "metrics.jsonl").read_text().splitlines()
    return [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "loss" in row]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def by_hand(base: Path) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The same model and rows by transformers and torch alone."""
    # 1. what the tokens are before and after
    tokenizer = AutoTokenizer.from_pretrained(base)
    new = [*TOKENS, *SPECIAL]
    pieces = [tokenizer(token, add_special_tokens=False).input_ids for token in new]
    tokenizer.add_tokens(TOKENS)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    # 2. a model with rows for them
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **ROPE}
    model = AutoModelForCausalLM.from_pretrained(base, rope_parameters=rope, max_position_embeddings=128)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    model.resize_token_embeddings(576, mean_resizing=False)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    with torch.no_grad():
        for table, old in zip(tables, before, strict=True):
            table[len(old) :] = old[:512].mean(0)
            for token, cut in zip(new, pieces, strict=True):
                table[tokenizer.convert_tokens_to_ids(token)] = old[cut].mean(0)
    # 3. rows of four texts each
    batches = []
    texts = [json.loads(line)["text"] for line in (base.parent / "text.jsonl").read_text().splitlines()]
    for first in range(0, len(texts), 4):
        rows = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts[first : first + 4]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        assert 64 < ids.shape[1] <= 128
        batches.append((ids, labels))
    return model, batches


def test_a_run_from_a_foreign_folder_equals_a_loop_by_hand(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(train_config=described(base, tmp_path / "run"))
    trainer.train()
    found = curve(tmp_path / "run")

    # 1. the same losses
    model, batches = by_hand(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    expected = []
    for ids, labels in batches:
        logits = model(ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), abs=1e-6, rel=1e-5)

    # 2. the published folder is read by anyone
    folder = tmp_path / "run" / "model"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (plain.config.vocab_size, plain.config.max_position_embeddings) == (576, 128)
    assert plain.config.rope_parameters["factor"] == 2.0
    assert tokenizer.model_max_length >= 128
    ids = tokenizer(TEXT * 2, return_tensors="pt").input_ids[:, :120]
    for token in (*TOKENS, *SPECIAL):
        assert tokenizer.convert_tokens_to_ids(token) in ids[0]
    assert SPECIAL[0] not in tokenizer.decode(ids[0], skip_special_tokens=True)
    with torch.no_grad():
        trained = trainer.base_model.eval()(ids).logits  # type: ignore[operator]
        assert torch.allclose(plain(ids).logits, trained, atol=1e-6)


def test_both_styles_are_bit_identical(base: Path, tmp_path: Path) -> None:
    Trainer(train_config=described(base, tmp_path / "described")).train()

    tokenizer = load_tokenizer(base)
    model = build_model(base, attention="sdpa", overrides={"rope_parameters": ROPE})
    extend_vocabulary(model, tokenizer, TOKENS, SPECIAL, pad_to_multiple_of=64)
    _, batches = by_hand(base)
    loader = []
    for ids, labels in batches:
        loader.append({"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()})
    Trainer(
        model=model,
        optimizer=configure_optimizer(model, "adamw", lr=LEARNING_RATE, weight_decay=0.0),
        train_loader=loader,
        tokenizer=tokenizer,
        max_epochs=1,
        device="cpu",
        precision="fp32",
        packing="none",
        log_interval=1,
        save_dir=str(tmp_path / "explicit"),
    ).train()
    assert curve(tmp_path / "explicit") == curve(tmp_path / "described")


def test_a_run_goes_on_bit_for_bit_and_only_with_the_same_meaning_of_its_weights(base: Path, tmp_path: Path) -> None:
    Trainer(train_config=described(base, tmp_path / "whole")).train()
    begun = {"run_config.max_steps": 2}
    Trainer(train_config=described(base, tmp_path / "cut", **begun)).train()

    # 1. the same number of tokens, and the same shapes, but something else
    with pytest.raises(CheckpointError, match=r"was made with the positions .*'factor': 2.0.* has .*'factor': 4.0"):
        Trainer(
            train_config=described(
                base,
                tmp_path / "cut",
                model_overrides={"rope_parameters": ROPE | {"factor": 4.0}},
                dataset_block_size=128,
            )
        ).train()
    other = {"vocabulary_config.add_tokens": ["banana", " counts"]}
    with pytest.raises(CheckpointError, match="other added tokens; different are ' counts' .*, ' orchard' "):
        Trainer(train_config=described(base, tmp_path / "cut", **other)).train()

    # 2. as it was
    Trainer(train_config=described(base, tmp_path / "cut")).train()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_a_template_replaces_the_tokenizers(base: Path, tmp_path: Path) -> None:
    from llm_trainer.builder.objects import Builder

    path = tmp_path / "talk.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    for given in (str(path), path.read_text()):
        config = described(base, tmp_path / "run", **{"vocabulary_config.chat_template": given})
        assert Builder(config, Trainer).tokenizer.chat_template == path.read_text()
    missing = Builder(described(base, tmp_path / "run", **{"vocabulary_config.chat_template": "none.jinja"}), Trainer)
    with pytest.raises(ValueError, match="chat_template: 'none.jinja' cannot be read"):
        print(missing.tokenizer)


def test_a_model_that_is_given_is_taken_as_it_is(base: Path, tmp_path: Path) -> None:
    for changes, name in (({"model_overrides": {}}, "vocabulary_config"), ({}, "model_overrides")):
        with pytest.raises(ValueError, match=f"{name}: the model is given as an object"):
            Trainer(train_config=described(base, tmp_path / "run", **changes), model=build_model(base))


def test_adapters_are_saved_without_what_would_change_their_base(base: Path, tmp_path: Path) -> None:
    adapters: dict[str, Any] = {"adapter_config": {}}
    with pytest.raises(ConfigError, match="model_overrides.rope_parameters: beside adapter_config, .* old positions"):
        described(base, tmp_path / "run", vocabulary_config={}, **adapters)
    dropout = {"model_overrides": {"attention_dropout": 0.1}, "vocabulary_config": {}}
    assert described(base, tmp_path / "run", **dropout, **adapters).adapter_config is not None


def test_the_plan_knows_rows_and_context(base: Path, tmp_path: Path) -> None:
    from llm_trainer.plan.describe import describe

    shape, job = describe(described(base, tmp_path / "run"), "pretrain")
    assert shape.vocab_size == 576
    assert job.row_tokens == 128
