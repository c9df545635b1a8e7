"""Metrics over ranks, and the files they are written to."""

import json
import math
import sys
from io import StringIO
from threading import Barrier, Thread

import pytest
import torch
from rich.console import Console

from llm_trainer.train import metrics as module
from llm_trainer.train import writers
from llm_trainer.train.log_files import LearningRates
from llm_trainer.train.metrics import Metrics
from llm_trainer.train.writers import ConsoleWriter, JsonLines, TensorBoard, TextLog, WandB, open_writers


class Ranks:
    """Threads that sum a tensor together, and how often they did."""

    def __init__(self, num_ranks):
        self.tables, self.calls, self.barrier = [None] * num_ranks, [0] * num_ranks, Barrier(num_ranks)

    def all_reduce(self, rank):
        def reduce(table):
            self.tables[rank], self.calls[rank] = table, self.calls[rank] + 1
            self.barrier.wait(10)
            total = torch.stack(self.tables).sum(0)
            self.barrier.wait(10)
            return total

        return reduce


def reduce_together(added):
    ranks, results = Ranks(len(added)), [None] * len(added)

    def run(rank):
        metrics = Metrics()
        for name, total, count in added[rank]:
            metrics.add(name, total, count)
        results[rank] = metrics.reduce(ranks.all_reduce(rank))

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(added))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, ranks.calls


def test_means_are_weighted_and_the_metrics_start_anew():
    metrics = Metrics()
    metrics.add("loss", torch.tensor(6.0, requires_grad=True), 3)
    metrics.add("loss", 2.0, torch.tensor(1))
    metrics.add("num_tokens", 2**53 - 1)
    metrics.add("empty", torch.tensor(math.nan), 0)
    assert metrics.reduce() == {"loss": 2.0, "num_tokens": float(2**53 - 1)}
    assert metrics.reduce() == {}


def test_ranks_may_have_different_names_and_need_one_collective():
    added = [
        [("loss", 3.0, 1), ("loss/poems", torch.tensor(5.0), 2)],
        [("loss", torch.tensor(1.0), 3), ("loss/код", 4.0, 1)],
        [],
    ]
    results, calls = reduce_together(added)
    assert results == [{"loss": 1.0, "loss/poems": 2.5, "loss/код": 4.0}] * 3
    assert calls == [1, 1, 1]


def test_names_that_share_a_slot_are_told_apart(monkeypatch):
    monkeypatch.setattr(module, "_SLOTS", 8)
    added = [[(f"a{i}", float(i), 1) for i in range(3)], [(f"b{i}", 10.0 + i, 1) for i in range(3)]]
    results, calls = reduce_together(added)
    assert results[0] == results[1] == {f"a{i}": float(i) for i in range(3)} | {f"b{i}": 10.0 + i for i in range(3)}
    assert calls[0] == calls[1] > 1


def test_a_resumed_interval_is_the_same_whatever_the_ranks():
    interrupted = Metrics()
    interrupted.add("loss", torch.tensor(1 / 3, dtype=torch.float64), 1)
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = [Metrics(), Metrics()]
    for metrics in resumed:
        metrics.load_state_dict(state, share=1 / 2)
        metrics.add("loss", 1.0, 1)
    interrupted.add("loss", 2.0, 2)
    totals, counts = zip(*(metrics.state_dict()["loss"] for metrics in resumed), strict=True)
    assert [sum(totals), sum(counts)] == pytest.approx(interrupted.state_dict()["loss"], rel=1e-15)
    assert interrupted.reduce() == {"loss": (1 / 3 + 2.0) / 3}


def test_non_finite_values_touch_only_their_own_name():
    metrics = Metrics()
    metrics.add("loss", math.nan)
    metrics.add("kl", math.inf)
    metrics.add("reward", 1.5)
    found = metrics.reduce()
    assert math.isnan(found["loss"]) and found["kl"] == math.inf and found["reward"] == 1.5


