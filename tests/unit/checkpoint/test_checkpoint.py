"""Checkpoints: exact round trips, and what a kill, a full disk, a truncated file or a flipped byte leave behind."""

import copy
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_trainer.checkpoint import (
    CheckpointError,
    CheckpointManager,
    load_checkpoint,
    load_folder,
    load_optimizer_state_by_name,
    load_weights,
    optimizer_state_by_name,
    random_state,
    read_model,
    save_checkpoint,
    set_random_state,
    write_model,
)
from llm_trainer.checkpoint.copies import HostMemory
from llm_trainer.checkpoint.tensor_files import Shard, TensorFolder, shard_files, write_files
from llm_trainer.checkpoint.valid import read_manifest, write_manifest
from llm_trainer.optim.optimizers import create_optimizer

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


class Tied(nn.Module):
    """Two names for one matrix, a bf16 part, buffers that are saved and that are not, and a parameter nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(4, 4).bfloat16()
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("angles", torch.randn(4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids).bfloat16()).float())


def build_qwen3(**more: Any) -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **more))


def build_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))


def build_mixed() -> nn.Module:
    model = build_qwen3().bfloat16()
    model.model.norm.float()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied module": Tied,
    "qwen3": build_qwen3,
    "qwen3 tied": partial(build_qwen3, tie_word_embeddings=True),
    "qwen3 in two dtypes": build_mixed,
    "qwen3 moe": build_moe,
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        ids = torch.randint(8, (2, 5), generator=torch.Generator().manual_seed(step))
        output = model(ids) if isinstance(model, Tied) else model(ids).logits
        output.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, in type, dtype and structure."""
    assert type(actual) is type(expected)
    if isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(actual, dict):
        assert list(actual) == list(expected)
        for key in actual:
            assert_same(actual[key], expected[key])
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def save_number(manager: CheckpointManager, step: int, **more: Any) -> Path:
    """A checkpoint whose weights and state are its step."""
    return manager.save(
        step, partial(write_number, number=step), {"step": step, "vector": torch.full((9,), step)}, **more
    )


