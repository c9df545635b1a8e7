"""Steps over a user's own loader: complete, resumable anywhere, dealt once; what cannot be is refused by name."""

import gc
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Subset, TensorDataset

from llm_trainer.data.collate import can_be_cut
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.layout import Layout


def loader(**options):
    return DataLoader(TensorDataset(torch.arange(21)), batch_size=2, **options)


def numbers(source, epoch=0, position=0):
    return [[micro_batch.batch[0].tolist() for micro_batch in step] for step, _ in source.steps(epoch, position)]


@pytest.mark.parametrize("generator", [False, True])
def test_a_shuffling_loader_resumes_in_the_middle_of_an_epoch(generator):
    def fresh():
        seeded = torch.Generator().manual_seed(5) if generator else None
        return LoaderSteps(loader(shuffle=True, generator=seeded), accumulation=2, seed=7)

    whole = numbers(fresh(), epoch=3)
    assert numbers(fresh(), epoch=3, position=6) == whole[3:]
    assert numbers(fresh(), epoch=4) != whole
    assert sorted(sum(sum(whole, []), [])) == list(range(21))


def test_resume_of_a_loader_does_not_load_what_came_before():
    class Counting(TensorDataset):
        loaded = 0

        def __getitem__(self, index):
            Counting.loaded += 1
            return super().__getitem__(index)

    source = LoaderSteps(DataLoader(Counting(torch.arange(100)), batch_size=1))
    assert len(numbers(source, position=98)) == 2 and Counting.loaded == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_micro_batches_of_a_plain_loader(world_size):
    ranks = [LoaderSteps(loader(), accumulation=2, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [step for rank in ranks for step, _ in rank.steps(0, 0)]
    samples = [s for step in seen for micro_batch in step if micro_batch.counts for s in micro_batch.batch[0].tolist()]
    assert sorted(samples) == list(range(21))
    assert len({len(list(rank.steps(0, 0))) for rank in ranks}) == 1


def test_a_distributed_sampler_is_left_to_deal():
    sampler = DistributedSampler(range(21), num_replicas=2, rank=1, shuffle=False)
    source = LoaderSteps(DataLoader(torch.arange(21), batch_size=1, sampler=sampler), rank=1, world_size=2)
    assert [step[0].batch.item() for step, _ in source.steps(0, 0)][:3] == [1, 3, 5]


def test_padded_batches_are_cut_anew_by_a_token_budget():
    lengths = torch.tensor([3, 9, 2, 8])
    mask = (torch.arange(9) < lengths[:, None]).long()
    batch = {"input_ids": mask * torch.arange(1, 10), "labels": torch.where(mask == 1, 5, -100), "attention_mask": mask}
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    ((micro_batches, _),) = LoaderSteps(halves, accumulation=2, micro_batch_tokens=18).steps(0, 0)
    step = [micro_batch.batch for micro_batch in micro_batches]
    assert sorted(tuple(b["input_ids"].shape) for b in step) == [(2, 3), (2, 9)]
    assert sum(int((b["labels"] != -100).sum()) for b in step) == int(lengths.sum())


def test_an_iterator_without_length_is_fine():
    class Endless:
        def __iter__(self):
            return iter([torch.zeros(1)] * 3)

    source = LoaderSteps(Endless())
    assert source.num_steps() is None and len(list(source.steps(0, 1))) == 2


class Noisy(Dataset):
    """Numbers with noise from all global generators, and the process that loaded them."""

    loaded = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        Noisy.loaded += 1
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor([index, os.getpid(), *noise], dtype=torch.float64)


def rows(source, epoch=0, position=0):
    """The rows of an epoch, one after the other."""
    steps = [step for step, _ in source.steps(epoch, position)]
    return [row for step in steps for micro_batch in step if micro_batch.counts for row in micro_batch.batch.tolist()]


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_noise_of_loading_is_that_of_the_position_and_leaves_other_noise_alone():
    def fresh(seed):
        seed_everything(seed)
        return LoaderSteps(DataLoader(Noisy(), batch_size=2, shuffle=True), seed=3)

    whole = rows(fresh(1), epoch=1)
    assert rows(fresh(2), epoch=1, position=2) == whole[4:]
    assert whole[0][2:] != rows(fresh(3), epoch=0)[0][2:]
    rows(fresh(4))
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    seed_everything(4)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def test_persistent_workers_are_kept_from_epoch_to_epoch():
    loader = DataLoader(Noisy(), batch_size=2, num_workers=2, persistent_workers=True)
    source = LoaderSteps(loader)
    workers = [{row[1] for row in rows(source, epoch)} for epoch in range(2)]
    assert workers[0] == workers[1] and len(workers[0]) == 2 and os.getpid() not in workers[0]
    assert loader.worker_init_fn is None  # what the user gave is as it was
    next(source.steps(2, 0))  # left in the middle
    gc.disable()
    try:
        del source
        for worker in workers[0]:
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
    finally:
        gc.enable()


def test_a_rank_loads_only_its_own_micro_batches():
    Noisy.loaded = 0
    source = LoaderSteps(DataLoader(Noisy(), batch_size=2, shuffle=True), rank=1, world_size=3)
    assert len(rows(source)) == Noisy.loaded == 4


def test_a_loader_that_does_something_of_its_own_with_batches_does_it_after_a_resume_too():
    class Negative(DataLoader):
        def __iter__(self):
            return (-batch for batch in super().__iter__())

    def fresh():
        return LoaderSteps(Negative(torch.arange(1, 10), batch_size=2, shuffle=True), seed=1)

    whole = rows(fresh(), epoch=1)
    assert sorted(whole) == list(range(-9, 0)) and rows(fresh(), 1, 2) == whole[4:]


def test_what_can_be_read_only_once_is_refused_unless_it_is_read_once():
    with pytest.raises(ValueError, match=r"val_loader is a generator, which can be read only once.*max_steps"):
        LoaderSteps((torch.zeros(1) for _ in range(3)), name="val_loader")
    with pytest.raises(ValueError, match="is a map"):
        LoaderSteps(map(abs, [torch.zeros(1)]))
    source = LoaderSteps((torch.zeros(1) for _ in range(3)), read_once=True)
    assert len(list(source.steps(0, 0))) == 3
    with pytest.raises(ValueError, match="an earlier pass over it gave some: it can be read only once"):
        list(source.steps(1, 0))


def test_an_iterator_of_the_user_that_begins_anew_is_fine_and_one_that_does_not_is_an_error():
    class Iterator:
        def __init__(self, again):
            self.again, self.left = again, 2

        def __iter__(self):
            self.left = 2 if self.again else self.left
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            self.left -= 1
            return torch.zeros(1)

    source = LoaderSteps(Iterator(True))
    assert [len(list(source.steps(epoch, 0))) for epoch in range(3)] == [2, 2, 2]
    source = LoaderSteps(Iterator(False))
    assert len(list(source.steps(0, 0))) == 2
    with pytest.raises(ValueError, match="can be read only once"):
        list(source.steps(1, 0))


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="val_loader gave no micro-batch, it is empty"):
        list(LoaderSteps([], name="val_loader").steps(0, 0))
    with pytest.raises(ValueError, match="drop_last"):
        list(LoaderSteps(DataLoader(TensorDataset(torch.arange(3)), batch_size=4, drop_last=True)).steps(0, 0))


def test_another_micro_batch_size_is_refused_by_name():
    before, after = LoaderSteps(loader()), LoaderSteps(DataLoader(TensorDataset(torch.arange(42)), batch_size=4))
    assert before.size() == after.size()
    with pytest.raises(ValueError, match="micro-batches of 2 rows, and those of train_loader have 4 now"):
        after.load_state_dict(before.state_dict())


def test_other_batches_before_the_position_are_refused():
    def resume(batches: Any) -> None:
        source = LoaderSteps([torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)])
        steps = source.steps(0, 0)
        next(steps), next(steps)
        again = LoaderSteps(batches)
        again.load_state_dict(source.state_dict())
        list(again.steps(0, 2))

    resume([torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(7, 7)])
    with pytest.raises(ValueError, match="its first 2 micro-batches are others now"):
        resume([torch.zeros(4, 3), torch.ones(4, 3), torch.ones(4, 3)])
    with pytest.raises(ValueError, match="its first 2 micro-batches are others now"):
        resume([torch.zeros(2, 3)])


