"""What the reference cases do not say about the language-modelling losses."""

import pytest
import torch

from llm_trainer.losses.language import IGNORE, LanguageLoss
from plain_losses import cross_entropy, token_losses


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([[3, 1, IGNORE, 3, 5], [2, IGNORE, 3, 0, IGNORE]])


def test_losses_stand_at_their_labels() -> None:
    logits, labels = batch()
    losses = token_losses(logits, labels)
    assert (losses != 0).tolist() == [[False, True, False, True, True], [False, False, True, True, False]]
    assert losses[0, 3].item() == pytest.approx(-logits[0, 2].log_softmax(-1)[3].item(), abs=1e-12)


def test_critical_tokens_weigh_more_in_the_sum_but_not_in_the_count() -> None:
    logits, labels = batch()
    plain = token_losses(logits, labels)
    weighted = cross_entropy(logits, labels, LanguageLoss(critical_tokens=(3, 0), critical_alpha=4.0))
    expected = (plain[0, 1] + 4 * plain[0, 3] + plain[0, 4] + 4 * plain[1, 2] + 4 * plain[1, 3]) / 5
    assert weighted.item() == pytest.approx(expected.item(), abs=1e-12)


def test_nothing_supervised_is_zero_with_zero_gradients_even_over_nan() -> None:
    logits = torch.full((1, 3, 4), torch.nan, requires_grad=True)
    loss = cross_entropy(
        logits, torch.tensor([[2, IGNORE, IGNORE]]), LanguageLoss(z_loss_coef=0.1, label_smoothing=0.1)
    )
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_half_precision_is_scored_in_float32() -> None:
    logits, labels = batch()
    low = logits.bfloat16()
    assert token_losses(low, labels).dtype == torch.float32
    assert torch.equal(token_losses(low, labels), token_losses(low.float(), labels))


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss_coef": -1e-4}])
def test_impossible_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LanguageLoss(**options)  # type: ignore[arg-type]
