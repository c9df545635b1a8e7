"""Saving behind the training: the same files as in the foreground, whatever happens in the meantime."""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import SFTTrainer
from llm_trainer.checkpoint import CheckpointError, CheckpointManager, load_checkpoint
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.models.build import build_model
from llm_trainer.train import saving
from llm_trainer.train.hooks import Hook

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import make_trainer

WRITE = saving.write_files
SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS: dict[str, Any] = {"val_loader": None, "scheduler": None, "max_epochs": 1, "save_interval_steps": 2}


def at_step(step: int, call: Callable[[], object]) -> Hook:
    """Calls something after a step, before that is saved."""
    return Hook("at", lambda run: call() if run.progress.step == step else None, every_steps=1)


def files_of(folder: Path) -> dict[str, Any]:
    """Everything of all checkpoints that does not depend on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("checkpoint-*/**/*")):
        name = path.relative_to(folder).as_posix()
        if path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            for varying in ("train_seconds", "lines", "hooks_done"):
                del state["progress"][varying]
            found[name] = state
        elif path.is_file() and path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


def test_what_is_saved_while_training_goes_on_is_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 2 is held up until step 4 is about to be saved, and the run does not wait for it until then."""
    make_trainer(tmp_path / "before", save_in_background=False, checkpoints_to_keep=9, **OPTIONS).train()
    go_on, began, threads = threading.Event(), threading.Event(), []

    def write(folder: Path, files: Any) -> Any:
        threads.append(threading.current_thread())
        began.set()
        assert go_on.wait(30)
        return WRITE(folder, files)

    monkeypatch.setattr(saving, "write_files", write)
    seen = []

    def look() -> None:
        assert began.wait(30)
        seen.extend(path.name for path in (tmp_path / "behind").glob("checkpoint-*"))
        go_on.set()

    trainer = make_trainer(tmp_path / "behind", checkpoints_to_keep=9, hooks=[at_step(3, look)], **OPTIONS)
    trainer.train()
    assert [name.split(".")[0] for name in seen] == ["checkpoint-00000002"] and ".partial-" in seen[0]
    assert threading.main_thread() not in threads
    expected, found = files_of(tmp_path / "before"), files_of(tmp_path / "behind")
    assert len(expected) >= 4 * 4 and found == expected
    by_hand = trainer.save_checkpoint(is_best=True)  # it is there when the call returns
    assert threads[-1] is threading.main_thread() and (Path(by_hand) / "manifest.json").exists()


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failures = [error]

    def write(folder: Path, files: Any) -> Any:
        if failures:
            raise failures.pop()
        return WRITE(folder, files)

    monkeypatch.setattr(saving, "write_files", write)


def test_a_disk_that_is_full_behind_the_training_is_told_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    said: list[str] = []
    trainer = make_trainer(tmp_path, hooks=[at_step(4, lambda: said.append(capsys.readouterr().err))], **OPTIONS)
    monkeypatch.setattr(trainer.run.checkpoints, "_warn", said.append)
    trainer.train()
    (warning,) = [text for text in said if "could not be saved" in text]
    assert "checkpoint-00000002' could not be saved: No space left on device" in warning
    assert "MB are free" in warning or "bytes were written" in warning
    assert "Training goes on; the next save is tried as planned" in warning
    assert not (tmp_path / "checkpoint-00000002").exists() and CheckpointManager(tmp_path).load().step == 8
    assert not list(tmp_path.glob("*.partial-*"))


def test_the_last_save_must_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began before the run knew that this was its end."""
    fail_once(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="checkpoint-00000008' could not be saved: No space left"):
        make_trainer(tmp_path, **(OPTIONS | {"save_interval_steps": 8})).train()


def test_what_is_not_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        make_trainer(tmp_path, **OPTIONS).train()


@pytest.mark.parametrize(
    ("error", "last"), [(ValueError("of a hook"), 3), (KeyboardInterrupt(), 2), (SystemExit(3), 2)]
)
def test_however_a_run_ends_its_last_save_is_finished(
    error: BaseException, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is being saved when a hook after step 3 fails; what fails with an error is saved as well."""
    began, ended = threading.Event(), threading.Event()

    def write(folder: Path, files: Any) -> Any:
        began.set()
        assert not ended.wait(0.3)  # the hook fails in the meantime
        return WRITE(folder, files)

    def fail() -> None:
        assert began.wait(30)
        raise error

    monkeypatch.setattr(saving, "write_files", write)
    trainer = make_trainer(tmp_path, hooks=[at_step(3, fail)], **OPTIONS)
    with pytest.raises(type(error)):
        trainer.train()
    ended.set()
    steps = [path.name for path in sorted(tmp_path.glob("checkpoint-*"))]
    assert "checkpoint-00000002" in steps and steps[-1] == f"checkpoint-{last:08d}"
    assert CheckpointManager(tmp_path).load().step == last and not list(tmp_path.glob("*.partial-*"))
    assert (tmp_path / "model").resolve(strict=True).parent.name == steps[-1]


