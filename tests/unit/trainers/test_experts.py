"""The balance of experts over a step: noise, what is remembered, what is shown, and what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_trainer import RewardTrainer, SFTTrainer, configure_optimizer
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.models.build import build_config, build_model
from llm_trainer.models.rewarding import reward_model
from llm_trainer.models.scored import scored
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.trainers import expert_loads

SHAPE: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "architecture": "qwen3_moe",
    "moe": MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
}
DENSE = {"architecture": "qwen3", "moe": None}
BIASED = {"architecture": "glm4_moe"}


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(**SHAPE | changes), attention="eager")


def batches(count: int = 12) -> list[dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 24, (2, 9), generator=noise)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def make(folder: Path, model: nn.Module | None = None, trainer: Any = SFTTrainer, **options: Any) -> Any:
    model = tiny() if model is None else model
    given: dict[str, Any] = {"max_epochs": 1, "grad_accum_steps": 2, "log_interval": 1, "save_interval": 0}
    given |= {"use_amp": False, "progress": False, "compile": False, "micro_batch_tokens": None, "packing": "none"}
    optimizer = configure_optimizer(model=model, lr=1e-2)
    loader = options.pop("train_loader", None) or batches()
    return trainer(
        model, optimizer=optimizer, train_loader=loader, device="cpu", save_dir=str(folder), **given | options
    )


@pytest.mark.parametrize("recomputed", [False, True])
def test_tokens_are_routed_ahead_with_the_noise_that_they_will_meet(recomputed: bool, tmp_path: Path) -> None:
    """Dropout changes whom a token is sent to; the counts of both passes are equal, and no noise is used up."""
    made = make(tmp_path, tiny(attention_dropout=0.5), gradient_checkpointing=recomputed, aux_loss_coef=0.1)
    balance, pairs = made.regulariser, []
    end = balance.end

    def compare(sum_over_ranks: Any) -> None:
        pairs.append((balance._counted.clone(), balance._seen.clone()))
        end(sum_over_ranks)

    balance.end = compare
    made.train()
    assert len(pairs) == 6
    for counted, seen in pairs:
        assert torch.equal(counted, seen)
        assert (
            counted.sum(1).tolist() == [2 * 2 * (9 + 6)] * 2
        )  # top 2 of the tokens of two micro-batches, in each layer
    without = make(tmp_path / "plain", tiny(attention_dropout=0.5), aux_loss_coef=0.0)
    without.train()
    other = make(tmp_path / "other", tiny(attention_dropout=0.5), aux_loss_coef=1e-30)
    other.train()
    for ours, theirs in zip(without.base_model.parameters(), other.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_step_before_is_remembered_by_a_checkpoint(tmp_path: Path) -> None:
    """A run that is stopped and goes on is the run that was not, bit for bit; a step before that is forgotten shows."""
    options: dict[str, Any] = {"aux_loss_scope": "previous_step", "aux_loss_coef": 0.5}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    stop = Hook(
        "stop", lambda run: os.kill(os.getpid(), signal.SIGTERM) if run.progress.step == 3 else None, every_steps=1
    )
    first = make(tmp_path / "cut", hooks=[stop], **options)
    with pytest.raises(TrainingInterrupted):
        first.train()
    for forgets in (False, True):
        second = make(tmp_path / "cut", resume="auto", **options)
        if forgets:
            load = second.regulariser.load_state_dict
            second.regulariser.load_state_dict = lambda state, load=load: load(state | {"last": None, "idle": None})
        second.run.save = lambda **how: ""  # nothing is left for the next one
        second.train()
        pairs = zip(whole.base_model.parameters(), second.base_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is not forgets


def test_what_is_shown(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    hooks = [Hook("see", lambda run: seen.append(dict(run.values)), every_steps=1)]
    made = make(tmp_path, hooks=hooks, val_loader=batches(2), aux_loss_coef=0.5)
    wanted = scored(tiny())
    values = made.train()
    routing = [wanted(**batch).routing for batch in batches()[:2]]
    assigned = routing[0].assigned + routing[1].assigned
    first = seen[0]
    assert first["experts/load_max"] == pytest.approx(assigned.max() / (30 * 2 / 4))
    assert first["experts/load_min"] == pytest.approx(assigned.min() / (30 * 2 / 4))
    assert first["experts/unused"] == (assigned == 0).sum() and 0 < first["experts/entropy"] <= 1
    assert first["aux_loss"] >= 2.0 and first["router_z_loss"] > 0  # of top 2
    assert first["loss"] > 0.5 * first["aux_loss"]
    # What is evaluated is the loss alone: no balance of more than one of its micro-batches is known.
    assert values["eval_aux_loss"] >= 2.0
    plain = make(tmp_path / "plain", made.base_model, val_loader=batches(2), aux_loss_coef=0.0).evaluate()
    assert made.evaluate()["eval_loss"] == plain["eval_loss"]


def test_it_is_said_once_that_tokens_are_routed_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "cut").train()
    assert capsys.readouterr().out.count("aux_loss_scope: this step is cut") == 1
    make(tmp_path / "whole", grad_accum_steps=1).train()
    make(tmp_path / "before", aux_loss_scope="previous_step").train()
    make(tmp_path / "off", aux_loss_coef=0.0).train()
    assert "aux_loss_scope" not in capsys.readouterr().out


def test_an_expert_without_tokens_is_spoken_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_loads, "PATIENCE", 3)
    monkeypatch.setattr(expert_loads, "LOOKS", 1)
    made = make(tmp_path, grad_accum_steps=1)
    balance = made.regulariser
    end, calls = balance.end, []

    def starve(sum_over_ranks: Any) -> None:
        calls.append(1)
        balance._seen[1, 2] = 0 if len(calls) != 2 else 1  # in the second step it has one
        end(sum_over_ranks)

    balance.end = starve
    made.train()
    said = capsys.readouterr().out
    assert said.count("no token has been sent to") == 1
    assert "for 3 steps: 2 of layer 1 (" in said and "a larger aux_loss_coef (now 0.001)" in said
    assert balance.state_dict()["idle"][1][2] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"aux_loss_coef": 0.01},
            "aux_loss_coef: got 0.01, but Qwen3ForCausalLM has no experts whose routers can be seen; ",
        ),
        ({"router_z_loss_coef": 0.001}, "router_z_loss_coef: got 0.001, but Qwen3ForCausalLM has no experts"),
        (
            {"aux_loss_scope": "previous_step"},
            "aux_loss_scope: got 'previous_step', but Qwen3ForCausalLM has no experts",
        ),
    ],
)
def test_a_dense_model_has_nothing_to_balance(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, tiny(**DENSE), **options)
    make(tmp_path, tiny(**DENSE), aux_loss_coef=0.0)  # nothing is asked for


def test_trainers_that_balance_nothing_say_so(tmp_path: Path) -> None:
    class Own(SFTTrainer):
        balances_experts = False

    with pytest.raises(ConfigError, match="aux_loss_coef: got 0.5, but Own does not say that it balances experts"):
        make(tmp_path, trainer=Own, aux_loss_coef=0.5)
    quiet = make(tmp_path, trainer=Own)
    assert quiet.regulariser.couples_rows  # it may balance micro-batches itself
    assert "aux_loss" not in quiet.train()
    with pytest.raises(ConfigError, match="aux_loss_coef: got 0.5, but RewardTrainer does not say that it balances"):
        make(tmp_path, reward_model(tiny()), RewardTrainer, aux_loss_coef=0.5)


def test_a_subclass_that_prepares_other_rows_is_routed_by_them(tmp_path: Path) -> None:
    class Halved(SFTTrainer):
        takes_flat = True

        def _count_tokens(self, batch: Any) -> int:
            return 4 * len(batch["input_ids"])

        def _prepare_batch(self, batch: Any) -> Any:
            return {name: value[:, :4] for name, value in super()._prepare_batch(batch).items()}

    made = make(tmp_path, trainer=Halved)
    seen: list[Tensor] = []
    end = made.regulariser.end
    made.regulariser.end = lambda sums: (seen.append(made.regulariser._counted.sum(1)), end(sums))
    made.train()
    assert all(counted.tolist() == [2 * 2 * 8] * 2 for counted in seen) and len(seen) == 6


def test_more_experts_per_token_than_there_are_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.config.num_experts_per_tok = 5
    with pytest.raises(ValueError, match="num_experts_per_tok: .* sends each token to 5 experts, and a layer has 4"):
        make(tmp_path, model)


def test_what_is_published_asks_for_no_router_logits(tmp_path: Path) -> None:
    made = make(tmp_path, aux_loss_coef=0.5)
    made.train()
    assert (
        not made.base_model.config.output_router_logits and not build_config(ModelConfig(**SHAPE)).output_router_logits
    )


def test_micro_batches_are_the_machines_own_unless_each_is_balanced_alone(tmp_path: Path) -> None:
    from llm_trainer.train.budget import may_cut

    assert may_cut(make(tmp_path)) and may_cut(make(tmp_path, aux_loss_scope="previous_step"))
    assert not may_cut(make(tmp_path, aux_loss_scope="micro_batch"))
    assert may_cut(make(tmp_path, aux_loss_scope="micro_batch", aux_loss_coef=0.0, router_z_loss_coef=0.1))


# Routers that a bias balances.


def biases_of(model: Any) -> list[Tensor]:
    return [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]


def first_biases(model: Any) -> list[Tensor]:
    """What two micro-batches of `batches` make of biases of 0, by hand: 0.1 up or down, by the tokens of each expert."""
    counts = [torch.zeros(4), torch.zeros(4)]
    for batch in batches()[:2]:
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True).router_logits
        for layer, count in zip(logits, counts, strict=True):
            chosen = layer.sigmoid().topk(2).indices[batch["attention_mask"].flatten() == 1]
            count += torch.bincount(chosen.flatten(), minlength=4)
    return [0.1 * torch.sign(count.mean() - count) for count in counts]


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}], ids=["plain", "recomputed"])
def test_biases_move_against_the_load_of_a_whole_step(how: dict[str, Any], tmp_path: Path) -> None:
    """Padding is left out; where the update is, so is the move."""
    expected = first_biases(tiny(**BIASED))
    assert len({tuple(bias.tolist()) for bias in expected}) == 2  # each layer by itself
    made = make(tmp_path, tiny(**BIASED), bias_update_speed=0.1, max_steps=1, **how)
    values = made.train()
    for bias, wanted in zip(biases_of(made.base_model), expected, strict=True):
        assert torch.equal(bias, wanted)
    assert values["experts/load_max"] > 1 and "aux_loss" not in values


def test_biases_stay_where_nothing_is_updated(tmp_path: Path) -> None:
    model = tiny(**BIASED)
    model.get_parameter("lm_head.weight").register_hook(lambda gradient: gradient * torch.nan)
    made = make(tmp_path, model, bias_update_speed=0.1, max_steps=2)
    made.train()
    assert made.run.progress.skipped_steps == 2
    assert not any(bias.any() for bias in biases_of(model))


def test_biases_are_moved_in_a_new_model_and_stay_in_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tiny(**BIASED)
    make(tmp_path / "new", new, max_steps=1).train()
    assert "balanced by biases of their routers, moved by 0.001 after each step (bias_update" in capsys.readouterr().out
    assert biases_of(new)[0].abs().max() == torch.tensor(0.001)
    before = [bias.clone() for bias in biases_of(new)]
    made = make(tmp_path / "old", new, max_steps=1)
    values = made.train()
    assert "which stay as they are (bias_update_speed: 0.001 moves them)" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before, biases_of(new), strict=True))
    assert "experts/unused" in values
    make(tmp_path / "named", new, max_steps=1, bias_update_speed=0.25).train()
    assert biases_of(new)[0].abs().max() >= 0.249


@pytest.mark.parametrize("speed", [None, 0.05])
def test_biases_are_in_checkpoints(speed: float | None, tmp_path: Path) -> None:
    """A run that is stopped and goes on is the run that was not, bit for bit, though its biases are no longer 0."""
    options: dict[str, Any] = {"bias_update_speed": speed}
    whole = make(tmp_path / "whole", tiny(**BIASED), **options)
    whole.train()
    stop = Hook(
        "stop", lambda run: os.kill(os.getpid(), signal.SIGTERM) if run.progress.step == 3 else None, every_steps=1
    )
    with pytest.raises(TrainingInterrupted):
        make(tmp_path / "cut", tiny(**BIASED), hooks=[stop], **options).train()
    moved = tiny(**BIASED)
    biases_of(moved)[0].fill_(0.5)  # whatever it began with, the run goes on as it began
    second = make(tmp_path / "cut", moved, resume="auto", **options)
    second.train()
    ours, theirs = whole.base_model.state_dict(), second.base_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert second.regulariser.speed == (speed or 0.001)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"bias_update_speed": 0.001}, "bias_update_speed: got 0.001, but the routers of Qwen3MoeForCausalLM are "),
        (DENSE, {"bias_update_speed": 0.001}, "bias_update_speed: got 0.001, but Qwen3ForCausalLM has no experts"),
        (
            BIASED,
            {"aux_loss_coef": 0.01},
            r"the routers of Glm4MoeForCausalLM are balanced by a bias \(bias_update_speed",
        ),
        (
            BIASED,
            {"aux_loss_scope": "previous_step"},
            "aux_loss_scope: got 'previous_step', but the routers of Glm4Moe",
        ),
    ],
)
def test_each_kind_of_router_has_its_balance(
    model: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, tiny(**model), **options)


def test_biases_elsewhere_than_in_routers_are_not_moved(tmp_path: Path) -> None:
    """As in Ernie 4.5, whose bias is a parameter beside them, and in MiniMax-M2, where it is in the layer."""
    from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

    sizes = {name: value for name, value in SHAPE.items() if name not in ("architecture", "moe")}
    sizes["num_key_value_heads"] = 2
    config = Ernie4_5_MoeConfig(**sizes, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_layer_start_index=0)
    model = AutoModelForCausalLM.from_config(config)
    assert make(tmp_path, model).regulariser.describe() == ""
    with pytest.raises(
        ConfigError, match="balanced by a bias that is elsewhere than in them, and that is not moved here"
    ):
        make(tmp_path, model, bias_update_speed=0.001)


def test_the_base_under_adapters_keeps_its_biases(tmp_path: Path) -> None:
    from llm_trainer.config.adapters import AdapterConfig
    from llm_trainer.models.adapters import adapt

    adapted = adapt(tiny(**BIASED), AdapterConfig(rank=2))
    values = make(tmp_path, adapted, max_steps=1).train()
    assert not any(bias.any() for bias in biases_of(adapted.get_base_model())) and values["experts/load_max"] > 1
    with pytest.raises(ConfigError, match="bias_update_speed: got 0.1, but the biases .* are in the base, which stays"):
        make(tmp_path, adapted, bias_update_speed=0.1)
