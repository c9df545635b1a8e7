"""`compile: auto`: when it is worth while, that it compiles once and changes no curve, that nothing is lost where it fails."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer, compiler
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import collate_flat, collate_padded, lay_with_images
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models import seeing
from llm_trainer.models.build import build_model
from llm_trainer.state import MicroBatch, StepDone
from llm_trainer.train import compiling
from llm_trainer.train.compiling import Compiling, Estimate
from llm_trainer.train.hooks import Hook

sys.path += [str(Path(__file__).parents[2] / "faults"), str(Path(__file__).parents[2] / "invariance")]
from pictures import Pictured, Shades, vision_model
from victim import Rows

SHAPE = ModelConfig(vocab_size=512, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
TRACERS_WARN = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # in parts that torch imports


def test_only_long_runs_are_compiled() -> None:
    """A run of minutes never is, whatever it would gain; a longer one where it gains twice what it costs."""
    assert not Estimate(0.0, 100.0).pays(599) and Estimate(0.0, 1.001).pays(600)
    assert Estimate(59.9, 1.25).pays(600) and not Estimate(60.1, 1.25).pays(600)
    assert Estimate(60.0, 1.25).saved(600) == pytest.approx(60)
    assert not Estimate(1.0, 0.9).pays(1e9)
    for estimate in (*compiling.EXPECTED.values(), compiling.ELSEWHERE):
        assert estimate.pays(7200)


class Clocked:
    """A run of two layers, whose steps take as long as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, configured: Any = "auto", engine: str = "torch") -> None:
        monkeypatch.setattr(compiler, "compiled", lambda function, dynamic: function)
        self.model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.compiling = Compiling(configured, TorchEngine(torch.device("cpu")), engine)
        self.compiling.add(self.model)

    def step(self, seconds: float, left: int | None = 10_000, times: int = 1, busy: float | None = None) -> Any:
        """Take steps, the processor being busy for `busy` seconds; what was chosen after the last of them."""
        said = None
        for _ in range(times):
            batches = [MicroBatch({"input_ids": None})]
            busy_seconds = seconds if busy is None else busy
            terms = {"": 100.0}
            done = StepDone(torch.zeros(()), 1.0, True, 100, terms, seconds, False, batches, 0, busy_seconds)
            said = self.compiling.after(done, left)
        return said

    @property
    def is_on(self) -> bool:
        return self.compiling.state_dict()["is_on"]


def test_it_is_decided_after_the_first_steps_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Clocked(monkeypatch)
    first = run.compiling.choice(10_000)
    assert first is not None and first.value == "decided after 8 steps"
    assert run.step(30.0) is None and run.step(1.0, times=6) is None  # the first one compiles kernels
    said = run.step(1.0)
    assert run.is_on and said.value == "on" and "40 s longer, and 12 min of 2.8 h are saved" in said.why
    assert run.step(21.0) is None  # here the layers are compiled
    said = run.step(0.5, times=8)
    assert said.value == "on" and "took 20 s, and steps are 2.00 times as fast" in said.why
    assert run.step(9.0, times=20) is None and run.is_on

    # The next run of this model knows what it gains: twice 20 s are earned back in 80 s, and 600 s have to be left.
    assert "20 s longer, and 5 min of 11 min" in Clocked(monkeypatch).step(1.0, left=640, times=8).why
    assert Clocked(monkeypatch).step(1.0, left=590, times=8) is None  # a short run hears nothing more of it


@pytest.mark.parametrize("broken", ["", "[]", '{"seconds": "x", "gain": 1}', '{"seconds": 1, "gain": 0}'])
def test_what_cannot_be_read_is_not_known(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    for _ in range(2):
        run = Clocked(monkeypatch)
        assert "40 s longer" in run.step(1.0, times=8).why
        run.step(21.0), run.step(0.5, times=8)
        (file,) = (tmp_path / "compiling").iterdir()
        assert json.loads(file.read_text()) == {"seconds": 20.0, "gain": 2.0}
        file.write_text(broken)


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "file"))
    run = Clocked(monkeypatch)
    run.step(1.0, times=8), run.step(21.0)
    assert run.step(0.5, times=8).value == "on"


def test_what_makes_steps_slower_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Clocked(monkeypatch)
    run.step(1.0, times=8), run.step(21.0)
    said = run.step(1.1, times=8)
    assert said.value == "off" and "0.91 times" in said.why and not run.is_on
    assert Clocked(monkeypatch).step(1.0, times=8).value == "off"  # and not tried again


