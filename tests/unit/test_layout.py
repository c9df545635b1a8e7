"""Which layout is chosen, and when laying rows flat pays."""

import pytest

from llm_trainer.layout import AS_IT_CAME, Layout, Packing, choose_layout, couples_rows, given_layout, made_flat


@pytest.mark.parametrize(
    ("lengths", "dense_width", "pays"),
    [
        ([10, 10, 10], 0, False),  # no padding
        ([10, 10, 9], 0, True),
        ([10, 10, 9], 4, False),  # attention of 29 x 29 tokens costs more than a tenth of three times 10 x 10
        ([100, 10, 10, 10], 512, True),
        ([512] * 7 + [480], 512, False),
        ([512, *[100] * 7], 512, True),
    ],
)
def test_flat_pays_where_it_costs_less_than_padding(lengths: list[int], dense_width: int, pays: bool) -> None:
    assert Layout(flat=True, dense_width=dense_width).pays(lengths) == pays
    assert not AS_IT_CAME.pays(lengths)


def test_what_is_chosen_and_why() -> None:
    def choose(*packings: Packing, takes_flat: bool = True) -> Layout:
        return choose_layout(packings, takes_flat, "Own", "packing: none")

    flat = choose(Packing())
    assert flat.flat and not flat.by_length and not flat.counts_padding
    assert str(flat.choice) == "layout flat: rows end to end give the same numbers, tried out on two [packing=none]"
    loaded = choose_layout([Packing()], True, "Own", "packing: none", are_loaded=True)
    assert "two; as they come: batches not padded on the right" in str(loaded.choice)
    dense = choose(Packing(dense_width=32), Packing(dense_width=64))
    assert (dense.flat, dense.dense_width, dense.by_length, dense.counts_padding) == (True, 64, True, True)
    padded = choose(Packing(), Packing(fault="M: it looks back"))
    assert not padded.flat and padded.by_length
    assert str(padded.choice).startswith("layout padded, rows of similar length together: M: it looks back")
    experts = choose(Packing(fault="M: it looks back", couples_rows=True))
    assert not experts.by_length, "what they contribute may depend on which rows share a micro-batch"
    own = choose(takes_flat=False)
    assert not own.flat and not own.by_length and own.choice is not None and "takes_flat" in own.choice.why


def test_who_asks_for_flat_rows_gets_them_or_an_error() -> None:
    assert given_layout([Packing(dense_width=32)], "packing='flat'") == Layout(flat=True)
    with pytest.raises(
        ValueError, match="packing='flat': M: it looks back; expected a model that scores .* Set packing to none"
    ):
        given_layout([Packing(), Packing("M: it looks back")], "packing='flat'")


def test_rows_are_coupled_by_batch_norm_inside_of_a_wrapper() -> None:
    from torch import nn

    assert couples_rows(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not couples_rows(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_what_looks_at_rows_as_they_are_made_gets_them_padded_unless_it_says_more() -> None:
    class Takes:
        takes_flat = True

        def _count_tokens(self) -> None: ...

    class Counts(Takes):
        def _count_tokens(self) -> None: ...

    class Says(Counts):
        takes_flat = True

    assert made_flat(Takes) == made_flat(Says) == Packing()
    assert made_flat(Counts).fault.startswith("Counts has a _count_tokens of its own, and does not say")
