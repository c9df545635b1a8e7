"""Sums with a known preference: of two sums, the one that carries exactly when it should.

A prompt is `a + b =` with `a` below 90 and `b` below 10, an answer the sum written from the right, units before tens. The
wrong answer carries where it should not, and does not where it should. A base model has seen both equally often: it knows
the form and the digits, and takes the right one of two by chance. Preferences have to teach it the carry, and prompts that
are in no training row judge it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import Rewarding
from llm_trainer.models.scored import scored
from llm_trainer.trainers.answers import join, score

PLUS, EQUALS = 10, 11
SHAPE: dict[str, Any] = {"vocab_size": 12, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NUM_PROMPTS, HELD_OUT = 900, 180
PROMPT = 5  # tokens
Batch = dict[str, torch.Tensor]


def prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the prompts to train on `[720]`, and of the held-out ones `[180]`."""
    numbers = torch.randperm(NUM_PROMPTS, generator=torch.Generator().manual_seed(seed))
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def rows(numbers: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Prompts `numbers [B]` with an answer as ids `[B, 7]`, the right sum where `right [B]`, else the wrong one."""
    tens, units, other = numbers // 100, numbers // 10 % 10, numbers % 10
    carry = (units + other >= 10) == right
    plus, equals = torch.full_like(numbers, PLUS), torch.full_like(numbers, EQUALS)
    return torch.stack([tens, units, plus, other, equals, (units + other) % 10, tens + carry], dim=1)


def answer(prompt: Sequence[int]) -> list[int]:
    """The ids of the right sum behind the ids of a prompt: units before tens."""
    tens, units, _, other, _ = prompt
    total = 10 * tens + units + other
    return [total % 10, total // 10]


def _parts(**parts: torch.Tensor) -> Batch:
    ids = {f"{name}_input_ids": part for name, part in parts.items()}
    return ids | {f"{name}_attention_mask": torch.ones_like(part) for name, part in parts.items()}


def pairs(numbers: torch.Tensor) -> Batch:
    """The right and the wrong sum of each prompt, as `DPOTrainer` and `RewardTrainer` take them."""
    chosen, rejected = (rows(numbers, torch.full_like(numbers, side).bool()) for side in (1, 0))
    return _parts(prompt=chosen[:, :PROMPT], chosen=chosen[:, PROMPT:], rejected=rejected[:, PROMPT:])


def swapped_pairs(numbers: torch.Tensor) -> Batch:
    """Pairs with right and wrong exchanged, which turns the sign of a loss around."""
    names = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
    return {names[key.split("_")[0]] + key[key.index("_") :]: ids for key, ids in pairs(numbers).items()}


def judged(numbers: torch.Tensor) -> Batch:
    """One answer per prompt, every other one wrong, as `KTOTrainer` takes them."""
    desirable = torch.arange(len(numbers)) % 2 == 0
    both = rows(numbers, desirable)
    return _parts(prompt=both[:, :PROMPT], completion=both[:, PROMPT:]) | {"desirable": desirable}


def base_model(seed: int, save_dir: str, **shape: Any) -> Any:
    """A model that has learnt the form of the answers and to carry by chance; `shape`: what differs from `SHAPE`."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**SHAPE | shape, max_position_embeddings=16, initializer_range=0.1))
    train, _ = prompts(seed)
    batches = []
    for _ in range(300):
        ids = rows(train[torch.randint(len(train), (128,))], torch.rand(128) < 0.5)
        batches.append({"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < PROMPT, -100, ids)})
    one_pass(SFTTrainer, model, batches, seed=seed, lr=3e-3, save_dir=save_dir).train()
    return model


def one_pass(trainer_class: Any, model: Any, batches: list[Batch], lr: float, **options: Any) -> Any:
    """A trainer that goes over `batches` once, silently."""
    options = {"log_interval": len(batches)} | options
    return trainer_class(
        model=model,
        optimizer=configure_optimizer(model=model, lr=lr, weight_decay=0.0),
        train_loader=batches,
        device="cpu",
        max_epochs=1,
        use_amp=False,
        progress=False,
        **options,
    )


@torch.no_grad()
def log_probs(model: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Summed log-probs of the answers `[2, B]`, the right ones first."""
    joined = join(pairs(numbers), ("chosen", "rejected"))
    return score(scored(model.eval()), joined).logprobs.sum(1).view(2, -1)


@torch.no_grad()
def rewards(model: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Rewards of the answers `[2, B]` by a sequence-classification model, the right ones first."""
    joined = join(pairs(numbers), ("chosen", "rejected"))
    return Rewarding(model.eval())(joined["input_ids"], joined["attention_mask"]).view(2, -1)
