"""GRPOTrainer on completions that are given: joining, groups over the whole step, sums, what is missing, what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import GRPOTrainer, configure_optimizer, create_trainer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook
from llm_trainer.trainers.given import gather, join_responses

Batch = dict[str, torch.Tensor]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_model(ModelConfig(**SHAPE))


def given_batch(size: int = 8, seed: int = 0, prompts: int = 2) -> Batch:
    """`size` completions of `prompts` prompts in turn, padded with ids of real tokens, which nobody may read."""
    noise = torch.Generator().manual_seed(seed)
    of_prompts = [torch.randint(3, 64, (3 + n,), generator=noise) for n in range(prompts)]
    width = 2 + prompts
    batch: Batch = {name: torch.full((size, width), 7) for name in ("prompts", "prompt_attention_mask")}
    batch["responses"] = torch.randint(3, 64, (size, 6), generator=noise)
    lengths = torch.randint(1, 7, (size,), generator=noise)
    batch["response_attention_mask"] = (torch.arange(6) < lengths[:, None]).long()
    batch["prompt_attention_mask"].zero_()
    for row in range(size):
        prompt = of_prompts[row % prompts]
        batch["prompts"][row, width - len(prompt) :] = prompt
        batch["prompt_attention_mask"][row, width - len(prompt) :] = 1
    batch["rewards"] = torch.randn(size, generator=noise)
    return batch


def train(
    folder: Path, batches: list[Batch], model: Any = None, **options: Any
) -> tuple[GRPOTrainer, list[dict[str, float]]]:
    """A run over `batches`, and the metrics of each step."""
    seen: list[dict[str, float]] = []
    model = tiny() if model is None else model
    trainer = GRPOTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=batches,
        device="cpu",
        max_epochs=1,
        use_amp=False,
        log_interval=1,
        save_dir=str(folder),
        save_interval=0,
        hooks=[Hook("watch", lambda run: seen.append(dict(run.values)), every_steps=1)],
        **options,
    )
    trainer.train()
    return trainer, seen


def test_the_loss_is_that_of_the_formula(tmp_path: Path) -> None:
    """By hand: log-probs of a row alone, advantages of a group, one mean per row."""
    batch, model = given_batch(), tiny()
    expected = 0.0
    for row in range(8):
        prompt = batch["prompts"][row][batch["prompt_attention_mask"][row].bool()]
        answer = batch["responses"][row][batch["response_attention_mask"][row].bool()]
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        old = logprobs + 0.3 * torch.arange(len(answer))
        batch.setdefault("old_logprobs", torch.full((8, 6), 99.0))[row, : len(answer)] = old
        others = batch["rewards"][row % 2 :: 2]
        advantage = float((batch["rewards"][row] - others.mean()) / (others.std() + 1e-4))
        ratios = (logprobs - old).exp()
        expected -= float(torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage).mean()) / 8
    _, seen = train(tmp_path, [batch], model)
    assert math.isclose(seen[0]["loss"], expected, abs_tol=1e-5)
    assert math.isclose(seen[0]["reward"], float(batch["rewards"].mean()), rel_tol=1e-5)


def test_a_group_is_found_in_all_batches_of_the_step(tmp_path: Path) -> None:
    whole = given_batch()
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 3), slice(3, 8))]
    _, (once,) = train(tmp_path / "a", [whole])
    _, (cut,) = train(tmp_path / "b", halves, grad_accum_steps=2)
    assert math.isclose(once["loss"], cut["loss"], abs_tol=1e-6)
    assert math.isclose(once["grad_norm"], cut["grad_norm"], rel_tol=1e-5)


@pytest.mark.parametrize(
    "options", [{"loss_type": "grpo"}, {"loss_type": "dapo", "kl_coef": 0.1, "entropy_coef": 0.02}]
)
def test_prompts_once_and_the_head_once_change_no_number(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = given_batch() | {"old_logprobs": -4 + torch.randn(8, 6, generator=torch.Generator().manual_seed(2))}
    batches = [batch, batch]
    trainer, found = train(tmp_path / "once", batches, share_prompts=True, **options)
    assert trainer.shares_prompts and trainer._is_sum_of_tokens(batch)
    trainer, expected = train(tmp_path / "repeated", batches, share_prompts=False, **options)
    assert not trainer.shares_prompts
    monkeypatch.setattr(GRPOTrainer, "_is_sum_of_tokens", lambda self, batch: False)
    _, again = train(tmp_path / "head again", batches, share_prompts=False, **options)
    for other in (found, again):
        for a, b in zip(other, expected, strict=True):
            assert a.keys() == b.keys()
            for name in ("loss", "grad_norm", "ratio", "entropy", "approx_kl", "clip_ratio/region_mean"):
                assert math.isclose(a[name], b[name], rel_tol=2e-5, abs_tol=1e-6), name


def test_on_policy_the_ratio_is_one_without_old_logprobs(tmp_path: Path) -> None:
    _, (seen,) = train(tmp_path, [given_batch()])
    assert seen["ratio"] == 1 and seen["clip_ratio/region_mean"] == 0


def test_sums_of_log_probs_are_ratios_of_sequences(tmp_path: Path) -> None:
    batch = given_batch()
    noise = torch.Generator().manual_seed(1)
    per_token = -torch.rand(8, 6, generator=noise)
    masked = per_token * batch["response_attention_mask"]
    options = {"loss_importance_sampling_level": "seq", "clip_eps": 0.2}
    _, (by_token,) = train(tmp_path / "a", [batch | {"old_logprobs": per_token}], **options)
    _, (by_sum,) = train(tmp_path / "b", [batch | {"old_logprobs": masked.sum(1)}], clip_eps=0.2)
    assert math.isclose(by_token["loss"], by_sum["loss"], abs_tol=1e-5)
    assert math.isclose(by_token["grad_norm"], by_sum["grad_norm"], rel_tol=1e-4)


def test_a_reward_that_is_missing_leaves_the_loss_and_its_group(tmp_path: Path) -> None:
    batch = given_batch()
    batch["rewards"][2] = torch.nan
    rest = [0, 1, 3, 4, 5, 6, 7]
    _, (missing,) = train(tmp_path / "a", [batch])
    _, (without,) = train(tmp_path / "b", [{name: value[rest] for name, value in batch.items()}])
    assert math.isclose(missing["loss"], without["loss"], abs_tol=1e-6)
    assert math.isclose(missing["grad_norm"], without["grad_norm"], rel_tol=1e-5)


def test_rewards_of_several_functions_that_are_given_are_weighted(tmp_path: Path) -> None:
    batch, other = given_batch(), given_batch(seed=1)
    table = torch.stack([batch["rewards"], other["rewards"]], 1)
    _, (weighted,) = train(tmp_path / "a", [batch | {"rewards": table}], reward_weights=[0.5, 2.0])
    _, (summed,) = train(tmp_path / "b", [batch | {"rewards": table @ torch.tensor([0.5, 2.0])}])
    assert weighted["reward"] == pytest.approx(summed["reward"])
    assert weighted["grad_norm"] == pytest.approx(summed["grad_norm"], rel=1e-5)
    with pytest.raises(ValueError, match="found 1 weights for 2 reward functions"):
        train(tmp_path / "c", [batch | {"rewards": table}], reward_weights=[0.5])


@pytest.mark.parametrize(
    "option", [{"grpo_steps": 2}, {"rows_per_update": 4}, {"max_resamplings": 1}, {"overlong": "mask"}]
)
def test_options_of_rollouts_are_refused_where_completions_are_given(option: dict[str, Any], tmp_path: Path) -> None:
    [(name, value)] = option.items()
    with pytest.raises(ValueError, match=f"{name}: got {value}, but nothing makes rollouts"):
        train(tmp_path, [given_batch()], **option)


def test_rewards_that_are_given_say_nothing_about_a_best_model(tmp_path: Path, capsys: Any) -> None:
    """They are those of the validation data, whatever is learned: it would stop early, and keep the first model."""
    options: dict[str, Any] = {"val_loader": [given_batch(seed=1)], "eval_interval": 1, "early_stopping_patience": 1}
    _, seen = train(tmp_path, [given_batch(seed=seed) for seed in range(3)], **options)
    assert len(seen) == 3 and "reward" in seen[-1] and "eval_loss" in seen[-1]
    assert not any(name.startswith("eval_reward") for name in seen[-1])
    assert capsys.readouterr().out.count("so that no best model is known") == 1
    assert not (tmp_path / "best_model.pt").exists()


def test_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, (seen,) = train(tmp_path, [given_batch() | {"rewards": torch.full((8,), 0.3)}], model)
    assert seen["frac_reward_zero_std"] == 1 and seen["grad_norm"] == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if value.dim() == 1)


def test_kl_is_zero_at_the_start_and_entropy_counts(tmp_path: Path) -> None:
    model = tiny()
    trainer, (seen,) = train(tmp_path, [given_batch()], model, kl_coef=0.1, entropy_coef=0.01)
    assert abs(seen["kl"]) < 1e-6 and 3 < seen["entropy"] < math.log(64) + 0.1
    assert trainer.reference is not None
    assert train(tmp_path / "no", [given_batch()])[0].reference is None


def test_temperature_divides_the_logits(tmp_path: Path) -> None:
    batch, louder = given_batch() | {"old_logprobs": -torch.rand(8, 6)}, tiny()
    with torch.no_grad():
        louder.lm_head.weight *= 2
    _, (plain,) = train(tmp_path / "a", [batch])
    _, (divided,) = train(tmp_path / "b", [batch], louder, temperature=2.0)
    assert math.isclose(plain["loss"], divided["loss"], abs_tol=1e-6)


def test_any_module_that_gives_logits(tmp_path: Path) -> None:
    """The whole batch counts where nobody says what padding is."""
    model = torch.nn.Sequential(torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64))
    batch = {
        "input_ids": torch.randint(0, 64, (4, 5)),
        "responses": torch.randint(0, 64, (4, 3)),
        "rewards": torch.rand(4),
        "old_logprobs": -torch.rand(4),
    }
    batch["input_ids"][:] = batch["input_ids"][:1]
    trainer = create_trainer(
        "GRPO",
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=[batch] * 2,
        max_epochs=1,
        save_dir=str(tmp_path),
    )
    assert trainer.train()["reward"] == pytest.approx(float(batch["rewards"].mean()))


def test_padding_is_found_by_its_id() -> None:
    prompts = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0]])
    responses = torch.tensor([[8, 9, 0, 0], [8, 9, 2, 0]])
    rows = join_responses({"prompts": prompts, "responses": responses, "rewards": torch.ones(2)}, pad_id=0)
    assert rows["input_ids"].tolist() == [[5, 6, 8, 9, 0], [5, 6, 8, 9, 2]]
    assert rows["labels"].tolist() == [[-100, -100, 8, 9, -100], [-100, -100, 8, 9, 2]]
    assert rows["prompt_keys"][0] == rows["prompt_keys"][1]
    ends = {"prompts": prompts, "responses": torch.tensor([[8, 0, 0, 0], [8, 9, 0, 0]]), "rewards": torch.ones(2)}
    ended = join_responses(ends, pad_id=0, pad_ends=True)
    assert ended["input_ids"].tolist() == [[5, 6, 8, 0, 0], [5, 6, 8, 9, 0]]
    assert ended["attention_mask"].sum(1).tolist() == [4, 5]


def test_ranks_see_what_all_have() -> None:
    """Three ranks with two, no and one rows: a sum is all they may ask."""
    tables = [torch.tensor([[1.0], [2.0]]), torch.zeros(0, 1), torch.tensor([[3.0]])]

    def ask(rank: int, answers: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        said: list[torch.Tensor] = []

        def add(values: torch.Tensor) -> torch.Tensor:
            said.append(values)
            return answers[len(said) - 1] if len(said) <= len(answers) else values

        return gather([tables[rank]], rank, add), said

    ranks = torch.tensor(3)
    counts = torch.tensor([2, 0, 1])
    parts = [ask(rank, [ranks, counts])[1][2] for rank in range(3)]
    total = torch.stack(parts).sum(0)
    for rank, start in enumerate((0, 2, 2)):
        (found, where), _ = ask(rank, [ranks, counts, total])
        assert found[0].flatten().tolist() == [1, 2, 3] and where == start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"old_logprobs": torch.zeros(8, 5)},
            r"old_logprobs: found the shape \(8, 5\) beside responses \(8, 6\); expected",
        ),
        ({"old_logprobs": torch.zeros(7)}, r"or \(8,\), one for each response"),
        ({"rewards": torch.zeros(3)}, r"rewards: found the shape \(3,\) for 8 responses"),
        ({"responses": torch.zeros(7, 6).long()}, "a prompt for each response"),
        ({"rewards": None}, "expected prompts .* and rewards"),
        ({"prompt_attention_mask": torch.zeros(8, 4)}, "prompts: row 0 of a batch has no token .* BOS"),
        ({"response_attention_mask": torch.zeros(8, 4)}, "response_attention_mask .* one number for each token"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    batch = {name: value for name, value in (given_batch() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        join_responses(batch, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 3}, "no option 'group_size' in this style; it is num_samples_per_prompt"),
        ({"loss_type": "grop"}, "loss_type"),
        ({"loss_delta": 1.1}, "delta"),
        ({"temperature": 0.0}, "gen_temperature"),
        ({"loss_type": "sapo", "clip_eps": 0.1}, "loss_clip_eps: got 0.1, but loss_type sapo does not look at it"),
        ({"loss_type": "cispo", "loss_delta": 2.0}, "loss_delta: got 2, but loss_type cispo does not look at it"),
        ({"off_policy_cap": 3.0}, "off_policy_cap: got 3.0, but off_policy_correction is none"),
        ({"off_policy_correction": "truncate", "off_policy_floor": 0.5}, "off_policy_floor: got 0.5, .* is truncate"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path, [given_batch()], **options)