def write_number(folder: Path, number: int) -> None:
    (folder / "model.safetensors").write_text(str(number) * 100)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    write_model(model, tmp_path)
    torch.manual_seed(1)
    other = MODELS[name]()
    buffers = {key: tensor.clone() for key, tensor in other.named_buffers() if key not in other.state_dict()}
    places, random_before = [p.data_ptr() for p in other.parameters()], torch.get_rng_state()
    read_model(other, tmp_path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert [p.data_ptr() for p in other.parameters()] == places and torch.equal(torch.get_rng_state(), random_before)
    assert buffers
    for key, tensor in buffers.items():
        assert torch.equal(other.get_buffer(key), tensor)


@pytest.mark.parametrize("kind", ["adamw", "lion", "muon", "sgd"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_training_goes_on_bit_for_bit(kind: str, form: str, tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(seed)
        model = Tied()
        optimizer = create_optimizer(
            model.parameters(), kind, lr=0.01 * seed, **({"momentum": 0.9} if kind == "sgd" else {})
        )
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    model, optimizer, scheduler = build(1)
    train(model, optimizer, 3)
    scheduler.step()
    if form == "file":
        path = save_checkpoint(
            tmp_path / "best_model.pt", model=model, optimizer=optimizer, scheduler=scheduler, step=3
        )
    else:
        state = {"step": 3, "optimizer": optimizer_state_by_name(model, optimizer), "scheduler": scheduler.state_dict()}
        path = CheckpointManager(tmp_path).save(3, partial(write_model, model), state)
    resumed, its_optimizer, its_scheduler = build(2)
    assert load_checkpoint(path, model=resumed, optimizer=its_optimizer, scheduler=its_scheduler) == {"step": 3}
    assert its_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.01
    assert_same(its_scheduler.state_dict(), scheduler.state_dict())
    for run in ((model, optimizer), (resumed, its_optimizer)):
        train(*run, steps=3, start=3)
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_same(optimizer_state_by_name(resumed, its_optimizer), optimizer_state_by_name(model, optimizer))


def test_optimizer_state_goes_by_name_not_by_position() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer_state_by_name(model, optimizer)
    assert "unused" not in saved["state"] and "unused" in saved["param_groups"][0]["params"]
    assert set(saved["state"]) == {
        "embed.weight",
        "inner.weight",
        "inner.bias",
    }  # the tied head has no entry of its own
    wrapped = copy.deepcopy(model)
    wrapped.inner = torch.compile(wrapped.inner, backend="eager")  # type: ignore[assignment]
    backwards = torch.optim.AdamW(list(wrapped.parameters())[::-1])
    load_optimizer_state_by_name(wrapped, backwards, saved)
    assert torch.equal(backwards.state[wrapped.embed.weight]["exp_avg"], saved["state"]["embed.weight"]["exp_avg"])
    assert backwards.state[wrapped.embed.weight]["exp_avg"] is not saved["state"]["embed.weight"]["exp_avg"]
    load_weights(wrapped, {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, "here")
    assert wrapped.inner.weight.abs().sum() == 0
    with pytest.raises(CheckpointError, match=r"group 0: 1 missing: extra"):
        wrapped.extra = nn.Parameter(torch.ones(1))
        load_optimizer_state_by_name(wrapped, torch.optim.AdamW(wrapped.parameters()), saved)
    with pytest.raises(CheckpointError, match=r"shape \[3\] that is not the model's"):
        optimizer_state_by_name(nn.Linear(1, 1), optimizer_over(torch.zeros(3)))


def optimizer_over(tensor: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(tensor)])


def test_optimizer_state_keeps_its_own_dtype() -> None:
    """torch's load_state_dict would round a float32 average to the parameter's bf16."""
    model = nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer.state[model.weight] = {"momentum_buffer": torch.full((2, 2), 1 / 3)}
    saved = optimizer_state_by_name(model, optimizer)
    load_optimizer_state_by_name(model, optimizer, copy.deepcopy(saved))
    assert_same(optimizer.state[model.weight], {"momentum_buffer": torch.full((2, 2), 1 / 3)})


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "nan": float("inf"),
        "nested": {"tuple": (1, (2.5, None)), "by number": {3: "x", (1, 2): torch.zeros(0, 3)}, "!odd": [True]},
        "tensors": [torch.tensor(1.5, dtype=torch.bfloat16), torch.arange(6).view(2, 3).T, torch.tensor([True])],
        "random": random_state(),
    }
    manager = CheckpointManager(tmp_path)
    path = manager.save(7, partial(write_number, number=7), state, metric=0.25)
    loaded = manager.load()
    assert_same(loaded.state, state)
    assert (loaded.path, loaded.step, loaded.metric) == (path, 7, 0.25)
    assert (loaded.model_folder / "model.safetensors").read_text() == "7" * 100
    assert json.loads((path / "trainer_state.json").read_text()) == {"nan": float("inf")}
    with pytest.raises(CheckpointError, match=r"'a/0/b' is a set"):
        manager.save(8, partial(write_number, number=8), {"a": [{"b": {1}}]})
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "model"]


def as_older_versions_wrote(path: Path) -> Path:
    """Rewrite the tensors of a checkpoint's state as they were until this format: by torch, in a format of its own."""
    import torch.distributed.checkpoint as dcp

    tensors = TensorFolder(path / "tensors").read_all()
    shutil.rmtree(path / "tensors")
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path / "tensors"), no_dist=True)
    seal(path)
    return path


def seal(path: Path) -> None:
    """Write a new manifest, after the files have changed."""
    facts = {key: value for key, value in read_manifest(path).items() if key != "files"}
    (path / "manifest.json").unlink()
    write_manifest(path, facts)