def test_a_part_of_the_data_on_every_rank_is_noticed():
    def asked(rank: int) -> list[int]:
        values: list[int] = []
        part = DataLoader(Subset(TensorDataset(torch.arange(20)), range(rank, 20, 2)), batch_size=2)
        source = LoaderSteps(part, rank=rank, world_size=2, largest=lambda number: values.append(number) or number)
        next(source.steps(0, 0))
        return values

    assert asked(0) == asked(0) != asked(1)


def test_a_rank_whose_share_ends_first_keeps_in_step():
    batches = [torch.full((1,), float(i)) for i in range(3)]
    others = iter([0, *[1] * 6, *[0] * 9])  # the seed; whether any rank has anything, and another step, five times
    short = LoaderSteps(
        batches, rank=1, world_size=2, is_sharded=True, largest=lambda number: max(number, next(others))
    )
    steps = [(step[0].batch.item(), step[0].counts, position) for step, position in short.steps(0, 0)]
    assert steps == [(0, True, 1), (1, True, 2), (2, True, 3), (2, False, 4), (2, False, 5)]


def test_what_is_not_dealt_here_must_not_be_said_to_be_sharded_and_old_positions_mean_nothing():
    from llm_trainer.data.loaders import as_step_source
    from llm_trainer.data.stream import SampleStream

    class One:
        lengths, file_sizes = np.array([1]), [1]

    with pytest.raises(ValueError, match="loader_is_sharded=True: found a SampleStream"):
        as_step_source(SampleStream(One(), list, rows_per_step=1, batch_size=1), is_sharded=True)
    with pytest.raises(ValueError, match="made by an earlier version"):
        LoaderSteps(loader()).load_state_dict({"kind": "LoaderSteps", "size": 11, "seed": 0})


