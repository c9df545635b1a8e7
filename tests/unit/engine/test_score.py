"""One pass over a dataset in one process: every number is its row's, whatever the layout and the budget."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.engine.out_of_memory import OutOfMemoryError
from llm_trainer.engine.score import Scoring, by_row
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.state import Stopped

LENGTHS = [3, 9, 1, 4, 9, 2, 6]


class Ragged:
    """Rows whose ids are their number, ten times, plus their place."""

    lengths = np.array(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = LENGTHS[index]
        ids = 10 * index + np.arange(size)
        return {"input_ids": ids, "trained": np.ones(size, dtype=bool), "document_lengths": [size]}


def places(batch: Any) -> dict[str, Tensor]:
    """Of every token its id and half of it; of every row its first id, and how many rows it came with."""
    ids = batch["input_ids"]
    firsts = ids[:, 0]
    if "document_lengths" in batch:
        firsts = ids[0, batch["position_ids"][0] == 0]
    together = torch.full((len(firsts),), len(firsts))
    return {"ids": ids, "half": (ids / 2).bfloat16(), "first": firsts, "together": together}


def scoring(tokens: int | None = None, module: nn.Module | None = None, **more: Any) -> Scoring:
    return Scoring(TorchEngine(torch.device("cpu")), module or nn.Identity(), tokens, **more)


@pytest.mark.parametrize("collate", [collate_padded, collate_flat])
@pytest.mark.parametrize("tokens", [None, 1, 9, 20])
def test_every_row_has_its_own_numbers_in_the_order_of_the_dataset(collate: Any, tokens: int | None) -> None:
    found = scoring(tokens)(Ragged(), collate, places)
    assert [*found] == ["ids", "half", "first", "together"]
    for row, size in enumerate(LENGTHS):
        assert found["ids"][row].tolist() == [10 * row + place for place in range(size)]
        assert found["half"][row].dtype == np.float32 and found["half"][row].shape == (size,)
        assert found["first"][row] == 10 * row and found["first"][row].shape == ()
    most_rows = {None: 7, 1: 1, 9: 2, 20: 3}  # of similar lengths; with 9 tokens 9 | 9 | 6 | 4 3 | 2 1
    assert max(found["together"]) == most_rows[tokens]


def test_nothing_drops_out_and_every_part_is_as_it_was_afterwards() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    module[1].eval()
    module[1][0].train()
    modes = [part.training for part in module.modules()]

    def kept(batch: Any) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {"kept": module(torch.ones(batch["input_ids"].shape))}

    found = scoring(module=module)(Ragged(), collate_padded, kept)
    assert all((values == 1).all() for values in found["kept"])
    assert [part.training for part in module.modules()] == modes and len(set(modes)) == 2


def test_what_does_not_fit_is_done_again_with_half_of_the_tokens() -> None:
    said: list[str] = []

    def hungry(batch: Any) -> dict[str, Tensor]:
        if batch["input_ids"].numel() > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return places(batch)

    found = scoring(40, say=said.append)(Ragged(), collate_padded, hungry)
    assert [int(first) for first in found["first"]] == [10 * row for row in range(len(LENGTHS))]
    assert len(said) == 2 and "4 rows of 36 tokens with padding (CUDA out of memory)" in said[0]
    assert "at most 18 tokens" in said[0] and "at most 9 tokens" in said[1]


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_so() -> None:
    def starving(batch: Any) -> dict[str, Tensor]:
        raise MemoryError("no memory")

    with pytest.raises(
        OutOfMemoryError, match=r"1 row of 9 tokens .* A single row cannot be cut; expected rows that fit"
    ):
        scoring()(Ragged(), collate_padded, starving)

    class Known(Ragged):
        def place(self, index: int) -> str:
            return f"rows.jsonl, row {index + 1}"

    with pytest.raises(OutOfMemoryError, match=r"memory: rows.jsonl, row [25] of 9 tokens with padding \(no memory\)"):
        scoring()(Known(), collate_padded, starving)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    def broken(batch: Any) -> dict[str, Tensor]:
        raise RuntimeError("shapes do not match")

    module = nn.Dropout()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        scoring(module=module)(Ragged(), collate_padded, broken)
    assert module.training


def test_a_signal_ends_it() -> None:
    seen: list[int] = []

    def noted(batch: Any) -> dict[str, Tensor]:
        seen.append(1)
        return places(batch)

    with pytest.raises(Stopped):
        scoring(9, stop_requested=lambda: len(seen) == 2)(Ragged(), collate_padded, noted)
    assert len(seen) == 2


def test_a_dataset_without_rows_has_no_numbers() -> None:
    class Empty(Ragged):
        lengths = np.array([], dtype=int)

    assert scoring()(Empty(), collate_padded, places) == {}


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 6), (2, 3, 4), ()])
def test_numbers_that_belong_to_no_row_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'values' has the shape .* of 2 rows with 5 tokens, the longest 3; expected"):
        by_row({"values": torch.zeros(shape)}, [2, 3])