def test_checkpoints_of_older_versions_load(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    state = {"step": 3, "optimizer": optimizer_state_by_name(model, optimizer), "random": random_state()}
    path = CheckpointManager(tmp_path).save(3, partial(write_model, model), state)
    as_older_versions_wrote(path)
    assert not list((path / "tensors").glob("*.safetensors")) and (path / "tensors" / ".metadata").exists()
    assert_same(CheckpointManager(tmp_path).load().state, state)
    other = Tied()
    its_optimizer = torch.optim.AdamW(other.parameters())
    assert load_checkpoint(tmp_path, model=other, optimizer=its_optimizer)["step"] == 3
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(optimizer_state_by_name(other, its_optimizer), state["optimizer"])


def test_shards_of_any_layout_become_any_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven shards of four processes, in several files each, and none of a small tensor on some."""
    monkeypatch.setattr("llm_trainer.checkpoint.tensor_files.FILE_BYTES", 40)
    whole = {"wide": torch.randn(7, 5), "small": torch.randn(2), "scalar": torch.tensor(4.0)}
    for rank in range(4):
        shards = {"scalar": Shard.whole(whole["scalar"])} if rank == 0 else {}
        for name in ("wide", "small"):
            rows = torch.arange(len(whole[name])).chunk(4)
            if rank < len(rows):
                part = whole[name][rows[rank]]
                shards[name] = Shard(part, tuple(whole[name].shape), (int(rows[rank][0]), *[0] * (part.ndim - 1)))
        written = write_files(tmp_path, shard_files(shards, rank))
        for name, facts in written.items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == facts.sha256
    files = TensorFolder(tmp_path / "tensors")
    assert len(list((tmp_path / "tensors").iterdir())) > 4
    assert_same(files.read_all(), {name: whole[name] for name in files.shapes})
    for begin, end in ((0, 7), (1, 4), (6, 7), (3, 3)):
        found = files._read_box("wide", (end - begin, 2), (begin, 3))
        assert torch.equal(found, whole["wide"][begin:end, 3:])


def test_host_memory_is_used_again_and_grows_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trainer.checkpoint.copies.BLOCK", 256)
    memory = HostMemory(torch.device("cpu"))
    memory.reserve(600)
    assert memory.size == 600
    tensors = [
        torch.randn(9, 3).T,
        torch.tensor(True),
        torch.randn(200).bfloat16(),
        torch.zeros(0, 4),
        torch.arange(30),
    ]
    first = [memory.copy(tensor) for tensor in tensors]
    size = memory.size
    assert size > 600  # 400 bytes are no block of 256
    assert_same(first, tensors)
    places = [copy.data_ptr() for copy in first if copy.numel()]
    assert len(set(places)) == 4
    memory.start_over()
    more = [tensor + 1 if tensor.dtype != torch.bool else ~tensor for tensor in tensors]
    second = [memory.copy(tensor) for tensor in more]
    assert_same(second, more)
    assert [copy.data_ptr() for copy in second if copy.numel()] == places and memory.size == size


def test_a_model_is_read_in_place_and_its_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """No second model is built to read one whose names need no translation."""
    torch.manual_seed(0)
    model, other = build_mixed(), build_mixed()
    write_model(model, tmp_path)
    own = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    found = load_file(tmp_path / "model.safetensors")
    assert_same({name: found[name] for name in own}, own)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PreTrainedModel, "from_pretrained", None)
        read_model(other, tmp_path)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_random_state_repeats_the_same_numbers(tmp_path: Path) -> None:
    state = random_state()
    drawn = [random.random(), np.random.normal(), torch.rand(2).tolist()]
    save_checkpoint(tmp_path / "a.pt", model=nn.Linear(1, 1), random=state, version=torch.__version__)
    set_random_state(load_checkpoint(tmp_path / "a.pt", model=nn.Linear(1, 1))["random"])
    assert [random.random(), np.random.normal(), torch.rand(2).tolist()] == drawn


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    for step in range(1, 7):
        save_number(manager, step, metric=1 / step, is_best=step in (1, 2))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [*(f"checkpoint-{n:08d}" for n in (2, 5, 6)), "model"]
    assert manager.best() == tmp_path / "checkpoint-00000002" and manager.latest() == tmp_path / "checkpoint-00000006"


def test_rotation_does_not_count_a_broken_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1, warn=lambda problem: None)
    good, bad = save_number(manager, 10), tmp_path / "checkpoint-00000020"
    shutil.copytree(good, bad)
    (bad / "model" / "model.safetensors").unlink()
    assert manager.latest() == good
    assert manager.latest() == good and save_number(manager, 11) == manager.latest()
    assert not good.exists() and bad.exists()  # step 20 is ahead of the run: replaced when it gets there
    assert save_number(manager, 20) == manager.latest() and manager.load().step == 20


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


WEIGHTS, PLAIN, TENSORS, MANIFEST = (
    "model/model.safetensors",
    "trainer_state.json",
    "tensors/00000-000.safetensors",
    "manifest.json",
)


@pytest.mark.parametrize(
    ("how", "file"),
    [("truncated", file) for file in (WEIGHTS, PLAIN, TENSORS, MANIFEST)]
    + [("flipped", file) for file in (WEIGHTS, PLAIN, TENSORS, MANIFEST)],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(how: str, file: str, tmp_path: Path) -> None:
    reported: list[str] = []
    manager = CheckpointManager(tmp_path, warn=reported.append)
    first, second = save_number(manager, 1), save_number(manager, 2)
    damage(second / file, how)
    assert manager.latest() == first and len(reported) == 1 and str(second / file) in reported[0]
    if how == "flipped" and file != MANIFEST:
        assert manager.latest(verify="sizes") == second
    with pytest.raises(CheckpointError, match=rf"{file}' is damaged.*newest valid checkpoint there is '{first}'"):
        manager.load(second)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_file_names_the_valid_one_beside_it(how: str, tmp_path: Path) -> None:
    model = nn.Linear(9, 9)
    good = save_checkpoint(tmp_path / "good.pt", model=model)
    bad = save_checkpoint(tmp_path / "bad.pt", model=model)
    damage(bad, how)
    with pytest.raises(CheckpointError, match=rf"bad.pt' is truncated or damaged. The newest valid .* '{good}'"):
        load_checkpoint(bad, model=model)
    with pytest.raises(CheckpointError, match=r"none.pt' does not exist. The newest valid"):
        load_checkpoint(tmp_path / "none.pt", model=model)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Each way to write (plain file, safetensors, torch) fails midway with the system's own error."""
    manager = CheckpointManager(tmp_path)
    good = save_number(manager, 1)
    before = {path: path.read_bytes() for path in good.rglob("*") if path.is_file()}
    large = nn.Linear(200, 200)
    valid = rf"(?s)checkpoint-00000002' could not be saved: {{}}.*are free.*newest valid checkpoint there is '{good}'"
    with pytest.raises(CheckpointError, match=valid.format("No space left on device")):
        manager.save(2, lambda folder: Path("/dev/full").write_bytes(b"x"), {})
    with files_limited_to(100_000):
        with pytest.raises(CheckpointError, match=valid.format("File too large")):
            manager.save(2, partial(write_model, large), {})
        with pytest.raises(CheckpointError, match=valid.format("File too large")):
            manager.save(2, partial(write_number, number=2), {"tensor": large.weight})
        with pytest.raises(CheckpointError, match=r"could not be saved: File too large"):
            save_checkpoint(tmp_path / "best_model.pt", model=large)
    assert sorted(p.name for p in tmp_path.iterdir()) == [good.name, "model"] and manager.latest() == good
    assert before == {path: path.read_bytes() for path in good.rglob("*") if path.is_file()}


def test_other_errors_of_a_writer_stay_themselves(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        CheckpointManager(tmp_path).save(1, fail, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/run': Not a directory"):
        CheckpointManager(tmp_path / "file" / "run")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        CheckpointManager(tmp_path / "run")


def test_what_dead_processes_left_is_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    good = save_number(CheckpointManager(tmp_path), 3)
    good.rename(tmp_path / f"{good.name}.replaced-{dead.pid}")  # killed between the two renames of a second save
    for left in (f"checkpoint-00000004.partial-{dead.pid}", f"checkpoint-00000004.partial-{os.getppid()}"):
        (tmp_path / left).mkdir()
    (tmp_path / f"best_model.pt.partial-{dead.pid}").touch()
    assert CheckpointManager(tmp_path).latest() == good
    assert {p.name for p in tmp_path.iterdir()} == {good.name, "model", f"checkpoint-00000004.partial-{os.getppid()}"}


KILLED = """
import os, random, signal, sys, time
from functools import partial
from pathlib import Path
import torch
import torch.distributed.checkpoint
from llm_trainer.checkpoint import CheckpointManager, write_model

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
model, delays = torch.nn.Linear(64, 64), random.Random(0)
newest, before, during = 0, 0, 0
for kill in range(kills):
    told, tell = os.pipe()
    child = os.fork()  # saves as fast as it can until it is killed
    if child == 0:
        manager, step = CheckpointManager(folder), newest
        while True:
            step += kill % 2 or step == 0  # every other child saves the same step again and again
            with torch.no_grad():
                model.weight.fill_(step)
            manager.save(step, partial(write_model, model), {"step": step, "tensor": torch.full((3000,), step)})
            os.write(tell, b".")
    os.read(told, 1)  # a machine may be slow: the first save of each child is waited for, the later ones are not
    time.sleep(delays.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    during += any("." in path.name for path in folder.iterdir())
    warned = []
    loaded = CheckpointManager(folder, warn=warned.append).load()
    assert not warned, warned
    assert loaded.step >= newest and loaded.state["step"] == loaded.step
    assert not any("." in path.name for path in folder.iterdir())
    assert loaded.state["tensor"].tolist() == [loaded.step] * 3000
    newest = loaded.step
print(newest, during)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "10"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    newest, during = map(int, done.stdout.split())
    assert newest > 2 and during > 2  # it made progress, and several kills did hit a save


def test_misfits_are_listed(tmp_path: Path) -> None:
    write_model(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), tmp_path)
    other = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(3, 2))
    before = copy.deepcopy(other.state_dict())
    listed = (
        r"2 missing: 2.weight, 2.bias; 2 unexpected: 1.bias, 1.weight; 2 of .* shape: 0.bias \(\[3\] instead of \[4\]"
    )
    with pytest.raises(CheckpointError, match=listed):
        read_model(other, tmp_path)
    assert_same(dict(other.state_dict()), dict(before))
    with pytest.raises(CheckpointError, match=r"has no model.safetensors"):
        read_model(other, tmp_path / "nothing")


def test_a_misfitting_transformers_folder_is_refused(tmp_path: Path) -> None:
    model = build_qwen3()
    assert isinstance(model, PreTrainedModel)
    write_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape: .*\(\[24, 16\] instead of \[30, 16\]\)"):
        read_model(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "vocab_size": 30})), tmp_path)
    deeper = Qwen3Config(**{**SIZES, "num_hidden_layers": 2})
    deeper.save_pretrained(tmp_path)  # says two layers, holds one
    with pytest.raises(CheckpointError, match=r"11 missing_keys: model.layers.1"):
        read_model(Qwen3ForCausalLM(deeper), tmp_path)


def test_forms_that_load_checkpoint_accepts(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert load_checkpoint(tmp_path / "plain.pt", model=other) == {} and torch.equal(model.weight, other.weight)
    with pytest.raises(CheckpointError, match="holds no optimizer state: pass optimizer=None"):
        load_checkpoint(tmp_path / "plain.pt", model=other, optimizer=torch.optim.SGD(other.parameters()))
    torch.save({"model": model}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="never unpickled"):
        load_checkpoint(tmp_path / "pickle.pt", model=other)
    for step in (1, 2):
        CheckpointManager(tmp_path / "run").save(step, partial(write_model, model), {"step": step})
    assert load_checkpoint(tmp_path / "run", model=other) == {"step": 2}
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"'.*empty' is not a complete checkpoint"):
        load_checkpoint(tmp_path / "empty", model=other)


@pytest.mark.parametrize(
    ("key", "prefix", "file"),
    [
        ("model_state_dict", "", "checkpoint.pth"),
        ("model_state_dict", "module.", "best_model.pt"),
        ("model_state", "", "a.pt"),
    ],
)
def test_a_checkpoint_of_another_framework_gives_its_weights(key: str, prefix: str, file: str, tmp_path: Path) -> None:
    """As project_llm_trainer and AnotherLLMFromScratch write them: the optimizer's state goes by position."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({key: weights, "optim_state_dict": optimizer.state_dict(), "epoch": 3}, tmp_path / file)
    assert load_checkpoint(tmp_path / file, model=other) == {} and torch.equal(other.weight, model.weight)
    with pytest.raises(
        CheckpointError, match=rf"another framework \(found epoch, {key}, optim_state_dict\).*init_weights"
    ):
        load_checkpoint(tmp_path / file, model=other, optimizer=torch.optim.AdamW(other.parameters()))


def test_a_folder_of_deepspeed_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step4")
    with pytest.raises(CheckpointError, match=r"is a checkpoint of DeepSpeed's own: run the zero_to_fp32.py"):
        load_checkpoint(tmp_path, model=nn.Linear(2, 2))


def test_a_foreign_pickle_is_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = as_older_versions_wrote(save_number(CheckpointManager(tmp_path), 1))
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(Attack()))
    seal(path)
    with pytest.raises(CheckpointError, match=r"asks for \w+\.system"):
        load_folder(path)
    assert not (tmp_path / "executed").exists()


def test_the_published_model_is_a_copy_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path, target_is_directory: bool = False) -> None:
        raise OSError("no links here")

    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", refuse)
        for step in (1, 2):
            manager.save(step, lambda folder, step=step: (folder / "weights").write_text(str(step)), {})
            model = manager.publish()
            assert model is not None and (model.is_symlink(), (model / "weights").read_text()) == (False, str(step))
    manager.save(1, lambda folder: (folder / "weights").write_text("best"), {}, is_best=True)
    model = manager.publish()
    assert model is not None and (model.is_symlink(), (model / "weights").read_text()) == (True, "best")


def test_a_kill_inside_publishing_blocks_none_that_has_the_same_process_id(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        (tmp_path / f"model.partial-{os.getpid()}").symlink_to("checkpoint-00000009/model")  # killed before its rename
        path = save_number(manager, step)
        assert (tmp_path / "model").resolve() == path / "model"
    (tmp_path / f"model.partial-{os.getpid()}").symlink_to("checkpoint-00000002/model")
    CheckpointManager(tmp_path)
    assert not list(tmp_path.glob("model.partial-*")) and (path / "model").is_dir()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_published_model_opens_at_every_moment(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While checkpoints are rotated, replaced and set aside; where names cannot be exchanged, between those moments."""
    if not can_exchange:
        monkeypatch.setattr(f"{CheckpointManager.__module__}.exchange", lambda one, other: False)
        monkeypatch.setattr("llm_trainer.checkpoint.atomic.exchange", lambda one, other: False)
    model, seen, over = tmp_path / "model", [], threading.Event()
    manager = CheckpointManager(tmp_path, keep=1)
    save_number(manager, 1, is_best=True)

    def look() -> None:
        while not over.is_set():
            seen.append(model.exists() or model.exists())  # names are looked up one by one: the first may have gone

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for step in (2, 2, 3, 3, 4):
            save_number(manager, step, is_best=step > 2)
            assert model.resolve() == tmp_path / f"checkpoint-{1 if step < 3 else step:08d}" / "model"
        moved = manager.set_aside(after=2)
        assert moved == (1, tmp_path / "set-aside-1") and model.resolve() == moved[1] / "checkpoint-00000004" / "model"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "set-aside-1"]
        save_number(manager, 1)
        assert model.resolve() == tmp_path / "checkpoint-00000001" / "model"
    finally:
        over.set()
        watcher.join()
    assert len(seen) > 100 and (all(seen) or not can_exchange)


def test_rotation_spares_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    first = save_number(manager, 1)
    with monkeypatch.context() as patched:  # a disk too full for a link
        patched.setattr(Path, "symlink_to", partial(fail_with, OSError(28, os.strerror(28))))
        save_number(manager, 2)
    assert (tmp_path / "model").resolve() == first / "model"
    save_number(manager, 3)
    assert not first.exists() and (tmp_path / "model" / "model.safetensors").read_text() == "3" * 100


def fail_with(error: Exception, *args: Any, **kwargs: Any) -> None:
    raise error


def test_publishing_keeps_a_folder_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious")
    manager = CheckpointManager(tmp_path)
    manager.save(1, lambda folder: (folder / "weights").write_text("1"), {})
    manager.publish()
    assert (tmp_path / "model" / "weights").read_text() == "1"
    assert (tmp_path / "model.before-1" / "mine").read_text() == "precious"