def test_samplers_that_know_each_other_are_found_once():
    sampler = RandomSampler(range(9))
    sampler.sampler = BatchSampler(sampler, 2, False)
    assert sorted(rows(LoaderSteps(DataLoader(torch.arange(9), batch_sampler=sampler.sampler)))) == list(range(9))


def test_a_sampler_gets_its_generator_back_so_that_the_next_run_draws_as_the_first():
    sampler, generator = RandomSampler(range(9)), torch.Generator().manual_seed(4)
    seeded = RandomSampler(range(9), generator=generator)
    for one, own in ((sampler, None), (seeded, generator)):
        orders = [rows(LoaderSteps(DataLoader(torch.arange(9), sampler=one)), epoch=1) for _ in range(2)]
        assert orders[0] == orders[1] and one.generator is own
    steps = LoaderSteps(DataLoader(torch.arange(9), sampler=seeded)).steps(0, 0)
    next(steps)
    assert seeded.generator is not generator
    steps.close()
    assert seeded.generator is generator and generator.initial_seed() == 4


def padded(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded language batch; every token is its row's length."""
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.tensor(lengths)[:, None] * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def recut(batches: list[Any], **how: Any) -> list[Any]:
    source = LoaderSteps(batches, accumulation=len(batches), **{"micro_batch_tokens": "auto"} | how)
    source.micro_batch_tokens = how.get("micro_batch_tokens")
    ((step, _),) = source.steps(0, 0)
    return [micro_batch.batch for micro_batch in step]


def widths(batches: list[Any]) -> list[list[int]]:
    return [batch["attention_mask"].sum(1).tolist() for batch in batches]


def test_rows_of_a_step_come_together_by_length_where_the_layout_says_so():
    batches = [padded(3, 9, 2), padded(8, 1, 7), padded(4)]
    assert widths(recut(batches)) == [[3, 9, 2], [8, 1, 7], [4]]
    assert widths(recut(batches, layout=Layout(by_length=True))) == [[9, 8, 7], [3, 2, 4], [1]]


def test_rows_that_will_be_laid_flat_cost_what_they_hold():
    batches = [padded(9, 1, 1), padded(1, 8)]
    assert len(recut(batches, micro_batch_tokens=20, layout=Layout(flat=True))) == 1
    assert len(recut(batches, micro_batch_tokens=20)) == 2
    assert len(recut(batches, micro_batch_tokens=20, layout=Layout(flat=True, dense_width=8))) == 2


def test_joined_pairs_are_cut_between_pairs():
    pairs = padded(5, 6, 7, 2, 3, 4) | {"margin": torch.tensor([0.1, 0.2, 0.3])}
    cut = recut([pairs], micro_batch_tokens=16, sides=2)
    assert widths(cut) == [[7, 4], [6, 3], [5, 2]]
    assert [batch["margin"].tolist() for batch in cut] == [pytest.approx([x]) for x in (0.3, 0.2, 0.1)]
    flat = recut([pairs], micro_batch_tokens=16, sides=2, layout=Layout(flat=True))
    assert widths(flat) == [[7, 4], [5, 6, 2, 3]]


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), torch.ones(2, 3)),
        padded(3, 2) | {"names": ["a", "b"]},
        padded(3, 2) | {"pixel_values": torch.ones(2, 3, 4, 4)},
        {"input_ids": torch.ones(1, 5).long(), "document_lengths": torch.tensor([3, 2])},
        {"input_ids": torch.ones(2, 3).long()},  # nothing says what is padding
        padded(3, 2) | {"labels": torch.ones(2, 3).long()},  # padding is learned
        padded(3, 2) | {"desirable": torch.tensor([True, False])},  # answers are mismatched inside the batch
        {f"{part}_input_ids": torch.ones(2, 3).long() for part in ("prompt", "chosen", "rejected")},  # without masks
    ],
    ids=["tuple", "names", "images", "flat", "no mask", "padding", "kto", "parts"],
)
def test_what_is_not_certainly_the_same_stays_as_it_came(batch: Any):
    for how in ({"layout": Layout(by_length=True)}, {"layout": Layout(flat=True)}):
        found = recut([batch, batch], **how)
        assert found[0] is batch and found[1] is batch
    assert not can_be_cut([batch, batch])


def test_batches_with_other_keys_than_the_first_stay_as_they_came():
    weighed = padded(2, 1) | {"loss_weights": torch.ones(2, 2)}
    assert not can_be_cut([padded(3, 2), weighed]) and can_be_cut([weighed, weighed])