@pytest.mark.parametrize("name", ["", "x" * 81])
def test_names_that_do_not_fit(name):
    metrics = Metrics()
    metrics.add(name, 1.0)
    with pytest.raises(ValueError, match="expected 1 to 80 bytes"):
        metrics.reduce()


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_files_hold_what_was_written(tmp_path):
    values = {"loss": 2.5, "learning_rate": 1e-3, "rewards/chosen": math.nan, "loss/my data": 1.0}
    for writer in (TextLog(tmp_path), JsonLines(tmp_path)):
        writer.write(10, values)
        writer.close()
    rates = LearningRates(tmp_path)
    rates.note(10, 1e-3)
    rates.close()
    line = (tmp_path / "log.txt").read_text()
    assert line.endswith(" step=10 loss=2.5 learning_rate=0.001 rewards/chosen=nan loss/my_data=1\n")
    assert (tmp_path / "lr.txt").read_text() == "step=10 learning_rate=0.001\n"
    found = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {**found, "time": 0} == {"step": 10, "time": 0, **values, "rewards/chosen": None}


def test_a_resumed_curve_has_no_doubles(tmp_path):
    for writer in (TextLog(tmp_path), JsonLines(tmp_path)):
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step), "learning_rate": 0.1})
        writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # the process died while writing step 20-something
    for writer in (TextLog(tmp_path, last_step=20), JsonLines(tmp_path, last_step=20)):
        writer.write(30, {"loss": 3.0, "learning_rate": 0.1})
        writer.close()
    assert steps(tmp_path / "metrics.jsonl") == [10, 20, 30]
    assert (tmp_path / "log.txt").read_text().count("step=30") == 1
    JsonLines(tmp_path).close()  # a new run
    assert steps(tmp_path / "metrics.jsonl") == []


def console(terminal):
    return Console(file=StringIO(), force_terminal=terminal, width=160, color_system=None)


def test_console_without_a_terminal_prints_plain_lines(monkeypatch):
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(writers.time, "monotonic", lambda: next(clock))
    screen = console(terminal=False)
    writer = ConsoleWriter(1000, first_step=100, console=screen)
    train = {"loss": 2.34567, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6, "mfu": 0.412}
    writer.write(110, train | {"rewards/chosen": 1.0})
    writer.write(110, {"eval_loss": 2.0, "eval_kl": 0.25, "eval_seconds/generate": 0.5})
    writer.close()
    assert screen.file.getvalue().splitlines() == [
        "step 110/1,000  loss 2.3457  lr 1.00e-03  grad 0.500  12,346 tok/s  MFU 41.2%  ETA 0:14:50",
        "step 110/1,000  eval_loss 2.0000  eval_kl 0.2500",
    ]


def test_console_in_a_terminal_keeps_one_live_line():
    screen = console(terminal=True)
    writer = ConsoleWriter(None, console=screen)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 0.5, "eval_loss": 0.75})
    writer.say("saved [2]")
    writer.close()
    text = screen.file.getvalue()
    assert "saved [2]" in text
    assert "loss 0.5000" in text and "step 2  eval_loss 0.7500" in text
    quiet = console(terminal=True)
    ConsoleWriter(None, live=False, console=quiet).write(1, {"loss": 1.0})
    assert quiet.file.getvalue() == "step 1  loss 1.0000\n"


def test_tensorboard_curves_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for last_step, start in ((-1, 0), (1, 2)):
        writer = TensorBoard(tmp_path, last_step)
        for step in range(start, start + 3):
            writer.write(step, {"loss": float(step + start)})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 1.0), (2, 4.0), (3, 5.0), (4, 6.0)]


def test_wandb_is_offline_and_gets_steps(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    class FakeWandb:
        @staticmethod
        def init(**settings):
            calls.append(settings["dir"])
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    writer = WandB(tmp_path)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert calls == [str(tmp_path), (3, {"loss": 1.0}), "finish"]


def test_only_the_main_process_has_writers(tmp_path):
    assert open_writers(tmp_path / "log", is_main=False, extra=["tensorboard"]) == []
    assert not (tmp_path / "log").exists()
    writers = open_writers(tmp_path / "log", is_main=True, total_steps=10)
    assert [type(writer) for writer in writers] == [ConsoleWriter, TextLog, JsonLines]
    for writer in writers:
        writer.close()
    with pytest.raises(ValueError, match="writers: got mlflow, expected tensorboard or wandb"):
        open_writers(tmp_path, is_main=True, extra=["mlflow"])


def test_a_writer_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"writer wandb: .*pip install wandb"):
        open_writers(tmp_path, is_main=True, extra=["wandb"])
