"""PTX: further rows in the updates of a policy. What their loss is a mean of, which rows come when, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from llm_trainer import GRPOTrainer, PPOTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.train_configs import ConfigError, GRPOConfig, PPOConfig, RunConfig, TrainConfig

COEF = 0.7
SHAPE = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny() -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(**SHAPE, max_position_embeddings=32))


def prompts(count: int = 3) -> list[dict[str, Any]]:
    noise = torch.Generator().manual_seed(1)
    return [{"prompts": torch.randint(3, 24, (2, 4), generator=noise)} for _ in range(count)]


def further(count: int = 5) -> list[dict[str, torch.Tensor]]:
    """Rows of 5 to 9 tokens; a label of row n is 3 + n, so that one sees which rows have come."""
    rows = []
    for number in range(count):
        ids = torch.full((1, 5 + number), 3 + number)
        rows.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return rows


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch, padded on the right."""
    width, batch = max(row["input_ids"].shape[1] for row in rows), {}
    for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        batch[name] = torch.cat([F.pad(row[name], (0, width - row[name].shape[1]), value=fill) for row in rows])
    return batch


def reward(prompts: list[list[int]], completions: list[list[int]], answers: list[str]) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completions]


def make(folder: Path, kind: Any = GRPOTrainer, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    seen: list[dict[str, float]] = []
    model = options.pop("model", None) or tiny()
    given: dict[str, Any] = {"gen_max_seq_len": 6, "stop_token_ids": [2], "max_epochs": 1, "reward_func": reward}
    given["resume"] = "auto"
    if kind is GRPOTrainer:
        given["num_samples_per_prompt"] = 3
    watch = Hook("watch", lambda run: seen.append(dict(run.values)), every_steps=1)
    trainer = kind(
        model=model,
        optimizer=configure_optimizer(model=model, lr=3e-3),
        train_loader=options.pop("train_loader", None) or prompts(),
        device="cpu",
        use_amp=False,
        log_interval=1,
        save_dir=str(folder),
        save_interval=0,
        hooks=[watch, *options.pop("hooks", [])],
        **(given | options),
    )
    return trainer, seen


def train(folder: Path, kind: Any = GRPOTrainer, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    trainer, seen = make(folder, kind, **options)
    trainer.train()
    return trainer, seen


def numbers_seen(trainer: Any) -> list[list[int]]:
    """Notes which of the `further` rows each step has, from now on."""
    found: list[list[int]] = []
    count = type(trainer._ptx)._loss_weight

    def note(batch: dict[str, torch.Tensor]) -> float:
        found.append(sorted({int(label) - 3 for label in batch["labels"].flatten() if label >= 0}))
        return count(trainer._ptx, batch)

    trainer._ptx._loss_weight = note
    return found


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer])
def test_each_mean_has_its_own_denominator(kind: Any, tmp_path: Path) -> None:
    """By hand: the policy's loss as it is alone, and the mean over the labels of the further rows."""
    batch, model = stack(further()), tiny()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))
    _, alone = train(tmp_path / "alone", kind, model=model)
    _, mixed = train(tmp_path / "mixed", kind, ptx_loader=[batch], ptx_coef=COEF)
    assert math.isclose(mixed[0]["ptx_loss"], expected, rel_tol=1e-5)
    assert math.isclose(mixed[0]["loss"], alone[0]["loss"] + COEF * expected, abs_tol=1e-5)
    assert mixed[0]["grad_norm"] != alone[0]["grad_norm"] and mixed[-1]["ptx_loss"] < expected


def test_a_critic_that_learns_alone_keeps_the_policy_as_it_is(tmp_path: Path) -> None:
    model = tiny()
    options: dict[str, Any] = {"critic_warmup_steps": 99, "ppo_epochs": 1, "model": model}
    _, seen = train(tmp_path, PPOTrainer, ptx_loader=[stack(further())], ptx_coef=COEF, **options)
    assert "ptx_loss" in seen[0]
    for name, weight in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_steps_cut_by_a_budget_are_the_same(tmp_path: Path) -> None:
    loader = [stack(further()[:3]), stack(further()[3:])]
    _, whole = train(tmp_path / "whole", ptx_loader=loader, ptx_coef=COEF)
    _, cut = train(tmp_path / "cut", ptx_loader=loader, ptx_coef=COEF, micro_batch_tokens=12)
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "ptx_loss", "reward"):
            assert math.isclose(a[name], b[name], abs_tol=1e-5), name
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4)


