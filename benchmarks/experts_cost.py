"""What mixtures of experts cost: ways to compute them, and ways to balance a step that is cut. Processor time, medians.

`python benchmarks/experts_cost.py [ROUNDS]` prints the tables of docs/results.md. Rounds alternate, so that others on the
machine disturb all ways alike.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from llm_trainer import Hook, Trainer, configure_optimizer
from llm_trainer.models.build import build_model
from llm_trainer.models.scored import scored
from llm_trainer.train_configs import ModelConfig, MoeConfig

LENGTH, ROWS, STEPS = 128, 16, 4
BALANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, none": ("qwen3_moe", {"aux_loss_coef": 0.0}),
    "qwen3_moe, step": ("qwen3_moe", {"aux_loss_scope": "step"}),
    "qwen3_moe, previous_step": ("qwen3_moe", {"aux_loss_scope": "previous_step"}),
    "qwen3_moe, micro_batch": ("qwen3_moe", {"aux_loss_scope": "micro_batch"}),
    "glm4_moe, biases stay": ("glm4_moe", {"bias_update_speed": 0.0}),
    "glm4_moe, biases move": ("glm4_moe", {"bias_update_speed": 0.001}),
}


def model_of(architecture: str, num_experts: int, experts: str = "auto") -> Any:
    """Of four layers of 256."""
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=num_experts, num_experts_per_tok=2, moe_intermediate_size=256)
    shape = ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        moe=moe,
    )
    return build_model(shape, experts=experts)


def medians(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of the seconds that each way says it took."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: statistics.median(found) for name, found in seconds.items()}


def forward_and_backward(model: Any, bf16: bool) -> Callable[[], float]:
    """Processor seconds of one, of 2,048 tokens."""
    policy, ids = scored(model), torch.randint(4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def once() -> float:
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = policy(ids).loss_sum
        loss.backward()
        model.zero_grad()
        return time.process_time() - began

    once()
    return once


def steps(architecture: str, options: dict[str, Any]) -> Callable[[], float]:
    """Processor seconds of one step of 2,048 tokens in four micro-batches, the median of a short run."""

    def once() -> float:
        model, ends = model_of(architecture, 8), [time.process_time()]
        ids = torch.randint(4096, ((STEPS + 1) * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            Trainer(
                model,
                optimizer=configure_optimizer(model=model, lr=1e-3),
                train_loader=[{"input_ids": rows} for rows in ids.split(ROWS // 4)],
                grad_accum_steps=4,
                max_epochs=1,
                save_interval=0,
                save_dir=folder,
                use_amp=False,
                compile=False,
                micro_batch_tokens=None,
                progress=False,
                hooks=[Hook("see", lambda run: ends.append(time.process_time()), every_steps=1)],
                **options,
            ).train()
        took = [later - earlier for earlier, later in pairwise(ends[1:])]  # without the first
        return statistics.median(took)

    return once


def main(rounds: int = 5) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    print("| experts | precision | grouped_mm | eager | eager / grouped |\n|---|---|---|---|---|")
    for num_experts in (8, 64):
        for bf16 in (False, True):
            ways = {}
            for how in ("grouped_mm", "eager"):
                ways[how] = forward_and_backward(model_of("qwen3_moe", num_experts, how), bf16)
            found = medians(ways, rounds)
            grouped, eager = found["grouped_mm"], found["eager"]
            name = "bf16" if bf16 else "fp32"
            print(f"| {num_experts} | {name} | {grouped:.3f} s | {eager:.3f} s | {eager / grouped:.2f} |", flush=True)
    print("\n| balance | CPU s per step | to none |\n|---|---|---|")
    found = medians({name: steps(*way) for name, way in BALANCES.items()}, rounds)
    for name, seconds in found.items():
        first = "qwen3_moe, none" if name.startswith("qwen") else "glm4_moe, biases stay"
        print(f"| {name} | {seconds:.3f} | {seconds / found[first]:.3f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
