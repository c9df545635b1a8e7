"""Preference losses: options and aliases, accumulation, empty completions, extreme inputs."""

from dataclasses import replace

import pytest
import torch

from llm_trainer.losses.pairs import Pairs, pairs_from_tokens, sequence_logps
from llm_trainer.losses.preference import (
    BATCH_COUPLED,
    F_DIVERGENCES,
    PAIR_LOSSES,
    PreferenceLoss,
    resolve_loss_type,
)

Tokens = dict[str, torch.Tensor]


def tokens(size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tokens:
    """Per-token log-probs of `size` pairs whose lengths differ, with NaN outside the masks."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for side, width in (("chosen", 9), ("rejected", 7)):
        lengths = torch.randint(1, width + 1, (size, 1), generator=generator)
        mask = torch.arange(width) < lengths
        result[f"{side}_mask"] = mask
        for prefix in ("", "ref_"):
            logps = -torch.rand(size, width, generator=generator, dtype=dtype) * 3
            result[f"{prefix}{side}_logps"] = logps.masked_fill(~mask, float("nan"))
    return result


def cut(batch: Tokens, *sizes: int) -> list[Tokens]:
    pieces = {name: value.split(list(sizes)) for name, value in batch.items()}
    return [{name: pieces[name][i] for name in batch} for i in range(len(sizes))]


@pytest.mark.parametrize("nll_norm", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", sorted(PAIR_LOSSES.keys() - BATCH_COUPLED))
def test_the_gradient_of_a_step_does_not_depend_on_how_its_pairs_are_cut(loss_type: str, nll_norm: str) -> None:
    loss = PreferenceLoss({loss_type: 1.0, "sft": 0.7}, nll_norm=nll_norm)
    batch = tokens()
    num_nll = loss(pairs_from_tokens(**batch)).nll_counts.sum()
    results = []
    for sizes in [(6,), (1, 5), (2, 3, 1), (1,) * 6]:
        leaf = batch["chosen_logps"].clone().requires_grad_()
        parts = [loss(pairs_from_tokens(**part)) for part in cut(batch | {"chosen_logps": leaf}, *sizes)]
        total = torch.stack([part.total(6, num_nll) for part in parts]).sum()
        total.backward()
        results.append((total.detach(), leaf.grad))
    assert results[0][1].isfinite().all() and results[0][1].abs().max() > 1e-4
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", sorted(BATCH_COUPLED))
def test_sorting_losses_do_depend_on_the_cut_as_documented(loss_type: str) -> None:
    loss, batch = PreferenceLoss(loss_type), tokens()
    whole = loss(pairs_from_tokens(**batch)).total(6)
    parts = sum(loss(pairs_from_tokens(**part)).total(6) for part in cut(batch, 2, 2, 2))
    assert (whole - parts).abs() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", sorted(PAIR_LOSSES))
def test_losses_and_gradients_stay_finite_far_out_and_on_empty_completions(loss_type: str, dtype: torch.dtype) -> None:
    values = torch.tensor([-3e4, -800.0, -1e-4, 0.0, 0.0], dtype=dtype)
    leaves = [values.clone().requires_grad_(), values.flip(0).clone().requires_grad_()]
    zero, lengths = torch.zeros(5, dtype=dtype), torch.tensor([3, 2, 1, 1, 0])
    pairs = Pairs(*leaves, lengths, lengths.flip(0), zero, zero, surplus=(zero, zero))
    terms = PreferenceLoss(loss_type, nll_loss_coef=1.0)(pairs)
    terms.total().backward()
    assert terms.losses.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert all(value.isfinite().all() for value in terms.metrics.values())


@pytest.mark.parametrize("f_divergence", sorted(F_DIVERGENCES))
def test_divergences_stay_finite_and_agree_near_the_reference(f_divergence: str) -> None:
    loss = PreferenceLoss(f_divergence=f_divergence)
    extreme = torch.tensor([-5e3, 5e3])
    lengths, zero = torch.ones(2, dtype=torch.long), torch.zeros(2)
    assert loss(Pairs(extreme, -extreme, lengths, lengths, zero, zero)).losses.isfinite().all()
    # f'(u) has slope f''(1) = 1 in log u at the reference for all but Jensen-Shannon, where it is 1/2.
    near = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    margin = loss(Pairs(near, -near, lengths, lengths, zero.double(), zero.double())).losses.diff() / 1e-4
    slope = 0.5 if f_divergence == "js_divergence" else 1.0
    torch.testing.assert_close(margin, torch.tensor([0.2 * slope], dtype=torch.float64), rtol=1e-4, atol=0)


def test_alpha_divergence_ends_in_forward_kl() -> None:
    pairs = pairs_from_tokens(**tokens())
    forward = PreferenceLoss(f_divergence="forward_kl")(pairs).losses
    alpha = PreferenceLoss(f_divergence="alpha_divergence", f_alpha=1.0)(pairs).losses
    torch.testing.assert_close(alpha, forward)


def test_no_pairs_and_no_tokens_give_a_loss_of_zero() -> None:
    empty = {name: value[:0] for name, value in tokens().items()}
    assert PreferenceLoss("orpo")(pairs_from_tokens(**empty)).total() == 0
    masked = tokens()
    masked["chosen_mask"] = torch.zeros_like(masked["chosen_mask"])
    terms = PreferenceLoss("simpo", nll_loss_coef=1.0)(pairs_from_tokens(**masked))
    assert terms.nll_counts.sum() == 0
    torch.testing.assert_close(terms.total(), terms.losses.mean())


@pytest.mark.parametrize(
    ("loss_type", "ipo", "expected"),
    [
        ("dpo", False, {"sigmoid": 1.0}),
        ("DPO", True, {"ipo": 1.0}),
        ("ipo", True, {"ipo": 1.0}),
        ("sppo", False, {"sppo_hard": 1.0}),
        ({"dpo": 0.8, "sigmoid": 0.1, "sft": 1.0}, False, {"sigmoid": 0.9, "sft": 1.0}),
    ],
)
def test_aliases(loss_type, ipo: bool, expected: dict[str, float]) -> None:
    assert resolve_loss_type(loss_type, ipo) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simop"}, "did you mean 'simpo'"),
        ({"loss_type": {}}, "empty"),
        ({"beta": 0.0}, "above 0"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "only acts on"),
        ({"loss_type": "simpo", "f_divergence": "forward_kl"}, "only defined for"),
        ({"f_divergence": "kl"}, "reverse_kl"),
        ({"nll_norm": "mean"}, "token"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**options)


def test_ipo_does_not_override_another_loss() -> None:
    with pytest.raises(ValueError, match="contradicts"):
        resolve_loss_type("simpo", ipo=True)


def test_a_missing_reference_is_named_and_reference_free_losses_do_without() -> None:
    batch = {name: value for name, value in tokens().items() if not name.startswith("ref_")}
    pairs = pairs_from_tokens(**batch)
    for name in ("simpo", "cpo", "orpo"):
        assert PreferenceLoss(name)(pairs).total().isfinite()
    with pytest.raises(ValueError, match="hinge"):
        PreferenceLoss({"hinge": 1.0, "simpo": 1.0})(pairs)
    with pytest.raises(ValueError, match="pairs_from_tokens"):
        zero = torch.zeros(6, dtype=torch.float64)
        PreferenceLoss("ld_dpo")(replace(pairs, ref_chosen_logps=zero, ref_rejected_logps=zero))


def test_orpo_and_cpo_come_with_their_nll_term_and_simpo_without() -> None:
    pairs = pairs_from_tokens(**tokens())
    coefficients = {name: PreferenceLoss(name)(pairs).nll_coef for name in ("orpo", "cpo", "simpo", "sigmoid")}
    assert coefficients == {"orpo": 1.0, "cpo": 1.0, "simpo": 0.0, "sigmoid": 0.0}
    assert PreferenceLoss({"orpo": 1.0, "sft": 0.5}, nll_loss_coef=0.2)(pairs).nll_coef == pytest.approx(0.7)


def test_ld_alpha_one_is_dpo_and_the_surplus_of_equal_lengths_is_nothing() -> None:
    pairs = pairs_from_tokens(**tokens())
    dpo = PreferenceLoss()(pairs).losses
    torch.testing.assert_close(PreferenceLoss("ld_dpo", ld_alpha=1.0)(pairs).losses, dpo)
    differ = pairs.chosen_lengths != pairs.rejected_lengths
    moved = (PreferenceLoss("ld_dpo", ld_alpha=0.0)(pairs).losses - dpo).abs() > 1e-9
    assert differ.any() and torch.equal(moved, differ)


def test_half_precision_log_probs_are_summed_in_float32() -> None:
    logps = torch.full((1, 4096), -0.01, dtype=torch.bfloat16)
    total = sequence_logps(logps, torch.ones(1, 4096))
    torch.testing.assert_close(total, logps[0, 0].float().expand(1) * 4096)


def test_a_share_of_a_nll_term_is_a_share_and_not_one() -> None:
    """Where half of a step's chosen answers are empty, a pair has half a term; over none the NLL is 0."""
    terms = PreferenceLoss(nll_loss_coef=2.0, nll_norm="sequence")(pairs_from_tokens(**tokens(1)))
    expected = terms.losses.sum() + 2.0 * terms.nll_sums.sum() / 0.5
    torch.testing.assert_close(terms.total(1, 0.5), expected)
    empty = tokens(1) | {"chosen_mask": torch.zeros(1, 9, dtype=torch.bool)}
    none = PreferenceLoss(nll_loss_coef=2.0, nll_norm="sequence")(pairs_from_tokens(**empty))
    torch.testing.assert_close(none.total(1, 0.0), none.losses.sum())


def test_alpha_divergence_begins_at_the_reverse_kl() -> None:
    """The alpha is that of u^-alpha in Wang et al. (2023), not TRL's, which is 1 minus it."""
    pairs = pairs_from_tokens(**tokens())
    alpha = PreferenceLoss(f_divergence="alpha_divergence", f_alpha=1e-7)(pairs).losses
    torch.testing.assert_close(alpha, PreferenceLoss()(pairs).losses, rtol=1e-5, atol=0)
