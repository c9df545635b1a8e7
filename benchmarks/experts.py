"""What the balance of experts does: a tiny mixture of experts trained for 300 steps with it and without, by seed.

`python benchmarks/experts.py [STEPS]` prints the table of docs/results.md. Rows are sequences of eight dialects, each with a
successor of its own for every token: something that experts can divide among themselves.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from llm_trainer import Hook, Trainer, configure_optimizer
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import ModelConfig, MoeConfig

SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "off": {"aux_loss_coef": 0.0},
    "0.001, step": {"aux_loss_coef": 0.001},
    "0.01, step": {"aux_loss_coef": 0.01},
    "0.01, previous_step": {"aux_loss_coef": 0.01, "aux_loss_scope": "previous_step"},
    "0.01, micro_batch": {"aux_loss_coef": 0.01, "aux_loss_scope": "micro_batch"},
}
SHOWN = ("loss", "experts/load_max", "experts/load_min", "experts/unused", "experts/entropy")
IDS, DIALECTS, LENGTH, ROWS, LAST = 64, 8, 32, 16, 50


def rows(count: int, noise: torch.Generator) -> Tensor:
    """`[count, LENGTH]` sequences; most of a dialect's tokens follow from the one before."""
    successors = torch.stack([torch.randperm(IDS, generator=torch.Generator().manual_seed(d)) for d in range(DIALECTS)])
    dialect = torch.randint(DIALECTS, (count,), generator=noise)
    ids = [torch.randint(IDS, (count,), generator=noise)]
    for _ in range(LENGTH - 1):
        drawn = torch.randint(IDS, (count,), generator=noise)
        follows = torch.rand(count, generator=noise) < 0.9
        ids.append(torch.where(follows, successors[dialect, ids[-1]], drawn))
    return torch.stack(ids, dim=1)


def run(seed: int, options: dict[str, Any], steps: int) -> dict[str, float]:
    """Means of a run's last steps, of a step cut into four micro-batches."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(100 + seed)
    experts = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    shape = ModelConfig(
        architecture="qwen3_moe",
        vocab_size=IDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe=experts,
    )
    model = build_model(shape)
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        Trainer(
            model,
            optimizer=configure_optimizer(model=model, lr=3e-3),
            train_loader=[{"input_ids": rows(ROWS // 4, noise)} for _ in range(4 * steps)],
            grad_accum_steps=4,
            max_epochs=1,
            log_interval=1,
            save_interval=0,
            save_dir=folder,
            use_amp=False,
            compile=False,
            micro_batch_tokens=None,
            progress=False,
            hooks=[Hook("see", lambda run: seen.append(dict(run.values)), every_steps=1)],
            **options,
        ).train()
    found = {name: statistics.mean(values[name] for values in seen[-LAST:]) for name in SHOWN}
    coef = options["aux_loss_coef"]
    found["loss"] -= coef * statistics.mean(values["aux_loss"] for values in seen[-LAST:])  # the cross-entropy alone
    return found


def main(steps: int = 300) -> None:
    """Print the table."""
    print("| balance | seed | loss | load_max | load_min | unused | entropy |")
    print("|---|---|---|---|---|---|---|")
    for name, options in WAYS.items():
        for seed in SEEDS:
            found = run(seed, options, steps)
            cells = " | ".join(f"{found[metric]:.3f}" for metric in SHOWN)
            print(f"| {name} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
