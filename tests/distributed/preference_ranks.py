"""`python preference_ranks.py FOLDER TOKENIZER` trains on pairs with one and with two processes; prints what they saw."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ranks import fork_ranks, import_once

from llm_trainer import DPOTrainer, KTOTrainer
from llm_trainer.engine import dist
from llm_trainer.models.build import build_model
from llm_trainer.models.frozen import StartingPoint, frozen_copy
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


# Engines on which little of a model is trained. ZeRO-3 keeps small parameters gathered, unless it is told not to.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"engine": "fsdp"},
    "zero-2": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero-3": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
    "zero-3, nothing gathered": {
        "engine": "deepspeed",
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    },
}
if find_spec("deepspeed") is None:
    ENGINES = {name: options for name, options in ENGINES.items() if "zero" not in name}


def little_trained(seed: int = 0) -> Any:
    """A model of which three modules are trained, whose weights are those of the seed."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**(SHAPE | {"vocab_size": 64, "num_hidden_layers": 2})))
    model.requires_grad_(False)
    torch.manual_seed(seed)
    # The last is of what FSDP2 leaves gathered after a forward.
    for module in (model.model.layers[0].mlp.down_proj, model.model.layers[1].self_attn.q_norm, model.model.norm):
        module.requires_grad_(True)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def own_rows() -> list[dict[str, Any]]:
    """This rank's micro-batches of four steps: in every other one they are of one row, which has no mismatched ones."""
    noise = torch.Generator().manual_seed(1)
    batches = []
    for number in range(8):
        rows = 1 + 2 * ((number // 2 + dist.rank()) % 2)
        batch: dict[str, Any] = {"desirable": torch.arange(rows) % 2 == 0}
        for part in ("prompt", "completion"):
            ids = torch.randint(1, 64, (4, 3 + dist.rank()), generator=noise)[:rows]
            batch |= {f"{part}_input_ids": ids, f"{part}_attention_mask": torch.ones_like(ids)}
        batches.append(batch)
    return batches


def kto_of_little(folder: Path, seed: int = 0, **options: Any) -> None:
    model = little_trained(seed)
    given = {
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2),
        "train_loader": own_rows(),
        "loader_is_sharded": True,
        "grad_accum_steps": 2,
        "max_epochs": 1,
        "precision": "fp32",
        "log_interval": 1,
        "device": "cpu",
        "save_interval": 0,
        "best_file": False,
        "progress": False,
    }
    trainer = KTOTrainer(model=model, save_dir=str(folder), **(given | options))
    assert isinstance(trainer.reference, StartingPoint) == ("ref_model" not in options)
    trainer.train()


def where_it_began(folder: Path) -> dict[str, Any]:
    """KTO of which little is trained: with a frozen copy, on every engine, and from each engine to the next."""
    kto_of_little(folder / "copy", ref_model=frozen_copy(little_trained()))
    for name, engine in ENGINES.items():
        kto_of_little(folder / name, **engine)
    for number, engine in enumerate(list(ENGINES.values())[-4:]):  # of a model that is another one each time
        kto_of_little(folder / "relay", seed=number, max_steps=number + 1, resume="auto", **engine)
    return {name: lines_of(folder / name) for name in ("copy", *ENGINES, "relay")} if dist.is_main() else {}


def main(folder: Path) -> None:
    """Play both with one and two ranks."""
    import_once()

    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    report: dict[str, Any] = {}
    for scenario in (precomputed, unpaired):
        for ranks in (1, 2):
            name = f"{scenario.__name__}-{ranks}"
            report[name] = fork_ranks(scenario, folder / name, ranks) | {"lines": lines_of(folder / name)}
    report["where it began"] = fork_ranks(where_it_began, folder / "little", 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
