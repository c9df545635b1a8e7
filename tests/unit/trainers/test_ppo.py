"""PPO: what an update on a rollout is, with a critic of its own and with one on the policy's body."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_trainer import configure_optimizer
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.optim import OptimConfig
from llm_trainer.config.ppo import PPOConfig
from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.rollouts import RolloutRow, collate_rollout
from llm_trainer.data.stream import SampleStream
from llm_trainer.models.critic import critic_of
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.trainers.ppo import PPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
from table import Rows, tiny_model

COLUMNS = ("old_logprobs", "advantages", "returns", "values")


class Experience:
    """Rows of a rollout as they are when everything is known of them; the numbers are random."""

    def __init__(self, seed: int = 0) -> None:
        self.rows = Rows("ppo", 512, seed)
        self.lengths, self.file_sizes = self.rows.lengths, self.rows.file_sizes
        noise = np.random.default_rng(seed)
        self.numbers = [noise.normal(size=(4, n)).astype(np.float32) / 2 for n in self.lengths]
        for index, numbers in enumerate(self.numbers):
            numbers[0] -= 6.2  # log-probs of a policy that has not learned anything
            numbers[:, ~self.rows[index]["trained"]] = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        ids = {"input_ids": row["input_ids"], "trained": row["trained"]}
        found = RolloutRow(ids | dict(zip(COLUMNS, self.numbers[index], strict=True)))
        found.per_token = frozenset(COLUMNS)
        return found


class Learner(PPOTrainer):
    """Learns from rows of a rollout that are given."""

    takes_flat = True

    def _build_source(self, source: Any, training: bool) -> Any:
        return source


def stream(flat: bool = True, batch_size: int = 8) -> SampleStream:
    lay = collate_flat if flat else collate_padded
    return SampleStream(
        Experience(),
        partial(collate_rollout, lay=lay),
        rows_per_step=8,
        batch_size=batch_size,
        flat=flat,
        shuffle=False,
    )


def make(folder: Path, model: Any, loader: Any = None, **options: Any) -> PPOTrainer:
    given: dict[str, Any] = {
        "model": model,
        "optimizer": configure_optimizer(model=model, optimizer_type="sgd", lr=0.1, weight_decay=0.0),
        "train_loader": stream() if loader is None else loader,
        "device": "cpu",
        "use_amp": False,
        "max_steps": 1,
        "save_dir": str(folder),
        "progress": False,
        "log_interval": 1,
        "max_grad_norm": None,
        "kl_beta": 0.0,
    }
    return Learner(**(given | options))


def by_hand(trainer: PPOTrainer, flat: bool) -> tuple[float, list[torch.Tensor]]:
    """The loss of the first update and its gradient, row by row with plain torch."""
    experience = Experience()
    rows = range(8)
    policy, critic = trainer.base_model, trainer.critic
    total = sum(int(experience[i]["trained"].sum()) for i in rows)
    loss = torch.zeros(())
    for i in rows:
        row = {name: torch.as_tensor(value) for name, value in experience[i].items()}
        ids, wrote = row["input_ids"].long()[None], row["trained"][1:]
        logprobs = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ratio = (logprobs - row["old_logprobs"][1:]).exp()
        advantage = row["advantages"][1:]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        hidden = critic.base_model(ids).last_hidden_state[0, :-1]
        value, old, returns = critic.score(hidden)[:, 0], row["values"][1:], row["returns"][1:]
        clipped = old + (value - old).clamp(-0.2, 0.2)
        error = 0.5 * torch.maximum((value - returns).square(), (clipped - returns).square())
        loss = loss + (wrote * (0.5 * error - surrogate)).sum() / total
    parameters = [*dict.fromkeys([*policy.parameters(), *critic.parameters()])]
    return loss.item(), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_the_first_update_is_that_of_the_papers(tmp_path: Path, flat: bool, on_policy: bool) -> None:
    trainer = make(tmp_path, tiny_model(), stream(flat), critic_on_policy=on_policy)
    loss, gradients = by_hand(trainer, flat)
    parameters = [*dict.fromkeys([*trainer.base_model.parameters(), *trainer.critic.parameters()])]
    before = [parameter.detach().clone() for parameter in parameters]
    values = trainer.train()
    assert values["loss"] == pytest.approx(loss, rel=1e-5)
    assert values["loss"] == pytest.approx(values["loss/policy_avg"] + 0.5 * values["loss/value_avg"], rel=1e-5)
    for was, gradient, parameter in zip(before, gradients, parameters, strict=True):
        torch.testing.assert_close(parameter.detach(), was - 0.1 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_policy", [False, True])
def test_the_critic_learns_alone_at_first(tmp_path: Path, on_policy: bool) -> None:
    """The policy keeps its bits, weight decay and momentum included, and goes on with the rate of the schedule."""
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = configure_optimizer(model=model, lr=1e-2, weight_decay=0.1)
    trainer = make(tmp_path, model, optimizer=optimizer, max_steps=2, critic_warmup_steps=2, critic_on_policy=on_policy)
    heads = trainer.critic.score.weight.detach().clone()
    trainer.train()
    assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
    assert not torch.equal(heads, trainer.critic.score.weight)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-2}
    trainer.run.settings.max_steps = 3
    trainer.train()
    assert not any(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))


def test_the_critic_has_options_of_its_own(tmp_path: Path) -> None:
    own = OptimConfig(initial_lr=0.5, betas=(0.5, 0.6), weight_decay=0.3)
    model = tiny_model()
    optimizer = configure_optimizer(model=model, lr=1e-2, weight_decay=0.1)
    scheduler = create_scheduler(optimizer, "linear", total_steps=4)
    trainer = make(tmp_path, model, optimizer=optimizer, scheduler=scheduler, value_optim_config=own)
    found = [(group["lr"], group["weight_decay"], group["betas"]) for group in trainer.optimizer.param_groups]
    assert found == [
        (0.01, 0.1, (0.9, 0.999)),
        (0.01, 0.0, (0.9, 0.999)),
        (0.5, 0.3, (0.5, 0.6)),
        (0.5, 0.0, (0.5, 0.6)),
    ]
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0075, 0.0075, 0.375, 0.375])


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    model = tiny_model()
    critic = critic_of(model)
    both = configure_optimizer(model=nn.ModuleList([model, critic]))
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        make(tmp_path, model, ref_model=model, kl_beta=0.1)
    with pytest.raises(ValueError, match="value_model is the policy itself"):
        make(tmp_path, model, value_model=model)
    with pytest.raises(ValueError, match="value_model is the reward_model itself, which is frozen"):
        make(tmp_path, model, value_model=critic, reward_model=critic)
    with pytest.raises(ValueError, match="all of its parameters are frozen"):
        make(tmp_path, model, value_model=critic_of(model).requires_grad_(False))
    with pytest.raises(ValueError, match="value_optim_config: the optimizer has the critic's parameters already"):
        make(tmp_path, model, value_model=critic, optimizer=both, value_optim_config=OptimConfig())
    with pytest.raises(ValueError, match="critic_warmup_steps: the critic's parameters are in one group"):
        make(tmp_path, model, value_model=critic, optimizer=both, critic_warmup_steps=1)
    with pytest.raises(TypeError, match="got list as optimizer"):
        make(tmp_path, model, optimizer=[])
    with pytest.raises(TypeError, match="has no option 'clip_epss'; did you mean clip_eps?"):
        make(tmp_path, model, clip_epss=0.1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kl_target": 6.0, "kl_beta": 0.0}, "kl_target: kl_beta is 0"),
        ({"critic_on_policy": True, "value_model_checkpoint": "rm"}, "critic_on_policy: value_model_checkpoint gives"),
        ({"value_optim_config": {"warmup_iters": 3}}, "value_optim_config: warmup_iters is of the whole run"),
        ({"value_optim_config": {"optim_type": "lion"}}, "value_optim_config: optim_type is of the whole run"),
    ],
)
def test_sections_that_contradict_themselves(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**section)
