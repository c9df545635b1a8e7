"""A step that runs out of memory: taken again, cut smaller, to the same curve; and what is said where that cannot help."""

import errno
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer
from llm_trainer.data.collate import collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine.out_of_memory import OutOfMemoryError, is_out_of_memory

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from table import Cell, data_of, differences, run
from victim import Rows, metric_lines
from victim import make_trainer as make_any_trainer

from failing_memory import OF_DEVICE, OF_HOST, FailingMemory, Fails, at_random


def make_trainer(folder: Path, **options: Any) -> Any:
    """Micro-batches of two rows, in evaluations of eight."""
    return make_any_trainer(folder, micro_batch_tokens=None, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OF_HOST,
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_says_that_memory_has_run_out(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("out of memory"), OSError(errno.ENOSPC, "No space left")]
)
def test_what_does_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def attach(memory: list[FailingMemory], fails: Fails, error: Exception = OF_HOST) -> Any:
    """For `table.run`: memory that runs out, in the second layer of what is trained."""
    return lambda trainer: memory.append(FailingMemory(trainer, trainer.base_model.model.layers[1], fails, error))


@pytest.mark.parametrize("engine", ["torch", "hf"])
@pytest.mark.parametrize(
    "cell", [Cell("sft", 8, 1), Cell("dpo", 4, 2), Cell("sft", 4, 2, flat=True), Cell("kto", 4, 2)]
)
def test_a_curve_does_not_depend_on_failures(cell: Cell, engine: str) -> None:
    memory: list[FailingMemory] = []
    plain = run(cell)
    failing = run(cell, ready=attach(memory, at_random(seed=1), OF_DEVICE), engine=engine)
    assert memory[0].failures
    assert max(differences(failing, plain)) < 1e-6


def test_what_kto_scores_before_the_first_micro_batch_may_not_fit() -> None:
    calls = iter(range(1000))
    memory: list[FailingMemory] = []
    ready = attach(memory, lambda batch: "begin" * (next(calls) in (0, 9)))
    cell = Cell("kto", 4, 2)
    assert max(differences(run(cell, ready=ready), run(cell))) < 1e-6 and memory[0].failures >= 1


def count_rows(model: Any, inputs: Any, outputs: torch.Tensor) -> None:
    """Statistics that a forward changes."""
    if model.training:
        model.rows_seen += len(outputs)


