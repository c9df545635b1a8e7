"""The layout of a run: what the user says, what the models allow, and that all ranks do the same."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from llm_trainer import SFTTrainer
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.layout import AS_IT_CAME, Layout, Packing
from llm_trainer.train.rows import LaidOut


class Engine:
    device = torch.device("cpu")
    precision = staticmethod(nullcontext)


class Own(SFTTrainer):
    def _compute_loss(self, outputs: Any, batch: Any) -> Any:
        return super()._compute_loss(outputs, batch)


def laid_out(wanted: str, source: Any = None, kind: type = SFTTrainer, together: bool = False) -> LaidOut:
    trainer: Any = object.__new__(kind)
    return LaidOut(wanted, source or LoaderSteps([{}]), trainer, Engine(), together)  # type: ignore[arg-type]


def fails() -> Packing:
    raise AssertionError("this must not be tried")


def test_models_are_tried_only_where_it_matters() -> None:
    for rows in (laid_out("none"), laid_out("auto", kind=Own)):
        rows.reads_rows(fails)
        assert not rows.layout.flat
    assert laid_out("none").layout == AS_IT_CAME


def test_the_last_model_that_reads_the_rows_has_a_say_as_well_as_the_first() -> None:
    source = LoaderSteps([{}])
    rows = laid_out("auto", source)
    rows.reads_rows(Packing)
    assert rows.layout.flat and source.layout is rows.layout
    rows.reads_rows(lambda: Packing("Teacher: it looks back"))
    assert not rows.layout.flat and source.layout.by_length
    assert rows.layout.choice is not None and rows.layout.choice.why == "Teacher: it looks back"


def test_ranks_do_as_the_main_process_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the weights may be missing: nothing is tried there."""
    box: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object", lambda value: box[0] if box else box.append(value) or value)
    layouts = []
    for is_main in (True, False):
        monkeypatch.setattr(dist, "is_main", lambda is_main=is_main: is_main)
        rows = laid_out("auto", together=True)
        rows.reads_rows((lambda: Packing("M: it looks back")) if is_main else fails)
        layouts.append(rows.layout)
    assert layouts[0] == layouts[1] and layouts[0].by_length


def test_a_stream_lays_out_its_rows_itself() -> None:
    class Rows:
        lengths, file_sizes = torch.ones(2).numpy(), [2]

    def stream(**how: Any) -> SampleStream:
        return SampleStream(Rows(), list, rows_per_step=2, batch_size=2, **how)  # type: ignore[arg-type]

    padded = laid_out("auto", stream())
    padded.reads_rows(fails)
    assert padded.layout == AS_IT_CAME
    flat = laid_out("auto", stream(flat=True))
    with pytest.raises(ValueError, match="rows laid flat: M: it looks back"):
        flat.reads_rows(lambda: Packing("M: it looks back"))
    known = laid_out("auto", stream(flat=True, layout=Layout(flat=True)))
    known.reads_rows(fails)  # whoever made the stream has tried the trained model
    with pytest.raises(ValueError, match="rows laid flat: Reference: it looks back"):
        known.reads_rows(lambda: Packing("Reference: it looks back"))


def test_an_algorithm_that_does_not_take_flat_rows_is_not_given_any() -> None:
    with pytest.raises(ValueError, match="packing='flat': Own does not say .* expected `takes_flat = True`"):
        laid_out("flat", kind=Own)
