"""Completions are learned from on the routes that drew them: what is kept of them, that they are taken, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import MoeConfig
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.verify import Verified
from llm_trainer.models.experts import BALANCING_BIAS, biased_routers
from llm_trainer.trainers import rollouts as rollouts_file
from llm_trainer.trainers.routes import route_columns, routes_of
from policies import make, rollouts_of, tiny, train

EXPERTS = {"num_hidden_layers": 3, "initializer_range": 0.3}
MOE = MoeConfig(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=8, num_dense_layers=1)


def policy(architecture: str = "qwen3_moe") -> Any:
    return tiny(architecture=architecture, moe=MOE, **EXPERTS)


def routes_taken(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """`[T, R]` of a plain forward."""
    chosen: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers[1:]:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda _, inputs, output: chosen.append(output[2])))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.cat(chosen, dim=1)


def test_columns_hold_what_was_packed() -> None:
    routes = np.random.default_rng(0).integers(-1, 511, (5, 9))
    columns = route_columns(routes, 5, 2)
    assert all(column.shape == (5,) and column.dtype == np.int64 for column in columns.values())
    found = routes_of({name: torch.from_numpy(column)[None] for name, column in columns.items()})
    assert (
        found is not None and torch.equal(found[0, :, :9], torch.from_numpy(routes)) and (found[0, :, 9:] == -1).all()
    )
    assert routes_of({"input_ids": torch.zeros(1, 5)}) is None
    unknown = routes_of({name: torch.from_numpy(column)[None] for name, column in route_columns(None, 5, 2).items()})
    assert unknown is not None and (unknown == -1).all()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_a_rollout_has_the_routes_that_the_trainer_would_take(architecture: str, tmp_path: Path) -> None:
    """In fp32, where both compute alike; so nothing else changes either. The last token of a row was not read."""
    _, seen = train("grpo", tmp_path / "plain", policy(architecture))
    _, ours = train("grpo", tmp_path / "run", policy(architecture), replay_routes=True)
    for one, other in zip(seen, ours, strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    model = policy(architecture)
    rollout = rollouts_of(tmp_path / "run")[0]
    lengths = set()
    for row in range(len(rollout)):
        ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
        chosen = routes_taken(model, ids)
        packed = {name: torch.from_numpy(np.array(rollout.store[name][row]))[None] for name in ("routes_0",)}
        found = routes_of(packed)
        assert found is not None
        assert torch.equal(found[0, :-1, :6], chosen[:-1]) and (found[0, -1] == -1).all()
        lengths.add(ids.shape[1])
    assert len(lengths) > 1


def test_biases_that_balance_are_sent_as_they_are() -> None:
    """A thousandth, by which they move, is less than bf16 tells apart beside 1; the sampler keeps them in fp32 as it is."""
    model = policy("glm4_moe")
    for router in biased_routers(model).values():
        router.e_score_correction_bias.copy_(1 + 0.001 * torch.arange(8))
    engine = TorchEngine(torch.device("cpu"))
    engine.prepare(model, model, torch.optim.SGD(model.parameters()))
    sampler = InProcess(model, torch.bfloat16)
    Verified(sampler).load(engine.stream_weights(torch.bfloat16), 0)  # their bits are compared
    assert sampler.copy is not None
    held = dict(sampler.copy.held())
    for name, value in model.state_dict().items():
        is_bias = name.endswith(BALANCING_BIAS)
        assert held[name].dtype == (torch.float32 if is_bias else torch.bfloat16)
        assert not is_bias or torch.equal(held[name], value)
    assert sum(name.endswith(BALANCING_BIAS) for name in held) == 2


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_they_are_taken_however_rows_are_laid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other routes than the weights would choose: one curve, whether prompts are shared, rows padded, or steps cut."""

    def others(routes: Any, length: int, count: int) -> Any:
        return route_columns((routes + 1) % 8 if routes is not None else None, length, count)

    plain = train(name, tmp_path / "plain", policy(), **OF[name])[1]
    monkeypatch.setattr(rollouts_file, "route_columns", others)
    ways: list[dict[str, Any]] = [{}, {"packing": "none", "micro_batch_tokens": None}, {"micro_batch_tokens": 40}]
    curves = []
    for number, way in enumerate(ways):
        options = {"replay_routes": True, "max_logp_difference": 100.0, **OF[name], **way}
        curves.append(train(name, tmp_path / str(number), policy(), **options)[1])
    for curve in curves[1:]:
        for one, other in zip(curve, curves[0], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert abs(plain[0]["grad_norm"] - curves[0][0]["grad_norm"]) > 1e-3 * plain[0]["grad_norm"]


OF: dict[str, dict[str, Any]] = {
    "grpo": {"max_steps": 1},
    "ppo": {"max_steps": 1, "critic_warmup_steps": 0, "kl_beta": 0.0},
}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {}, "a Qwen3ForCausalLM has no experts; leave it out"),
        (
            {"architecture": "qwen3_moe", "moe": MOE, **EXPERTS},
            {"rollout_servers": ["http://127.0.0.1:1"]},
            "others than this process draw completions",
        ),
    ],
)
def test_what_is_refused(model: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"replay_routes: got true, but .*{message}"):
        make("grpo", tmp_path, tiny(**model), replay_routes=True, **options)