def test_nothing_of_a_failed_attempt_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first micro-batch of the second step has its gradients added up and its metrics recorded when another fails."""
    lines, weights = {}, {}
    for name, wanted in (("whole", -1), ("cut", 14)):
        calls = iter(range(1000))
        trainer = make_trainer(tmp_path / name, max_epochs=1, log_interval=1, scheduler=None, max_steps=4)
        trainer.base_model.drop.p = 0.0
        trainer.base_model.register_buffer("rows_seen", torch.zeros(1))
        trainer.base_model.register_forward_hook(count_rows)
        mix = trainer.base_model.mix  # asked as the step begins, and again for each micro-batch
        FailingMemory(trainer, mix, lambda _, calls=calls, n=wanted: "backward" * (next(calls) == n))
        trainer.train()
        lines[name] = metric_lines(tmp_path / name)
        weights[name] = [p.clone() for p in [*trainer.base_model.parameters(), trainer.base_model.rows_seen]]
    said = capsys.readouterr().out
    assert said.count("step 2 ran out of memory: micro-batch 3, 2 rows of up to") == 1 and "step 1  micro-b" not in said
    written = map(json.loads, (tmp_path / "cut" / "log" / "metrics.jsonl").read_text().splitlines())
    choices = [line["choices"]["micro-batches"]["why"] for line in written if "choices" in line]
    assert len(choices) == 1 and choices[0].endswith("did not fit into memory")
    for one, other in zip(lines["cut"], lines["whole"], strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-7)
    for one, other in zip(weights["cut"], weights["whole"], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_smaller_size_stays_and_lands_in_the_checkpoint(tmp_path: Path) -> None:
    largest: list[int] = []

    def fails(batch: dict[str, Any]) -> str:
        largest.append(batch["input_ids"].numel())
        return "forward" if largest[-1] > 24 else ""

    trainer = make_trainer(tmp_path, max_epochs=1)
    memory = FailingMemory(trainer, trainer.base_model.mix, fails)
    trainer.train()
    tokens = trainer.run.budget.tokens
    assert tokens is not None and tokens <= 24 and 1 <= memory.failures <= 3
    resumed = make_trainer(tmp_path, max_epochs=2)
    memory = FailingMemory(resumed, resumed.base_model.mix, fails)
    resumed.train()
    assert memory.failures == 0 and resumed.run.budget.tokens == tokens


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    rows, _ = data_of(Cell("sft", 1, 1))
    return [collate_padded([rows[4 * n + i] for i in range(4)]) for n in range(count)]


def sft(folder: Path, train_loader: Any, kind: type[SFTTrainer] = SFTTrainer, **options: Any) -> Any:
    from table import tiny_model

    model = tiny_model()
    given: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "save_dir": str(folder), "device": "cpu"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return kind(model, optimizer, train_loader, progress=False, use_amp=False, **(given | options))


@pytest.mark.parametrize("once", [False, True])
def test_a_loader_is_not_read_again(once: bool, tmp_path: Path) -> None:
    """Not even one that could be: the step's own micro-batches are cut anew."""
    given = batches()
    read: list[int] = []

    def loader() -> Any:
        for number, batch in enumerate(given):
            read.append(number)
            yield batch

    whole = sft(tmp_path / "whole", given, grad_accum_steps=2)
    whole.train()
    trainer = sft(tmp_path / "cut", loader() if once else given, grad_accum_steps=2)
    memory = FailingMemory(trainer, trainer.base_model.model.layers[1], at_random(seed=1))
    trainer.train()
    assert memory.failures and read == (list(range(6)) if once else [])
    for one, other in zip(metric_lines(tmp_path / "cut"), metric_lines(tmp_path / "whole"), strict=True):
        del one["epoch"], other["epoch"]  # of a generator nobody knows the size
        assert one == pytest.approx(other, rel=1e-6)


def test_a_row_that_does_not_fit_alone_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    longest = int(trainer.run.source.dataset.lengths.max())
    FailingMemory(trainer, trainer.base_model.mix, lambda batch: "forward" * (batch["input_ids"].shape[1] >= longest))
    expected = rf"step \d+ ran out of memory: micro-batch 1, which is sample \d+ of the dataset \({longest} tokens\) "
    with pytest.raises(
        OutOfMemoryError, match=expected + r"\(.*can't allocate.*cut any smaller.*gradient_checkpointing"
    ):
        trainer.train()
    assert all(parameter.grad is None for parameter in trainer.base_model.parameters())


def test_a_row_of_a_loader_is_named_by_its_number(tmp_path: Path) -> None:
    trainer = sft(tmp_path, batches(2))
    FailingMemory(trainer, trainer.base_model.model.layers[0], lambda batch: "backward")
    with pytest.raises(OutOfMemoryError, match=r"row 1 of micro-batch 1 of train_loader after position 0, in epoch 1"):
        trainer.train()


