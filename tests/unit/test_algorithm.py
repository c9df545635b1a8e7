"""Which algorithms let the machine cut and lay out their micro-batches."""

from typing import Any

import pytest

from llm_trainer import BaseTrainer, DPOTrainer, SFTTrainer, Trainer, get_trainer_class
from llm_trainer.layout import OF_MICRO_BATCHES, takes_flat


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "kto", "reward"])
def test_our_own_algorithms_take_flat_batches(name: str) -> None:
    assert takes_flat(get_trainer_class(name))


@pytest.mark.parametrize("method", OF_MICRO_BATCHES)
def test_who_overrides_a_method_of_micro_batches_gets_them_as_they_come(method: str) -> None:
    own = type("Own", (DPOTrainer,), {method: lambda self, *args: None})
    assert not takes_flat(own)
    assert not takes_flat(type("Below", (own,), {}))


def test_who_overrides_one_may_say_that_it_takes_them_flat() -> None:
    class Own(SFTTrainer):
        takes_flat = True

        def _loss_weight(self, batch: Any) -> float:
            return 0.5 * super()._loss_weight(batch)

    class Below(Own):
        """Says nothing, and writes nothing that sees a micro-batch."""

        def _count_tokens(self, batch: Any) -> int:
            return 1

    class Further(Below):
        """Speaks for itself again."""

        def _compute_loss(self, outputs: Any, batch: Any) -> Any:
            return super()._compute_loss(outputs, batch)

    assert takes_flat(Own) and takes_flat(Below) and not takes_flat(Further)


def test_a_class_may_take_it_back() -> None:
    assert not takes_flat(type("Own", (Trainer,), {"takes_flat": False}))


def test_an_algorithm_of_its_own_has_its_batches_as_they_come() -> None:
    assert not takes_flat(BaseTrainer)
