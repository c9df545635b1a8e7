"""Asynchronous GRPO and PPO with a real sampler: what they learn from, what is corrected, what is refused by name."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import GRPOConfig
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Completion, Interrupted
from llm_trainer.generation.verify import Verified, WrongWeights
from llm_trainer.train.hooks import Hook
from llm_trainer.trainers.on_policy import correction_of
from policies import even_share, make, prompts, rollouts_of, tiny, train


def versions(folder: Path) -> list[set[int]]:
    """Which weights have written each rollout."""
    found = []
    for rollout in rollouts_of(folder):
        found.append({int(rollout.store["versions"][row][1]) for row in range(len(rollout))})
    return found


@pytest.mark.parametrize("name", ["grpo", "ppo", "remax"])
def test_the_same_twice_beside_evaluation_and_noise_of_the_training(name: str, tmp_path: Path) -> None:
    """The forwards of the training draw from torch's generator, which nothing in the other thread may touch."""
    results: list[Any] = []
    for run in ("one", "two"):
        model, noise = tiny(), list[float]()
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output, noise=noise: noise.append(float(torch.rand(()))) if module.training else None
        )
        options: dict[str, Any] = {"max_staleness": 2, "val_loader": prompts(2), "eval_interval": 1, "eval_samples": 2}
        trainer, seen = train(name, tmp_path / run, model, **options)
        assert all({"eval_reward", "eval_pass@2"} <= line.keys() for line in seen)
        columns = [rollout.store["sampled_logprobs"].values.copy() for rollout in rollouts_of(tmp_path / run)]
        parameters = [parameter.detach().clone() for parameter in trainer.base_model.parameters()]
        results.append((columns, parameters, [np.array(noise)]))
    for ours, theirs in zip(*results, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    updates = {"grpo": 1, "ppo": 2, "remax": 1}[name]
    age = min(2, updates)
    assert versions(tmp_path / "one") == [{0}, {updates - age}, {2 * updates - age}]


def test_what_drew_and_what_learns_are_told_apart_and_corrected(tmp_path: Path) -> None:
    """Old log-probs are those of the policy when learning begins; the sampler's are those of the weights before."""
    model = tiny()
    fast = torch.optim.AdamW(model.parameters(), lr=3e-2)
    trainer, seen = train("grpo", tmp_path, model, max_staleness=2, rows_per_update=4, optimizer=fast)
    gap = []
    for rollout in rollouts_of(tmp_path)[:2]:
        old, sampled, trained = (rollout.store[name].values for name in ("old_logprobs", "sampled_logprobs", "trained"))
        gap.append(float(np.abs(old - sampled)[trained].max()))
    assert gap[0] < 1e-5 < 1e-3 < gap[1]
    stale = [line for line in seen if line["staleness/max"] == 2]
    assert stale and all(abs(line["sampling/importance_weight"] - 1) > 1e-4 for line in stale)
    assert trainer.correction is not None and trainer.correction.mode == "truncate"


def test_correction_belongs_to_the_mode_unless_it_is_said() -> None:
    found = []
    for said in ({}, {"max_staleness": 1}, {"max_staleness": 1, "off_policy_correction": "none"}):
        correction = correction_of(GRPOConfig(**said))
        found.append(None if correction is None else correction.mode)
    assert found == [None, "truncate", None]
    GRPOConfig(max_staleness=1, gen_repetition_penalty=1.1)  # which needs a correction, and has one


def test_what_cannot_be_made_beside_the_training_is_refused_by_name(tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "even_share would be called in the process that trains": {"reward_in_process": True},
        "the rollouts of another run are learned from": {"rollouts": str(tmp_path)},
        "nothing judges completions": {"reward_func": None},
        "draws with the trained weights in place": {"generation_service": InProcess(tiny())},
    }
    for message, options in refused.items():
        with pytest.raises(ConfigError, match=f"max_staleness: got 1, but .*{message}"):
            make("grpo", tmp_path, max_staleness=1, **options)
    with pytest.raises(ConfigError, match="max_staleness"):
        GRPOConfig(max_staleness=-1)


def slow(prompts: list[list[int]], completions: list[list[int]], answers: list[str]) -> list[float]:
    """As `even_share`, a while later."""
    time.sleep(0.5)
    return even_share(prompts, completions, answers)


def test_a_reward_that_waits_is_waited_for_while_something_is_learned(tmp_path: Path) -> None:
    """Steps are as long as the wait: of it, next to nothing is left to be waited for."""
    rest = Hook("rest", lambda run: time.sleep(0.7), every_steps=1)
    _, seen = train("grpo", tmp_path, max_staleness=1, reward_func=slow, hooks=[rest])
    assert seen[0]["seconds/reward"] > 0.5
    assert all(line["seconds/reward"] > 0.5 > 0.3 > line["seconds/wait"] for line in seen[1:])


class Paused:
    """A service that takes weights while it generates: a completion of two tokens, of which the second waits for them."""

    dtype, updates_in_flight = None, True

    def __init__(self) -> None:
        self.version, self.is_asked, self.has_newer = -1, threading.Event(), threading.Event()

    def load(self, weights: Any, version: int) -> None:
        list(weights)
        self.version = version
        if self.is_asked.is_set():
            self.has_newer.set()

    def held(self) -> dict[str, int]:
        return {}

    def generate(self, requests: Any, decoding: Any, stop: Any) -> list[list[Completion]]:
        first = self.version
        self.is_asked.set()
        if not self.has_newer.wait(20):
            raise Interrupted
        return [[Completion([3, 4], [-1.0, -1.0], "stop", [(0, first), (1, self.version)])]]


def test_tokens_of_weights_that_came_in_flight_are_verified_too() -> None:
    """What was generated meanwhile is looked at when the weights are verified, or refused."""
    service = Paused()
    verified = Verified(service)
    assert verified.updates_in_flight and not Verified(InProcess(tiny())).updates_in_flight
    verified.load([], 1)
    found: list[Any] = []

    def generate() -> None:
        try:
            found.append(verified.generate([], None, lambda: False))  # type: ignore[arg-type]
        except WrongWeights as error:
            found.append(error)

    for version, is_right in ((2, True), (3, False)):
        service.is_asked.clear()
        service.has_newer.clear()
        thread = threading.Thread(target=generate)
        thread.start()
        assert service.is_asked.wait(20)
        if is_right:
            verified.load([], version)
        else:  # newer ones that nobody has verified
            service.load([], version)
        thread.join()
    assert found[0][0][0].versions == [(0, 1), (1, 2)]
    assert isinstance(found[1], WrongWeights) and "from 1 on with version 3" in str(found[1])