def test_a_step_that_comes_again_draws_the_same_from_other_generators_too(tmp_path: Path) -> None:
    """Python's and numpy's; torch's are seeded."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for name, fails in (("whole", False), ("cut", True)):
        random.seed(0)
        np.random.seed(0)
        trainer = sft(tmp_path / name, batches(3))
        own = drawn[name] = []
        prepare = trainer._prepare_batch

        def draw(batch: Any, own: list = own, prepare: Any = prepare) -> Any:
            own.append((random.random(), np.random.random()))
            return prepare(batch)

        trainer._prepare_batch = draw
        calls = iter(range(1000))  # as a step begins, and for its micro-batch
        FailingMemory(trainer, trainer.base_model, lambda _, calls=calls, on=fails: "loss" * (on and next(calls) == 3))
        trainer.train()
    first, failed, again, *_ = drawn["cut"]
    assert first == drawn["whole"][0] and failed == again == drawn["whole"][1]


def test_batches_that_cannot_be_taken_apart_say_so(tmp_path: Path) -> None:
    class Takes(SFTTrainer):
        takes_flat = True

        def _compute_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            return super()._compute_loss(outputs, batch)

    trainer = sft(tmp_path, [batch | {"names": [""] * 4} for batch in batches(2)], Takes)
    FailingMemory(trainer, trainer.base_model.model.layers[0], lambda batch: "loss")
    with pytest.raises(
        OutOfMemoryError, match=r"not cut, for they hold something else than padded tensors .*batch_size"
    ):
        trainer.train()


class Own(SFTTrainer):
    """An algorithm of a user's, who has not said that its micro-batches may be cut."""

    def _compute_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return super()._compute_loss(outputs, batch)


def test_micro_batches_that_may_not_be_cut(tmp_path: Path) -> None:
    trainer = sft(tmp_path, batches(2), Own)
    FailingMemory(trainer, trainer.base_model.model.layers[0], at_random(seed=1, share=1.0))
    with pytest.raises(OutOfMemoryError, match="Own has methods of its own.*takes_flat = True"):
        trainer.train()


def test_an_evaluation_is_cut_smaller_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = {}
    for name in ("whole", "cut"):
        trainer = make_trainer(tmp_path / name, max_epochs=1, max_steps=4)
        limit = 60 if name == "cut" else 10_000

        def short(module: nn.Module, inputs: Any, limit: int = limit) -> None:
            if not module.training and inputs[0].numel() > limit:
                raise MemoryError

        trainer.base_model.register_forward_pre_hook(short)
        seen[name] = trainer.train()
    assert "the evaluation ran out of memory: micro-batch 1, 8 rows of up to" in capsys.readouterr().out
    assert seen["cut"]["eval_loss"] == pytest.approx(seen["whole"]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("engine", ["torch", "hf"])
def test_an_update_that_does_not_fit_ends_the_run_in_one_message_and_nothing_is_lost(
    engine: str, tmp_path: Path
) -> None:
    plain = make_trainer(tmp_path / "plain", max_epochs=1, engine=engine)
    plain.train()
    trainer = make_trainer(tmp_path / "cut", max_epochs=1, engine=engine)
    update, updates = trainer.optimizer.step, []

    def short(*args: Any, **options: Any) -> Any:
        """The fourth time some weights are updated, then memory runs out."""
        updates.append(1)
        if len(updates) == 4:
            next(trainer.base_model.parameters()).data.add_(1.0)
            raise OF_DEVICE
        return update(*args, **options)

    trainer.optimizer.step = short
    expected = (
        r"^step 4, update: out of memory \(CUDA out of memory.*\)\. Smaller micro-batches would not help here\. What helps: "
        r".*lion.*engine: fsdp.*newest checkpoint$"
    )
    with pytest.raises(OutOfMemoryError, match=expected):
        trainer.train()
    goes_on = make_trainer(tmp_path / "cut", max_epochs=1, engine=engine)
    goes_on.train()
    assert metric_lines(tmp_path / "cut") == metric_lines(tmp_path / "plain")
    for one, other in zip(goes_on.base_model.parameters(), plain.base_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_error_is_none_of_this(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    FailingMemory(trainer, trainer.base_model.mix, lambda batch: "backward", RuntimeError("no such layer"))
    with pytest.raises(RuntimeError, match="no such layer"):
        trainer.train()


def test_a_stream_opens_again_where_the_step_began() -> None:
    source = SampleStream(Rows(20), collate_padded, rows_per_step=6, batch_size=3)
    steps = list(source.steps(0, 6))
    rows = source.rows_of_step(0, 6, steps[0][0])
    assert [len(micro_batch) for micro_batch in rows] == [3, 3] and source.recut(steps[0][0]) is None
    assert sorted(row.tokens for row in rows[0]) == sorted(steps[0][0][0].batch["attention_mask"].sum(1).tolist())
