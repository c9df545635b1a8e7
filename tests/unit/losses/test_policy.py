"""Policy losses where the reference cases do not go: cuts of a step, garbage, empty and extreme rows, corrections."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trainer.losses.correction import Correction
from llm_trainer.losses.policy import POLICY_LOSSES, PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences

KINDS = pytest.mark.parametrize("kind", POLICY_LOSSES)


def loss_of(kind: str, **options: Any) -> PolicyLoss:
    return PolicyLoss(kind, max_completion_length=8, kl_coef=0.1, entropy_coef=0.05, **options)


def batch(rows: int = 5, width: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Log-probs, entropies and a mask `[rows, width]` with a hole, an empty row (the third) and a row of one token."""
    torch.manual_seed(seed)
    old = -torch.rand(rows, width, dtype=torch.float64)
    mask = torch.rand(rows, width) < 0.6
    mask[2], mask[1], mask[1, 3] = False, False, True
    return {
        "logprobs": old + 0.3 * torch.randn_like(old),
        "old": old,
        "ref": old + 0.2 * torch.randn_like(old),
        "entropy": torch.rand_like(old),
        "advantages": torch.randn(rows, dtype=torch.float64),
        "mask": mask,
    }


def evaluate(loss: PolicyLoss, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, number of terms, and the gradient of the mean."""
    sequences = Sequences(rows["mask"])
    logprobs = rows["logprobs"].clone().requires_grad_()
    tokens = PolicyTokens(rows["advantages"], rows["old"], rows["ref"])
    mean = loss.mean(loss.token_losses(logprobs, tokens, sequences, rows["entropy"]), sequences)
    (gradient,) = torch.autograd.grad(mean, logprobs)
    return mean.detach(), loss.num_terms(sequences), gradient


@KINDS
@pytest.mark.parametrize("count_empty_rows", [False, True])
def test_no_cut_of_a_step_changes_its_loss_or_gradient(kind: str, count_empty_rows: bool) -> None:
    loss, rows = loss_of(kind, count_empty_rows=count_empty_rows), batch()
    mean, weight, gradient = evaluate(loss, rows)
    for cut in ([1, 1, 1, 1, 1], [2, 3], [3, 2]):
        parts = [
            dict(zip(rows, part, strict=True)) for part in zip(*(v.split(cut) for v in rows.values()), strict=True)
        ]
        found = [evaluate(loss, part) for part in parts]
        assert sum(part[1] for part in found) == weight
        torch.testing.assert_close(sum(part[0] * part[1] for part in found) / weight, mean)
        torch.testing.assert_close(torch.cat([part[2] * part[1] for part in found]) / weight, gradient)


@KINDS
def test_what_stands_outside_of_the_mask_is_never_read(kind: str) -> None:
    loss, rows = loss_of(kind), batch()
    expected = evaluate(loss, rows)
    for garbage in (math.nan, math.inf, -1e30):
        spoilt = {
            name: value.masked_fill(~rows["mask"], garbage) if value.shape == rows["mask"].shape else value
            for name, value in rows.items()
            if name != "mask"
        }
        for found, wanted in zip(evaluate(loss, spoilt | {"mask": rows["mask"]}), expected, strict=True):
            assert torch.equal(found, wanted)


@KINDS
def test_a_step_of_dropped_rows_gives_zero(kind: str) -> None:
    rows = batch()
    mean, weight, gradient = evaluate(loss_of(kind), rows | {"mask": torch.zeros_like(rows["mask"])})
    assert (mean, weight) == (0, 0) and not gradient.any()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_drifted_without_end_stay_finite(kind: str, dtype: torch.dtype) -> None:
    old = torch.tensor([[-500.0, -1e-3, -1.0, -500.0]], dtype=dtype)
    logprobs = torch.tensor([[-1e-3, -500.0, -1.0, -1e-3]], dtype=dtype)
    for advantage in (0.0, 1.0, -1.0):
        rows = {"logprobs": logprobs, "old": old, "ref": old, "entropy": torch.ones_like(old)}
        rows |= {"advantages": torch.tensor([advantage], dtype=dtype), "mask": torch.ones(1, 4, dtype=torch.bool)}
        loss = PolicyLoss(kind, max_completion_length=8)
        mean, _, gradient = evaluate(loss, rows)
        assert mean.isfinite() and gradient.isfinite().all()
        if advantage == 0.0:
            assert mean == 0 and not gradient.any()


def test_a_group_without_variance_teaches_nothing_through_any_loss() -> None:
    rows = batch() | {"advantages": torch.zeros(5, dtype=torch.float64)}
    for kind in POLICY_LOSSES:
        mean, _, gradient = evaluate(PolicyLoss(kind, max_completion_length=8), rows)
        assert mean == 0 and not gradient.any(), kind


def test_without_old_log_probs_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    rows = batch()
    sequences = Sequences(rows["mask"])
    for kind in POLICY_LOSSES:
        loss = PolicyLoss(kind, max_completion_length=8)
        logprobs = rows["logprobs"].clone().requires_grad_()
        losses = loss.token_losses(logprobs, PolicyTokens(rows["advantages"]), sequences)
        loss.mean(losses, sequences).backward()
        weights = loss.token_weights(sequences, torch.float64) / loss.num_terms(sequences)
        torch.testing.assert_close(logprobs.grad, -weights * rows["advantages"][:, None], msg=kind)


def test_the_levels_of_the_ratio() -> None:
    sequences = Sequences(torch.ones(1, 2, dtype=torch.bool))
    tokens = PolicyTokens(torch.tensor([-1.0]), torch.zeros(1, 2))
    logprobs = torch.tensor([[0.0, math.log(4.0)]])
    per_token = PolicyLoss("grpo").token_losses(logprobs, tokens, sequences)
    per_sequence = PolicyLoss("grpo", importance="seq").token_losses(logprobs, tokens, sequences)
    torch.testing.assert_close(per_token, torch.tensor([[1.0, 4.0]]))
    torch.testing.assert_close(per_sequence, torch.tensor([[2.0, 2.0]]))  # the geometric mean


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "gpro"}, "loss_type 'gpro' is no policy loss; known: grpo"),
        ({"kl_estimator": "k4"}, "kl_estimator 'k4'"),
        ({"importance": "sentence"}, "'token' or 'seq'"),
        ({"loss_type": "vespo", "importance": "token"}, "vespo"),
        ({"loss_type": "dr_grpo"}, "max_completion_length=None"),
        ({"clip_eps": -0.1}, "clip_eps=-0.1"),
        ({"delta": 1.1}, "delta=1.1 must be above 1 \\+ clip_eps_high = 1.2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PolicyLoss(**options)


def test_bounds_are_those_of_the_type_unless_chosen() -> None:
    assert PolicyLoss("dapo").bounds == (0.8, 1.28)
    assert PolicyLoss("dapo", clip_eps=0.1).bounds == (0.9, 1.1)
    assert PolicyLoss("dapo", clip_eps_high=0.5).bounds == (0.8, 1.5)
    assert PolicyLoss("cispo").bounds == (-math.inf, 1.28)
    assert PolicyLoss("gspo").level == "seq" and not PolicyLoss("gspo").is_per_token


def correction(
    weights: list[float], mask: list[int] | None = None, **options: Any
) -> tuple[list[float], dict[str, float]]:
    counted = torch.tensor([mask or [1] * len(weights)]).bool()
    found, metrics = Correction(**options)(
        torch.tensor([weights]).log(), torch.zeros(1, len(weights)), Sequences(counted)
    )
    return [round(x, 5) for x in found[0].tolist()], {name: float(a / b) for name, (a, b) in metrics.items()}


def test_corrections_truncate_or_mask_tokens() -> None:
    weights, metrics = correction([1.0, 3.0, 0.25, 9.0], mask=[1, 1, 1, 0])
    assert weights == [1.0, 2.0, 0.25, 0.0]
    assert metrics["sampling/corrected_share"] == pytest.approx(1 / 3)
    assert metrics["sampling/importance_weight"] == pytest.approx(3.25 / 3)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(3.25**2 / (1 + 4 + 0.0625) / 3)
    weights, metrics = correction([1.0, 3.0, 0.25, 9.0], mode="mask", floor=0.5)
    assert weights == [1.0, 0.0, 0.0, 0.0]
    assert metrics["sampling/corrected_share"] == 0.75
    assert metrics["sampling/effective_sample_size"] == 0.25


def test_corrections_of_whole_sequences() -> None:
    assert correction([1.5, 1.5, 1.5], level="seq")[0] == [2.0, 2.0, 2.0]
    assert correction([1.5, 1.2], level="seq")[0] == [1.8, 1.8]
    weights, metrics = correction([1.5, 1.5], level="seq", mode="mask")
    assert weights == [0.0, 0.0] and metrics["sampling/effective_sample_size"] == 0


def test_a_correction_multiplies_the_loss() -> None:
    rows = batch()
    sequences = Sequences(rows["mask"])
    half = torch.full_like(rows["old"], 0.5)
    plain = PolicyLoss().token_losses(rows["logprobs"], PolicyTokens(rows["advantages"], rows["old"]), sequences)
    tokens = PolicyTokens(rows["advantages"], rows["old"], corrections=half)
    torch.testing.assert_close(PolicyLoss().token_losses(rows["logprobs"], tokens, sequences), plain / 2)


def test_rows_of_a_flat_batch_whose_documents_lie_in_another_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1]]).bool()
    values = torch.arange(9.0)[None]
    sequences = Sequences(mask, torch.tensor([3, 2, 4]), order=torch.tensor([0, 2, 1]))
    assert sequences.counts.tolist() == [2, 3, 1]
    assert sequences.sum(values).tolist() == [3.0, 21.0, 4.0]
    assert sequences.spread(torch.tensor([10.0, 20.0, 30.0])).tolist() == [[10.0] * 3 + [30.0] * 2 + [20.0] * 4]
    assert sequences.compact(values).tolist() == [[1.0, 2.0, 0.0], [6.0, 7.0, 8.0], [4.0, 0.0, 0.0]]
    assert torch.equal(sequences.expand(sequences.compact(values)), torch.where(mask, values, 0.0))


def test_a_loss_says_what_it_is() -> None:
    assert str(PolicyLoss()) == "grpo, ratios of tokens from 0.8 to 1.2"
    assert str(PolicyLoss("sapo")) == "sapo, ratios of tokens"
    held = PolicyLoss(clip_eps=0.1, delta=2.0, kl_coef=0.05, entropy_coef=0.01, importance="seq")
    assert str(held) == (
        "grpo, ratios of sequences from 0.9 to 1.1, at most 2 where the advantage is negative, 0.05 x KL (k3), -0.01 x entropy"
    )