def test_without_memory_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: 1000)
    copies: list[bool] = []
    collect = saving.Saving._collect

    def counted(self: Any, algorithm: Any, state: Any, wanted: saving.Wanted) -> Any:
        copies.append(wanted.background)
        return collect(self, algorithm, state, wanted)

    monkeypatch.setattr(saving.Saving, "_collect", counted)
    make_trainer(tmp_path, **OPTIONS).train()
    out = capsys.readouterr()
    assert (out.out + out.err).count("checkpoints are saved in the foreground: a copy takes") == 1
    assert copies == [False] * 4


def test_a_parameter_that_no_checkpoint_could_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    from llm_trainer import SFTTrainer

    model, extra = torch.nn.Linear(2, 3), torch.nn.Parameter(torch.ones(5))

    class Tempered(SFTTrainer):
        def _build_module(self, model: torch.nn.Module) -> torch.nn.Module:
            module = torch.nn.Module()
            module.inner, module.temperature = model, extra
            return module

    def start(trainer: type[SFTTrainer], optimizer: torch.optim.Optimizer) -> None:
        trainer(model=model, optimizer=optimizer, train_loader=[], save_dir=str(tmp_path), device="cpu")

    expected = r"optimizer: 1 parameter of it not in the Linear that is trained: {} \(\[5\]\)\. No checkpoint"
    with pytest.raises(ValueError, match=expected.format("number 2 of group 0")):
        start(SFTTrainer, torch.optim.AdamW([*model.parameters(), extra]))
    with pytest.raises(ValueError, match=expected.format("scale")):
        start(SFTTrainer, torch.optim.AdamW([*model.named_parameters(), ("scale", extra)]))
    with pytest.raises(ValueError, match=expected.format("temperature")):
        start(Tempered, torch.optim.AdamW([*model.parameters(), extra]))


def test_the_first_screen_says_what_a_copy_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, **OPTIONS)
    trainer.train()
    size = trainer.run.size
    assert (
        f"in the background, from a copy of {(size.bytes + size.optimizer_bytes) / 1e3:.3g} kB"
        in capsys.readouterr().out
    )
    make_trainer(tmp_path / "not", max_steps=1, save_in_background=False, **OPTIONS).train()
    assert "in the background" not in capsys.readouterr().out


def test_the_best_file_holds_weights_and_leads_to_the_rest(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_epochs=1, best_file=True)
    trainer.train()
    best, file = trainer.run.checkpoints.manager.best(), tmp_path / "run" / "best_model.pt"
    content = torch.load(file, weights_only=True)
    assert best is not None and set(content) == {"model", "step", "best_loss", "weights_of"}
    assert (content["step"], content["best_loss"]) == (int(best.name[-8:]), trainer.run.progress.best_loss)
    weights = torch.load(file, weights_only=True)["model"]
    trainer.load_checkpoint(str(file))  # all of the run, as before
    assert trainer.run.progress.step == content["step"] and trainer.optimizer.state
    assert all(torch.equal(value, weights[name]) for name, value in trainer.base_model.state_dict().items())
    other = make_trainer(tmp_path / "run", max_epochs=1, resume="never")
    other.run.checkpoints.set_later_aside(0, other.run.log_dir)  # a new run in the same folder
    other.load_checkpoint(str(file))
    assert other.run.progress.step == content["step"]
    shutil.copy(file, tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match=r"elsewhere.pt' holds the weights of checkpoint-.* no longer beside it"):
        other.load_checkpoint(str(tmp_path / "elsewhere.pt"))
    assert load_checkpoint(tmp_path / "elsewhere.pt", model=other.base_model)["step"] == content["step"]


@pytest.mark.parametrize("source", ["made", "loaded"])
@pytest.mark.parametrize("engine", ["torch", "hf"])
def test_a_published_config_is_the_one_that_the_model_came_with(engine: str, source: str, tmp_path: Path) -> None:
    """Nothing that training needs stays switched on or off in it: not routers' logits, nor the cache."""
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = build_model(ModelConfig(**SHAPE, architecture="qwen3_moe", moe=moe))
    if source == "loaded":
        model.config.use_cache, model.config.output_router_logits = False, True
        model.save_pretrained(tmp_path / "source")
        model = build_model(tmp_path / "source")
    before = {name: getattr(model.config, name) for name in ("use_cache", "output_router_logits")}
    assert before == {"use_cache": source == "made", "output_router_logits": source == "loaded"}
    ids = torch.arange(8)[None]
    quiet: dict[str, Any] = {"device": "cpu", "progress": False, "compile": False, "use_amp": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = quiet | {"engine": engine, "gradient_checkpointing": True, "save_dir": str(tmp_path / "run")}
    SFTTrainer(model, optimizer, [{"input_ids": ids, "labels": ids}], max_epochs=1, **options).train()
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert {name: config[name] for name in before} == before
