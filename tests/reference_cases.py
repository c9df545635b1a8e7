"""Reads the reference cases: numbers that nobody here wrote (tests/reference/README.md says where they come from)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from llm_trainer.optim.schedules import create_schedule

GROUPS = ("lm_ce", "pref", "reward", "kd", "moe", "grpo", "advantage", "kl", "ppo", "optim", "lr")


@dataclass(frozen=True)
class Case:
    """One reference case: `inputs` and `outputs` are tensors, `expected` scalars, `tolerance` per dtype name."""

    name: str
    loss: str
    hyper: dict[str, Any]
    expected: dict[str, Any]
    tolerance: dict[str, dict[str, float]]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    meta: dict[str, Any]

    def assert_close(self, actual: Any, expected: Any, dtype: torch.dtype = torch.float64, what: str = "") -> None:
        """`actual` equals `expected` within the tolerance that the case states for `dtype`."""
        limits = self.tolerance[str(dtype).removeprefix("torch.")]
        actual = (
            actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual, np.float64)
        )
        expected = expected.double().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected, np.float64)
        np.testing.assert_allclose(
            actual, expected, rtol=limits["rtol"], atol=limits["atol"], err_msg=f"{self.name} {what}"
        )


def load_case(path: Path) -> Case:
    """Read `<path>.json` and, where there is one, `<path>.safetensors`."""
    meta = json.loads(path.with_suffix(".json").read_text())
    tensors = load_file(path.with_suffix(".safetensors")) if path.with_suffix(".safetensors").exists() else {}
    return Case(
        name=meta["id"],
        loss=meta["loss"],
        hyper=meta["hyper"],
        expected=meta["expected"],
        tolerance=meta["tolerance"],
        inputs={k[3:]: v for k, v in tensors.items() if k.startswith("in.")},
        outputs={k[4:]: v for k, v in tensors.items() if k.startswith("out.")},
        meta=meta,
    )


def iter_cases(root: Path, group: str) -> Iterator[Case]:
    """All cases of one group of the folder `root`, by name."""
    for path in sorted((root / group).glob("*.json")):
        yield load_case(path)


def follow(
    trainer_class: Any, case: dict[str, Any], model: Any, batches: list, folder: Path, **options: Any
) -> list[dict]:
    """Train `model` as the run `case` of another library was trained; returns the metrics of every optimizer step."""
    from llm_trainer import configure_optimizer
    from llm_trainer.train.hooks import Hook

    hyper = case["hyper"]
    assert (hyper["lr_scheduler_type"], hyper["optim"]) == ("constant", "adamw_torch"), "not written for another"
    seen: list[dict[str, float]] = []
    trainer_class(
        model=model,
        optimizer=configure_optimizer(
            model=model,
            lr=hyper["learning_rate"],
            betas=(hyper["adam_beta1"], hyper["adam_beta2"]),
            eps=hyper["adam_epsilon"],
            weight_decay=hyper["weight_decay"],
        ),
        train_loader=batches,
        device="cpu",
        max_epochs=1,
        grad_accum_steps=hyper["gradient_accumulation_steps"],
        max_grad_norm=hyper["max_grad_norm"],
        use_amp=False,
        log_interval=1,
        save_dir=str(folder),
        save_interval=0,
        progress=False,
        hooks=[Hook("watch", lambda run: seen.append(dict(run.values)), every_steps=1)],
        **options,
    ).train()
    return seen


def learning_rates(name: str, steps: int, **hyper: Any) -> list[float]:
    """The rates of updates 0 to `steps - 1` of the schedule called `name`, without an optimizer."""
    schedule = create_schedule(name, **hyper)
    return [schedule(step) for step in range(steps)]
