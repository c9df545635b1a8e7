"""How many tokens a micro-batch may have: whose word counts, how it shrinks, what a checkpoint holds of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.data.collate import collate_padded
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.stream import SampleStream
from llm_trainer.train.budget import Budget, next_size, size_below

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import Rows, make_trainer


def stream(**options: Any) -> SampleStream:
    """11 steps of 6 rows, each of 4 to 19 tokens."""
    return SampleStream(Rows(62), collate_padded, **{"rows_per_step": 6, "batch_size": 2, **options})


def largest(source: SampleStream) -> int:
    """Tokens of the largest micro-batch with more than one row, padding included."""
    sizes = []
    for step, _ in source.steps(0, 0):
        sizes += [m.batch["input_ids"].numel() for m in step if len(m.batch["input_ids"]) > 1]
    return max(sizes)


def test_sizes_are_few():
    assert sorted({next_size(n) for n in range(1, 100)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert [size_below(n) for n in (0, 1, 5, 11.9, 12, 4095, 4096, 9000)] == [1, 1, 4, 8, 12, 3072, 4096, 8192]
    for n in range(1, 500):
        assert size_below(n) <= n <= next_size(n) and size_below(next_size(n)) == next_size(n)


def test_the_users_word_counts_and_the_streams_own_before_it():
    assert Budget(64, [stream()]).tokens == 64
    assert Budget(64, [stream(micro_batch_tokens=32)]).tokens == 32
    assert Budget(64, [stream(micro_batch_tokens=None)]).tokens is None
    train, evaluation = stream(), stream(micro_batch_tokens=None)
    budget = Budget(64, [train, evaluation])
    assert (train.micro_batch_tokens, evaluation.micro_batch_tokens) == (64, None)
    assert budget.is_settled and not budget.is_automatic and budget.choice() is None


def test_what_is_found_is_for_training_and_evaluation_alike():
    train, evaluation, whole = stream(), LoaderSteps([torch.zeros(2, 3)]), largest(stream())
    budget = Budget("auto", [train, evaluation])
    assert not budget.is_settled and budget.tokens is None and largest(train) == whole  # by rows until it is found
    budget.settle(24, "the longest rows take 3 GB")
    assert train.micro_batch_tokens == evaluation.micro_batch_tokens == 24 and largest(train) <= 24 < whole
    choice = budget.choice()
    assert choice is not None and choice.value == "24 tokens" and choice.why == "the longest rows take 3 GB"


@pytest.mark.parametrize("configured", [None, 64, "auto"])
def test_it_shrinks_to_the_longest_row(configured):
    source = stream()
    budget = Budget(configured, [source, stream(micro_batch_tokens=None)])
    sizes = []
    while budget.shrink(largest(source), longest=19):
        sizes.append(budget.tokens)
        assert largest(source) <= sizes[-1]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == 19
    assert not budget.shrink(19, longest=19) and budget.tokens == 19
    choice = budget.choice()
    assert choice is not None and "did not fit" in choice.why
    assert Budget(configured, [stream()], may_cut=False).shrink(38, longest=19) == (configured == 64)


def test_a_checkpoint_says_what_was_in_force():
    found = Budget("auto", [stream()], "cpu, 24 GB")
    found.settle(48, "fastest")
    found.shrink(40, 19)
    state = json.loads(json.dumps(found.state_dict()))

    again = Budget("auto", [source := stream()], "cpu, 24 GB")
    again.load_state_dict(state)
    assert (again.tokens, again.is_settled, source.micro_batch_tokens) == (24, True, 24)

    for other in (Budget("auto", [stream()], "cpu, 12 GB"), Budget("auto", [stream()], "cpu, 24 GB")):
        other.load_state_dict(state if other.machine == "cpu, 12 GB" else None)
        assert not other.is_settled and other.tokens is None  # found anew

    explicit = Budget(96, [stream()], "cpu, 24 GB")
    explicit.load_state_dict(state)
    assert explicit.tokens == 96
    explicit.shrink(96, 19)
    same, another = Budget(96, [stream()], "cpu, 24 GB"), Budget(64, [stream()], "cpu, 24 GB")
    for budget in (same, another):
        budget.load_state_dict(explicit.state_dict())
    assert (same.tokens, another.tokens) == (48, 64)


def test_a_run_goes_on_with_it_and_checkpoints_of_before_load(tmp_path: Path):
    """Cut anew in the middle of an epoch: every row is still seen, in the same steps."""
    trainer = make_trainer(tmp_path / "cut", max_epochs=1, max_steps=3)
    trainer.train()
    assert trainer.run.budget.shrink(30, 19)
    trainer.save_checkpoint()
    path = trainer.save_checkpoint(path=str(tmp_path / "one.pt"))

    other = make_trainer(tmp_path / "cut", max_epochs=1)
    other.load_checkpoint(path)
    assert other.run.budget.tokens == other.run.source.micro_batch_tokens == 19
    other.train()
    assert other.run.progress.tokens == Rows(62).lengths.sum() and other.run.progress.step == 8

    state = torch.load(path, weights_only=True)
    del state["budget"]
    torch.save(state, tmp_path / "older.pt")
    older = make_trainer(tmp_path / "older", max_epochs=1)
    older.load_checkpoint(str(tmp_path / "older.pt"))
    assert older.run.budget.tokens is None and older.run.progress.step == 3