def test_other_programs_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They make compiled steps longer by the clock, not by processor time."""
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    run = Clocked(monkeypatch)
    run.step(1.0, busy=0.9, times=8), run.step(21.0)
    assert "1.50 times as fast" in run.step(1.1, busy=0.6, times=8).why
    (file,) = (tmp_path / "compiling").iterdir()
    assert json.loads(file.read_text())["gain"] == 1.5


def test_only_what_is_clear_is_remembered_or_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    run = Clocked(monkeypatch)
    run.step(1.0, times=8), run.step(21.0)
    for seconds in (0.8, 1.2, 0.9, 1.1, 1.2, 1.3, 0.7):
        run.step(seconds)
    said = run.step(1.2)
    assert said.value == "on" and "not clear" in said.why and "0.87" in said.why
    assert not (tmp_path / "compiling").exists()


def test_what_is_old_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    run = Clocked(monkeypatch)
    run.step(1.0, times=8), run.step(21.0), run.step(1.1, times=8)
    assert Clocked(monkeypatch).step(1.0, times=8).value == "off"
    (file,) = (tmp_path / "compiling").iterdir()
    month_ago = time.time() - 31 * 86400
    os.utime(file, (month_ago, month_ago))
    assert Clocked(monkeypatch).step(1.0, times=8).value == "on"


@pytest.mark.parametrize(
    ("configured", "engine", "left"),
    [("auto", "torch", None), ("auto", "torch", 50), ("auto", "fsdp", 10**6), (False, "torch", 10**6)],
)
def test_where_it_is_not_known_to_pay_nothing_is_compiled(
    configured: Any, engine: str, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is not known; it is near; the engine is another one; the user says no."""
    run = Clocked(monkeypatch, configured, engine)
    run.step(1.0, left, times=30)
    assert not run.is_on
    is_open = configured == "auto" and engine == "torch" and left is not None
    assert (run.compiling.choice(left) is not None) == is_open


