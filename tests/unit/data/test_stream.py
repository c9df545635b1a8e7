"""The order of samples: complete, resumable anywhere, and the same however a step is cut."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from llm_trainer.data.stream import Permutation, SampleStream


@dataclass
class Numbers:
    """Sample i is the number i, and it has a length."""

    file_sizes: list[int]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self):
        self.lengths = 1 + np.arange(sum(self.file_sizes)) % 7

    def __getitem__(self, index):
        return index


def stream(sizes=(10, 1, 12), rows_per_step=4, **options):
    return SampleStream(Numbers(list(sizes)), list, rows_per_step=rows_per_step, **{"batch_size": 2, **options})


def steps_of(source, epoch=0, position=0):
    """Each step as a sorted list of its samples; filler left out."""
    return [
        sorted(sample for micro_batch in step if micro_batch.counts for sample in micro_batch.batch)
        for step, _ in source.steps(epoch, position)
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_budget_that_changes_between_two_steps_changes_the_rows_of_none(num_workers):
    source = stream(rows_per_step=8, micro_batch_tokens=40, num_workers=num_workers)
    found, sizes = [], []
    for step, _ in source.steps(0, 0):
        found.append(sorted(sample for micro_batch in step for sample in micro_batch.batch))
        sizes.append(len(step))
        source.micro_batch_tokens = 7
    assert found == steps_of(stream(rows_per_step=8)) and sizes[0] < 4 < sizes[1]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permutation_visits_everything_once_and_in_another_order_for_another_seed(size):
    order = Permutation(size, 1)(np.arange(size))
    assert sorted(order) == list(range(size))
    if size > 10:
        assert (order != np.arange(size)).mean() > 0.8
        assert (order != Permutation(size, 2)(np.arange(size))).any()


def test_permutation_is_evaluated_at_any_index_of_a_huge_range():
    order = Permutation(10**12, 3)
    assert order(np.array([10**11])) == order(np.array([5, 10**11]))[1]


def test_an_epoch_has_every_sample_once_and_files_one_after_another():
    rows = stream().order(0, 0, 23)
    assert sorted(rows) == list(range(23))
    assert sorted(rows[:10]) == list(range(10)) and rows[10] == 10
    assert list(rows) != list(stream().order(1, 0, 23))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 9}, {"micro_batch_tokens": 9, "flat": True}])
def test_a_step_has_the_same_samples_however_it_is_cut(world_size, options):
    together = [sorted(rows) for rows in zip(*_by_rank(world_size, options), strict=True)]
    assert [sorted(sum(rows, [])) for rows in together] == steps_of(stream())


def _by_rank(world_size, options):
    return [steps_of(stream(rank=rank, world_size=world_size, **options)) for rank in range(world_size)]


def test_a_rank_without_rows_gets_filler():
    last = [
        list(stream(rank=rank, world_size=4).steps(0, 0))[-1][0] for rank in range(4)
    ]  # 23 rows: 3 in the last step
    assert [step[0].counts for step in last] == [True, True, True, False]


@pytest.mark.parametrize("position", [0, 3, 11, 22])
def test_resume_is_a_seek(position):
    rest = sum(steps_of(stream(rows_per_step=1), 2, position), [])
    assert rest == stream().order(2, position, 23).tolist()


def test_workers_change_nothing():
    assert steps_of(stream(num_workers=2)) == steps_of(stream())


def test_token_budget_is_kept():
    for step, _ in stream(rows_per_step=12, micro_batch_tokens=14).steps(0, 0):
        for micro_batch in step:
            batch = micro_batch.batch
            lengths = [1 + i % 7 for i in batch]
            assert len(batch) == 1 or len(batch) * max(lengths) <= 14


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_of_files_say_how_often_their_samples_come(shuffle):
    weighted = stream((10, 4, 12), file_weights=[2.5, 1.0, 0.5], shuffle=shuffle)
    assert weighted.size() == len(weighted) == 25 + 4 + 6 and weighted.num_steps() == 9
    order = weighted.order(0, 0, 35)
    times = np.bincount(order, minlength=26)
    assert sorted(times[:10]) == [2] * 5 + [3] * 5 and set(times[10:14]) == {1}
    assert sorted(times[14:]) == [0] * 6 + [1] * 6
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert (list(order[:10]) == list(order[10:20])) is not shuffle
    assert (set(order[29:]) == set(weighted.order(1, 29, 35))) is not shuffle  # another half in the next epoch
    whole = steps_of(weighted)
    assert whole[3:] == steps_of(weighted, position=12)  # resume is a seek, into the second turn too
    assert [list(weighted.order(0, i, i + 1)) for i in range(35)] == [[sample] for sample in order]


def test_weights_of_one_change_nothing():
    assert np.array_equal(stream().order(3, 0, 23), stream(file_weights=[1.0, 1.0, 1.0]).order(3, 0, 23))


def test_files_are_interleaved_by_their_visits_at_any_position():
    rows = stream([300, 100, 50], file_weights=[0.5, 1.0, 6.0], interleave=True)
    assert rows.visits == [150, 100, 300] and len(rows) == 550
    whole = rows.order(0, 0, 550)
    for start, stop in ((0, 7), (7, 450), (123, 124), (450, 550)):
        assert rows.order(0, start, stop).tolist() == whole[start:stop].tolist()
    counts = np.bincount(whole, minlength=450)
    assert sorted(counts[:300].tolist()) == [0] * 150 + [1] * 150  # half of the first file, each at most once
    assert set(counts[300:400]) == {1} and set(counts[400:]) == {6}
    files = np.searchsorted([300, 400], whole, side="right")
    for start in range(0, 550, 110):  # in every part of the epoch, about the same mixture
        shares = np.bincount(files[start : start + 110], minlength=3) / 110
        assert np.abs(shares - np.array([150, 100, 300]) / 550).max() < 0.15
    again = rows.order(1, 0, 550)
    assert again.tolist() != whole.tolist()
    assert set(again[again < 300]) != set(whole[whole < 300]), "another half in another epoch"


def test_easy_samples_come_first_for_as_many_epochs_as_asked():
    hardness = np.array([5, 1, 3, 1, 2, 9, 1, 4])
    rows = stream([5, 3], easy_first=hardness, easy_epochs=2)
    plain = stream([5, 3])
    for epoch in (0, 1):
        order = rows.order(epoch, 0, 8)
        assert hardness[order].tolist() == [1, 1, 1, 2, 3, 4, 5, 9]
        assert rows.order(epoch, 3, 6).tolist() == order[3:6].tolist()
        ties = [i for i in plain.order(epoch, 0, 8).tolist() if hardness[i] == 1]
        assert order[:3].tolist() == ties
    assert rows.order(2, 0, 8).tolist() == plain.order(2, 0, 8).tolist()


def test_a_position_in_another_order_is_refused():
    state = stream([6, 4], interleave=True).state_dict()
    stream([6, 4], interleave=True, batch_size=5).load_state_dict(state)
    stream([6, 4]).load_state_dict({})  # of an older version
    for other in ({}, {"interleave": True, "shuffle": False}, {"interleave": True, "file_weights": [1 / 3, 2.0]}):
        with pytest.raises(ValueError, match="samples in another order"):
            stream([6, 4], **other).load_state_dict(state)
    hard, other = np.arange(10), np.arange(10)[::-1]
    stream([6, 4], easy_first=hard).load_state_dict(stream([6, 4], easy_first=hard.astype(float)).state_dict())
    with pytest.raises(ValueError, match=r"another order \(easy_first differ\)"):
        stream([6, 4], easy_first=other).load_state_dict(stream([6, 4], easy_first=hard).state_dict())
