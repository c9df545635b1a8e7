"""PPO from a configuration: the same curve as with the same objects, a critic of a folder, what is refused at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from described import SHAPE, curve, describe, prompt_batches, write_rows
from llm_trainer import PPOTrainer, configure_optimizer, create_trainer
from llm_trainer.builder.model import make_model
from llm_trainer.checkpoint import write_model
from llm_trainer.config.load import load_config
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.models.critic import critic_of
from llm_trainer.models.rewarding import reward_model
from llm_trainer.optim.optimizers import get_parameter_groups
from llm_trainer.train_configs import ConfigError, OptimConfig, PPOConfig, TrainConfig

ROWS = [{"question": f"count to {n}", "answer": "x" * n} for n in range(1, 9)]


def shorter(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """Minus the distance from the answer's length."""
    return [-abs(len(c) - len(a)) / 10 for c, a in zip(completions, answers, strict=True)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", ROWS)


def config(path: Path, reference_dir: Path, save_dir: Path, **section: Any) -> TrainConfig:
    given: dict[str, Any] = {"gen_max_seq_len": 12, "kl_beta": 0.05, "ppo_epochs": 2, "ppo_batch_size": 2}
    optim = OptimConfig(initial_lr=1e-2, enable_lr_scheduler=True)
    ppo = PPOConfig(**(given | section))
    return describe(path, reference_dir, save_dir, batch_size=4, optim_config=optim, ppo_config=ppo)


def test_the_two_styles_give_the_same_curve(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    """With a schedule, which counts updates, and a critic with a rate of its own on it."""
    from llm_trainer.optim.schedules import create_scheduler

    described = config(prompts, reference_dir, tmp_path / "described", value_optim_config=OptimConfig(initial_lr=3e-2))
    create_trainer("ppo", train_config=described, reward_func=shorter).train()

    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    model = make_model(described, tokenizer, torch.device("cpu"))
    critic = critic_of(model)
    optimizer = configure_optimizer(model=model, lr=1e-2)
    for group in get_parameter_groups(critic):
        optimizer.add_param_group({**group, "lr": 3e-2})
    trainer = PPOTrainer(
        model=model,
        value_model=critic,
        optimizer=optimizer,
        scheduler=create_scheduler(optimizer, "cosine", total_steps=8),
        train_loader=prompt_batches(tokenizer, ROWS, 4),
        max_epochs=1,
        kl_beta=0.05,
        ppo_epochs=2,
        ppo_batch_size=2,
        gen_max_seq_len=12,
        reward_func=shorter,
        tokenizer=tokenizer,
        stop_token_ids=ChatFormat(tokenizer).stop_token_ids(),
        device="cpu",
        log_interval=1,
        progress=False,
        save_dir=str(tmp_path / "explicit"),
        save_interval=0,
    )
    trainer.train()
    found = curve(tmp_path / "described")
    assert len(found) == 8 and found == curve(tmp_path / "explicit")
    assert trainer.optimizer.param_groups[-1]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_reward_model_of_a_folder_judges_and_is_the_critic(
    prompts: Path, reference_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    model = reward_model(build_model(SHAPE), tokenizer.pad_token_id)
    write_model(model, tmp_path / "judge", tokenizer)
    folder = str(tmp_path / "judge")
    described = config(
        prompts, reference_dir, tmp_path / "run", value_model_checkpoint=folder, reward_model_checkpoint=folder
    )
    trainer = PPOTrainer(train_config=described)
    assert torch.equal(trainer.critic.score.weight, model.score.weight)
    last = trainer.train()
    assert "rewards/model_reward" in last and not torch.equal(trainer.critic.score.weight, model.score.weight)
    # Another run goes on from what this one's critic has learned.
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    described = config(prompts, reference_dir, tmp_path / "next", value_model_checkpoint=str(newest / "critic"))
    described.run_config.max_steps = 1
    again = PPOTrainer(train_config=described, reward_func=shorter)
    assert torch.equal(again.critic.score.weight, trainer.critic.score.weight)


def test_a_critic_of_another_tokenizer(prompts: Path, reference_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    tokenizer.add_tokens(["<other>"])
    write_model(reward_model(build_model(SHAPE)), tmp_path / "judge", tokenizer)
    described = config(prompts, reference_dir, tmp_path / "run", value_model_checkpoint=str(tmp_path / "judge"))
    with pytest.raises(ValueError, match="value_model_checkpoint: .*another tokenizer than the policy: 1 ids differ"):
        PPOTrainer(train_config=described, reward_func=shorter)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "ppo_config: nothing judges completions: expected rewards"),
        ({"rewards": ["exact_match"], "gen_repetition_penalty": 1.2}, "off_policy_correction"),
        ({"rewards": ["exact_match"], "ppo_batch_size": 0}, "ppo_batch_size"),
        ({"rewards": ["exact_match"], "ppo_batch_size": 3}, "ppo_batch_size: got 3, .* 4 completions"),
        ({"rewards": ["exact_match"], "lam": 1.5}, "lam"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    section: dict[str, Any], message: str, prompts: Path, reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOTrainer(train_config=config(prompts, reference_dir, tmp_path, **section))


def test_the_example_is_one() -> None:
    path = Path(__file__).parents[2] / "configs" / "ppo.yaml"
    section = load_config(path).ppo_config
    assert section is not None and section.value_optim_config is not None
