"""Several files in one run: metrics of each beside the total, and how often each is visited."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_trainer import DPOTrainer, SFTTrainer
from llm_trainer.config.errors import ConfigError
from llm_trainer.data.stream import SampleStream
from llm_trainer.train_configs import (
    DataLoaderConfig,
    DPOConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)


def write(folder: Path, name: str, answers: list[str]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"count to {n}", "chosen": answer, "rejected": "no " * (1 + n % 3)}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(reference_dir: Path, folder: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model_config": SHAPE,
        "tokenizer": str(reference_dir / "tokenizer"),
        "n_epochs": 1,
        "batch_size": 2,
        "optim_config": OptimConfig(initial_lr=1e-2),
        "run_config": RunConfig(save_dir=str(folder / "run"), precision="fp32", log_interval=1, progress=False),
    }
    return TrainConfig(**(values | changes))


def test_every_evaluation_file_has_metrics_beside_the_total(reference_dir: Path, tmp_path: Path) -> None:
    easy = write(tmp_path / "a", "held_out.jsonl", ["one two"] * 4)
    odd = write(tmp_path / "b", "held_out.jsonl", ["xyzzy plugh"] * 2)
    described = config(reference_dir, tmp_path, dpo_config=DPOConfig(), file_dataset=easy, eval_dataset=[easy, odd])
    trainer = DPOTrainer(train_config=described)
    values = trainer.train()
    assert values["eval_loss"] == trainer.run.progress.best_loss  # the total is what the best model is chosen by
    for metric in ("loss", "rewards/accuracies", "rewards/margins"):
        parts = values[f"eval_held_out_{metric}"], values[f"eval_held_out_2_{metric}"]
        assert values[f"eval_{metric}"] == pytest.approx((4 * parts[0] + 2 * parts[1]) / 6)
    assert values["eval_held_out_loss"] < values["eval_held_out_2_loss"]
    alone = config(reference_dir, tmp_path / "alone", dpo_config=DPOConfig(), file_dataset=easy, eval_dataset=odd)
    again = DPOTrainer(train_config=alone, model=trainer.base_model, ref_model=trainer.reference.base)  # type: ignore[union-attr]
    found = again.evaluate()
    assert found["eval_loss"] == pytest.approx(values["eval_held_out_2_loss"])
    assert not any("held_out" in name for name in found)


def test_loaders_with_names_in_the_explicit_style(reference_dir: Path, tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.jsonl", ["one two"] * 3) for name in ("left", "right")]
    sft = {"sft_config": SFTConfig(), "data_loader_config": DataLoaderConfig(schema="prompt_completion")}
    for path in files:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        lines = [json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows]
        Path(path).write_text("\n".join(lines))
    described = config(reference_dir, tmp_path, file_dataset=files[0], eval_dataset=files, **sft)
    trainer = SFTTrainer(train_config=described)
    batches = {
        name: [micro_batch.batch for step, _ in source.steps(0, 0) for micro_batch in step]
        for name, source in trainer.run.val_sources.items()
    }
    explicit = SFTTrainer(
        model=trainer.base_model,
        optimizer=trainer.optimizer,
        train_loader=batches["left"],
        val_loader=batches,
        use_amp=False,
        device="cpu",
        save_dir=str(tmp_path / "explicit"),
    )
    found = explicit.evaluate()
    assert found == trainer.evaluate()
    assert {"eval_loss", "eval_left_loss", "eval_right_mean_token_accuracy"} <= set(found)


def test_names_of_columns_per_file_are_of_files_of_the_run(reference_dir: Path, tmp_path: Path) -> None:
    """An entry for an evaluation file is known as well; one for no file is refused before anything is read."""
    train, held_out = (write(tmp_path, f"{name}.jsonl", ["one two"] * 2) for name in ("train", "held_out"))
    names = {"prompt": "prompt", "completion": "chosen"}
    for other, refused in ((held_out, False), (f"{held_out}.gz", True)):
        columns = DataLoaderConfig(columns={train: names, other: names}, cache_dir=str(tmp_path / "stores"))
        described = config(
            reference_dir,
            tmp_path,
            sft_config=SFTConfig(),
            data_loader_config=columns,
            file_dataset=train,
            eval_dataset=held_out,
        )
        if not refused:
            assert SFTTrainer(train_config=described).evaluate()["eval_loss"] > 0
            continue
        with pytest.raises(ValueError, match=r"columns: got '.*held_out\.jsonl\.gz', which is no file of this run"):
            SFTTrainer(train_config=described).evaluate()


def test_weights_of_files_change_how_often_they_are_visited(reference_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder, "two.jsonl", ["one"] * 2), write(folder, "three.jsonl", ["two"] * 3)
    four = write(tmp_path, "four.jsonl", ["three"] * 4)

    def made(weights: list[float]) -> DPOTrainer:
        loader = DataLoaderConfig(file_weights=weights)
        options = {"dpo_config": DPOConfig(), "file_dataset": [str(folder), four], "data_loader_config": loader}
        return DPOTrainer(train_config=config(reference_dir, tmp_path, **options))

    trainer = made([2.0, 0.5])
    assert trainer.run.source.size() == 2 * (2 + 3) + 2
    assert trainer.run.horizon.total() == 6
    trainer.train()
    assert trainer.run.progress.step == 6
    for wrong in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"file_weights: got .*, expected 2 numbers above 0, one for each path"):
            made(wrong)


def test_shares_of_rows_or_tokens_become_visits(reference_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder, "two.jsonl", ["one"] * 2), write(folder, "three.jsonl", ["two"] * 3)
    long = write(tmp_path, "long.jsonl", ["one two three four five six"] * 15)

    def made(**loader: Any) -> Any:
        options = {"dpo_config": DPOConfig(), "file_dataset": [str(folder), long]}
        described = config(reference_dir, tmp_path, data_loader_config=DataLoaderConfig(**loader), **options)
        return DPOTrainer(train_config=described).run.source

    by_rows = made(mixture="rows", file_shares=[3, 1])
    assert by_rows.visits == [9, 6, 5] and by_rows.interleave  # 20 rows, of which three quarters are the folder's
    by_tokens = made(mixture="tokens", file_shares=[0.5, 0.5])
    lengths = by_tokens.dataset.num_tokens
    read = lengths[by_tokens.order(0, 0, len(by_tokens))].sum()
    left = lengths[[i for i in by_tokens.order(0, 0, len(by_tokens)) if i < 5]].sum()
    assert left / read == pytest.approx(0.5, abs=0.03) and read == pytest.approx(lengths.sum(), rel=0.05)
    shortest = made(curriculum="length")
    assert (np.diff(lengths[shortest.order(0, 0, 20)]) >= 0).all()
    for wrong, says in (
        ({"file_shares": [1, 1]}, "file_shares: files are visited one after another; set mixture to rows or tokens"),
        ({"mixture": "rows", "file_weights": [1, 1]}, "file_weights: a mixture has file_shares"),
        ({"mixture": "rows", "data_loader_shuffle": False}, "set data_loader_shuffle to true"),
    ):
        with pytest.raises(ConfigError, match=says):
            DataLoaderConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"file_shares: got \[1.0\], expected 2 numbers above 0"):
        made(mixture="rows", file_shares=[1])


def test_a_curriculum_by_a_column_goes_on_where_it_stopped(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write(tmp_path, "rows.jsonl", [f"one {n}" for n in range(10)]))
    held_out = write(tmp_path, "held_out.jsonl", ["one two"])  # it is not sorted, and needs no such column
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    levels = np.random.default_rng(0).integers(0, 5, len(rows)).tolist()
    lines = [json.dumps({**row, "level": level}) for row, level in zip(rows, levels, strict=True)]
    path.write_text("\n".join(lines))

    def made(curriculum: str | None, **run: Any) -> DPOTrainer:
        described = config(
            reference_dir, tmp_path, dpo_config=DPOConfig(), file_dataset=str(path), eval_dataset=held_out, n_epochs=2,
            data_loader_config=DataLoaderConfig(curriculum=curriculum),
        )  # fmt: skip
        return DPOTrainer(train_config=replace(described, run_config=replace(described.run_config, **run)))

    whole: Any = made("level").run.source
    order = whole.order(0, 0, 10)
    assert [levels[i] for i in order] == sorted(levels)
    assert [levels[i] for i in whole.order(1, 0, 10)] != sorted(levels), "one epoch by default"
    made("level", max_steps=3).train()
    for other in ("length", None):
        with pytest.raises(ValueError, match="samples in another order"):
            made(other).train()
    again = made("level")
    source: Any = again.run.source
    asked = []
    monkeypatch.setattr(source, "order", lambda *where: asked.append(where) or SampleStream.order(source, *where))
    again.train()
    assert asked[0] == (0, 6, 8) and source.order(0, 6, 8).tolist() == order[6:8].tolist()