def test_a_checkpoint_holds_what_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the decision also what was watched, so that a run that was cut there decides at the same step."""
    first, second, third = (Clocked(monkeypatch) for _ in range(3))
    first.step(1.0, times=5)
    second.compiling.load_state_dict(json.loads(json.dumps(first.compiling.state_dict())))
    assert second.step(1.0, times=2) is None and second.step(1.0).value == "on"
    third.compiling.load_state_dict(second.compiling.state_dict())
    chosen = third.compiling.choice(3)
    assert third.is_on and chosen is not None and "when it was saved" in chosen.why
    assert third.step(1.0, times=30) is None and third.is_on  # nothing is known to compare it with
    third.compiling.load_state_dict(None)
    assert not third.is_on
    third.compiling.load_state_dict({"is_on": False, "pace": [0.01] * 7})  # of an earlier version
    assert third.step(1.0).value == "on"


class Losses:
    """Trains a small model on ragged rows; the losses and gradient norms of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lives = folder, 0

    def __call__(self, **options: Any) -> np.ndarray:
        self.lives += 1
        torch.manual_seed(0)
        model = build_model(SHAPE)
        collate: Callable[..., Any] = collate_flat if options.pop("flat", True) else collate_padded
        rows: list[Any] = [Rows(62), Rows(6)]
        if options.pop("sees", False):  # none to two images in a row
            model, collate = vision_model(), partial(lay_with_images, lay=collate, images=Shades())
            rows = [Pictured(one, 8) for one in rows]
        streams = [SampleStream(one, collate, rows_per_step=8, batch_size=4) for one in rows]
        trainer = SFTTrainer(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
            train_loader=streams[0],
            val_loader=streams[1],
            max_epochs=2,
            log_interval=1,
            device="cpu",
            precision="fp32",
            packing="none",
            micro_batch_tokens=None,
            progress=False,
            best_file=False,
            **({"save_dir": str(self.folder / str(self.lives)), "save_interval": 0} | options),
        )
        trainer.train()
        self.choices = trainer.run.choices
        lines = (trainer.run.log_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return np.array([[line["loss"], line["grad_norm"]] for line in found if "grad_norm" in line])


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Every run is long enough, and its layers are traced but not compiled, which takes too long for a fast test."""
    for name, value in {"SHORTEST_S": 0.0, "WATCHED": 3, "WORTH_KEEPING": 0.0}.items():
        monkeypatch.setattr(compiling, name, value)
    monkeypatch.setattr(compiling, "EXPECTED", {("cpu", "fp32"): Estimate(0.0, 1e9)})
    monkeypatch.setattr(Compiling, "_known", lambda self, done: None)  # what one run measures, another does not read
    monkeypatch.setattr(
        compiler, "compiled", lambda function, dynamic: torch.compile(function, backend="eager", dynamic=True)
    )
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    return Losses(tmp_path)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@TRACERS_WARN
@pytest.mark.parametrize("flat", [True, False])
def test_layers_compile_once_for_rows_of_all_lengths(flat: bool, losses: Losses) -> None:
    """One graph for training, one for evaluation: of three layers, in two epochs of batches of other sizes."""
    plain = losses(flat=flat, compile=False)
    np.testing.assert_array_equal(losses(flat=flat), plain)
    assert losses.choices["compile"].value == "on"
    assert num_graphs() == 2 and not torch._dynamo.utils.counters["graph_break"]


@TRACERS_WARN
@pytest.mark.parametrize("flat", [True, False])
def test_language_models_that_see_compile_once_for_any_number_of_images(flat: bool, losses: Losses) -> None:
    """Their towers run plain."""
    pytest.importorskip("PIL")
    plain = losses(flat=flat, sees=True, compile=False)
    np.testing.assert_array_equal(losses(flat=flat, sees=True), plain)
    assert losses.choices["compile"].value == "on"
    assert num_graphs() == 2 and not torch._dynamo.utils.counters["graph_break"]


@TRACERS_WARN
def test_a_whole_model_compiles_once_too(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled in the first step serves all lengths of rows."""
    compiled = partial(torch.compile, backend="eager")
    monkeypatch.setattr(seeing, "compiled", lambda function, **options: compiled(function, **options))
    graphs: list[int] = []
    found = losses(compile=True, hooks=[Hook("count", lambda run: graphs.append(num_graphs()), every_steps=1)])
    assert len(graphs) > 10 and graphs[0] > 0 and graphs[6] == graphs[0], graphs
    np.testing.assert_allclose(found, losses(compile=False), rtol=1e-5)


@TRACERS_WARN
def test_a_compiled_run_that_was_cut_goes_on_compiled(losses: Losses) -> None:
    whole = losses()
    torch.compiler.reset()

    def stop(run: Any) -> None:
        if run.progress.step == 6:
            run.save()
            raise KeyboardInterrupt

    folder = str(losses.folder / "cut")
    with pytest.raises(KeyboardInterrupt):
        losses(save_dir=folder, hooks=[Hook("stop", stop, every_steps=1)])
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    cut = losses(save_dir=folder, resume="auto")
    np.testing.assert_array_equal(cut, whole)
    assert "when it was saved" in losses.choices["compile"].why and num_graphs() > 0


@TRACERS_WARN
@pytest.mark.parametrize("fails", ["at once", "in its first call", "in a later call"])
def test_where_compiling_fails_nothing_is_lost(fails: str, losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    calls = 0

    def broken(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if fails == "in its first call" or calls == 20:
                raise InductorError(RuntimeError("an operator is not known"), None)
            return function(*args)

        if fails == "at once":
            raise InvalidCxxCompiler
        return call

    plain = losses(compile=False)
    monkeypatch.setattr(compiler, "compiled", broken)
    np.testing.assert_array_equal(losses(), plain)
    assert calls == {"at once": 0, "in its first call": 1, "in a later call": 20}[fails]
    if fails != "in a later call":
        said = losses.choices["compile"]
        assert said.value == "off" and "training goes on without" in said.why


@TRACERS_WARN
def test_the_whole_model_needs_a_compiler_and_one_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    def look_for_one() -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", look_for_one)
    message = "compile: got true, which needs a C.. compiler .*run_config.compile=auto"
    # Trap: `monkeypatch` would take the setting away at the end, as it finds none in the class's own dict.
    with config.patch({"cpp.simdlen": None}), pytest.raises(ConfigError, match=message):
        Clocked(monkeypatch, configured=True)


@TRACERS_WARN
@pytest.mark.parametrize("call", [1, 30])
def test_a_whole_model_that_cannot_be_compiled_ends_in_one_message(
    call: int, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first forward, and in that of an evaluation."""
    from torch._inductor.exc import CppCompileError, InductorError

    calls = 0

    def broken(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise InductorError(CppCompileError(["g++", "a.cpp"], "a.cpp:3:1: error: no such type"), None)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(seeing, "compiled", broken)
    with pytest.raises(
        ConfigError, match=r"could not be compiled \(InductorError: a.cpp:3:1: error: no such type\)"
    ) as told:
        losses(compile=True)
    assert "run_config.compile=auto runs plain what cannot" in str(told.value)


@pytest.mark.slow
@TRACERS_WARN
@pytest.mark.parametrize("sees", [False, True])
def test_compiled_code_gives_the_curve_of_plain_code(
    sees: bool, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "SHORTEST_S", 0.0)
    monkeypatch.setattr(compiling, "EXPECTED", {("cpu", "fp32"): Estimate(0.0, 1e9)})
    monkeypatch.setattr(compiling, "WORTH_KEEPING", 0.0)
    plain = losses(sees=sees, compile=False)
    np.testing.assert_allclose(losses(sees=sees), plain, rtol=1e-5)
    assert losses.choices["compile"].value == "on"