def test_rows_come_in_turn_and_begin_anew_whatever_stops_the_run(tmp_path: Path) -> None:
    """Six steps over five shuffled rows, two at a time; interrupted after every step the same rows, and the same numbers."""

    def loader() -> DataLoader:
        return DataLoader(further(), batch_size=2, shuffle=True, collate_fn=stack)  # type: ignore[arg-type]  # a list

    trainer, whole = make(tmp_path / "whole", grpo_steps=2, ptx_loader=loader(), ptx_coef=COEF)
    rows = numbers_seen(trainer)
    trainer.train()
    assert len(rows) == 6 and sorted(sum(rows[:3], [])) == sorted(sum(rows[3:], [])) == list(range(5))
    assert rows[:3] != rows[3:]  # another epoch, another order

    def ask(run: Any) -> None:
        run.signals.received = 15

    again: list[list[int]] = []
    seen: list[dict[str, float]] = []
    for _ in range(7):
        hooks = [Hook("ask", ask, every_steps=1)]
        trainer, here = make(tmp_path / "cut", grpo_steps=2, ptx_loader=loader(), ptx_coef=COEF, hooks=hooks)
        noted = numbers_seen(trainer)
        try:
            trainer.train()
            ended = True
        except TrainingInterrupted:
            ended = False
        again += noted
        seen += here
        if ended:
            break
    assert again == rows
    at_ends = {name: whole[-1][name] for name in ("loss", "grad_norm", "ptx_loss")}
    assert {name: seen[-1][name] for name in at_ends} == at_ends


def test_a_run_that_had_none_gets_them_from_their_first_row_on(tmp_path: Path) -> None:
    train(tmp_path, train_loader=prompts(2), max_steps=1)
    trainer, _ = make(tmp_path, train_loader=prompts(2), ptx_loader=further(), ptx_coef=COEF)
    rows = numbers_seen(trainer)
    trainer.train()
    assert rows == [[0]]


def test_other_rows_are_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    train(tmp_path, max_steps=1, ptx_loader=further(5), ptx_coef=COEF)
    with pytest.raises(ValueError, match=r"had 5 further rows \(ptx\), and now there are 4"):
        train(tmp_path, ptx_loader=further(4), ptx_coef=COEF)


def test_a_weight_without_rows_and_rows_without_a_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ptx_coef: got 0\.5, but there are no further rows .* expected ptx_loader"):
        make(tmp_path, ptx_coef=0.5)
    with pytest.raises(ValueError, match="ptx_loader: nothing is learned from it, since ptx_coef is 0"):
        make(tmp_path, PPOTrainer, ptx_loader=further())
    for section in (GRPOConfig, PPOConfig):
        with pytest.raises(ConfigError, match="ptx_dataset: nothing is learned from it, since ptx_coef is 0"):
            section(ptx_dataset="rows.jsonl")


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer])
def test_files_of_a_configuration(kind: Any, tmp_path: Path, reference_dir: Path) -> None:
    """Texts, as many rows an update as it has completions; their ledger is on the screen."""
    files = {"prompts": [{"prompt": f"count to {n}", "answer": str(n)} for n in range(4)]}
    files["texts"] = [{"text": "one two three four five " * (1 + n)} for n in range(6)]
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own: dict[str, Any] = {"gen_max_seq_len": 8, "ptx_coef": 0.5, "ptx_dataset": str(tmp_path / "texts.jsonl")}
    section = GRPOConfig(group_size=2, **own) if kind is GRPOTrainer else PPOConfig(ppo_epochs=1, ptx_ratio=2.0, **own)

    def config(**changes: Any) -> TrainConfig:
        return TrainConfig(
            model_config=ModelConfig(**(SHAPE | {"vocab_size": 512}), max_position_embeddings=64),
            tokenizer=str(reference_dir / "tokenizer"),
            file_dataset=str(tmp_path / "prompts.jsonl"),
            batch_size=2,
            dataset_block_size=24,
            run_config=RunConfig(save_dir=str(tmp_path / "run"), log_interval=1, progress=False, engine="torch"),
            **changes,
        )

    def judge(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        return [len(text) / 10 for text in completions]

    trainer = kind(train_config=config(**{kind.section: section}), reward_func=judge)
    source = trainer.run.source
    assert source.added.rows_per_step == 4 and source.added.dataset.lengths.max() == 24 + 8
    assert [ledger.name for ledger in trainer.run.settings.ledgers] == [
        str(tmp_path / f"{name}.jsonl") for name in files
    ]
    assert trainer.train()["ptx_loss"] > 0
    with pytest.raises(ConfigError, match=r"ptx_coef: got 0\.5, but there are no further rows .* expected ptx_dataset"):
        section.ptx_dataset = None
        kind(train_config=config(**{kind.section: section}), reward_func=judge)
