"""`python preference_ranks.py FOLDER TOKENIZER` trains on pairs with one and with two processes; prints what they saw."""

import json
import sys
from pathlib import Path
from typing import Any

from ranks import fork_ranks, import_once

from llm_trainer import DPOTrainer, KTOTrainer
from llm_trainer.engine import dist
from llm_trainer.train_configs import DataLoaderConfig, DPOConfig, KTOConfig, ModelConfig, RunConfig, TrainConfig

SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [{"prompt": f"count to {n}", "chosen": "one two"[: 1 + n], "rejected": "no " * (1 + n % 3)} for n in range(9)]


def described(folder: Path, **section: Any) -> TrainConfig:
    """Steps of four rows, whatever the number of processes; the last one has one pair, or two answers."""
    return TrainConfig(
        model_config=ModelConfig(**SHAPE, max_position_embeddings=64),
        tokenizer=sys.argv[2],
        file_dataset=str(folder.parent / "pairs.jsonl"),
        n_epochs=1,
        batch_size=2,
        data_loader_config=DataLoaderConfig(packing="flat", cache_dir=str(folder / "cache")),
        run_config=RunConfig(save_dir=str(folder), precision="fp32", log_interval=1, progress=False),
        **section,
    )


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def precomputed(folder: Path) -> dict[str, Any]:
    """DPO whose reference is scored before training, each rank its share of the pairs."""
    section = DPOConfig(precompute_ref_log_probs=True, gradient_accumulation_steps=2 // dist.world_size())
    trainer = DPOTrainer(train_config=described(folder, dpo_config=section))
    (rows,) = trainer.run.source.dataset.parts
    trainer.train()
    return {"table": rows.ref_logps.tolist(), "files": len(list(folder.rglob("ref_logps-*.npy")))}


def unpaired(folder: Path) -> None:
    """KTO: the good and the bad answers of a step lie on both ranks, in unequal numbers."""
    section = KTOConfig(gradient_accumulation_steps=2 // dist.world_size())
    KTOTrainer(train_config=described(folder, kto_config=section)).train()


def main(folder: Path) -> None:
    """Play both with one and two ranks."""
    import_once()

    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    report: dict[str, Any] = {}
    for scenario in (precomputed, unpaired):
        for ranks in (1, 2):
            name = f"{scenario.__name__}-{ranks}"
            report[name] = fork_ranks(scenario, folder / name, ranks) | {"lines": lines_of(folder / name)}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
