"""What the balance of experts does: tiny mixtures of experts trained for 300 steps with it and without, by seed.

`python benchmarks/experts.py [STEPS]` prints the tables of docs/results.md. Rows are sequences of eight dialects, each with a
successor of its own for every token: something that experts can divide among themselves. The first mixture begins nearly
balanced. The second one has experts that are too narrow for all dialects, of which a token takes one, and embeddings with a
direction in common, as those of trained models have (Ethayarajh 2019, arXiv:1909.00512): so nearly all tokens begin with the
same expert.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_trainer import Hook, Trainer, configure_optimizer
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import ModelConfig, MoeConfig


class Mixture(NamedTuple):
    """One table.

    Attributes:
        experts: of each of the two layers.
        in_common: size of what all embeddings have in common; they are drawn with 0.02.
        ways: of those below, the ones that are compared.
    """

    experts: MoeConfig
    in_common: float
    ways: tuple[str, ...]


SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "off": {"aux_loss_coef": 0.0},
    "0.001, step": {"aux_loss_coef": 0.001},
    "0.01, step": {"aux_loss_coef": 0.01},
    "0.01, previous_step": {"aux_loss_coef": 0.01, "aux_loss_scope": "previous_step"},
    "0.01, micro_batch": {"aux_loss_coef": 0.01, "aux_loss_scope": "micro_batch"},
    "0.1, step": {"aux_loss_coef": 0.1},
}
WIDE = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
NARROW = MoeConfig(num_experts=8, num_experts_per_tok=1, moe_intermediate_size=8, norm_topk_prob=False)
MIXTURES = {
    "wide experts, nearly balanced": Mixture(WIDE, 0.0, tuple(WAYS)[:-1]),
    "narrow experts, all tokens to one": Mixture(
        NARROW, 0.1, ("off", "0.01, step", "0.01, previous_step", "0.1, step")
    ),
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


def run(seed: int, mixture: Mixture, options: dict[str, Any], steps: int) -> dict[str, float]:
    """Means of a run's last steps, of a step cut into four micro-batches."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(100 + seed)
    shape = ModelConfig(
        architecture="qwen3_moe",
        vocab_size=IDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe=mixture.experts,
    )
    model = build_model(shape)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(mixture.in_common * torch.randn(shape.hidden_size))
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
    """Print the tables."""
    for title, mixture in MIXTURES.items():
        print(f"\n{title}\n\n| balance | seed | loss | load_max | load_min | unused | entropy |")
        print("|---|---|---|---|---|---|---|")
        for name in mixture.ways:
            for seed in SEEDS:
                found = run(seed, mixture, WAYS[name], steps)
                cells = " | ".join(f"{found[metric]:.3f}" for metric in SHOWN)
                print(f"| {name} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
