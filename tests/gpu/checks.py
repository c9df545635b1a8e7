"""What only a GPU can show, as plain functions: pytest calls them (`test_gpu.py`), and so does `benchmarks/gpu.py`.

A check takes the device, raises AssertionError where something is wrong, and returns the numbers it saw.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
import table
from table import TRAINERS, Cell, cells, differences, run

Numbers = dict[str, float]
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05}  # of losses, and of gradient norms relative
CPU_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # the same against the curve of the CPU in fp32
PACKED_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of a loss and its gradients, relative
FLASH = "flash_attention_2"
TIMEOUT_S = 120


def precision_options(precision: str) -> dict[str, Any]:
    """Keywords of a trainer that ask for a precision."""
    return {"use_amp": precision != "fp32", "precision": precision}


def curve_of_the_cpu(device: str, trainer: str, precision: str) -> Numbers:
    """The device's curve is that of the CPU in fp32, as near as the precision allows."""
    cell = Cell(trainer, 8, 1)
    found = max(differences(run(cell, device, **precision_options(precision)), run(cell)))
    assert found < CPU_TOLERANCE[precision], f"{cell} in {precision} is {found:.2g} from the curve of the CPU"
    return {"difference": found, "tolerance": CPU_TOLERANCE[precision]}


def splits_do_not_matter(
    device: str, trainer: str, precision: str, table_of: Callable[[str, int], list[Cell]] = cells
) -> Numbers:
    """Every way to cut a step of eight rows (rows, padded or flat, token budgets) gives the same losses and norms."""
    options = precision_options(precision)
    base = run(Cell(trainer, 8, 1), device, **options)
    worst, where = 0.0, None
    ways = table_of(trainer, 1)
    for cell in ways:
        found = max(differences(run(cell, device, **options), base))
        if found > worst:
            worst, where = found, cell
    assert worst < TOLERANCE[precision], f"{where} in {precision} differs by {worst:.2g}"
    return {"cells": len(ways), "difference": worst, "tolerance": TOLERANCE[precision]}


def _train(device: str, folder: str, steps: int, **options: Any) -> tuple[Any, list[float]]:
    """An SFT trainer of the tiny model after `steps` steps, and the loss of each of them."""
    from llm_trainer import SFTTrainer, configure_optimizer
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream

    model = table.tiny_model()
    trainer = SFTTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=SampleStream(table.Rows("pretrain", 512), collate_padded, rows_per_step=8, batch_size=4),
        device=device,
        max_epochs=100,
        max_steps=steps,
        grad_accum_steps=2,
        log_interval=1,
        save_dir=folder,
        save_interval=1000,
        progress=False,
        **options,
    )
    trainer.train()
    lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [values["loss"] for values in map(json.loads, lines) if "loss" in values]
    return trainer, losses


@contextmanager
def _deterministic() -> Any:
    """Kernels that give the same bits every time, where there are such."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def resume_is_bit_for_bit(device: str, precision: str) -> Numbers:
    """Six steps at once have the losses of three steps and three more from their checkpoint."""
    options = precision_options(precision)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as halves, _deterministic():
        trainer, losses = _train(device, whole, 6, **options)
        _train(device, halves, 3, **options)
        resumed, continued = _train(device, halves, 6, resume="auto", **options)
    assert continued[-3:] == losses[-3:], f"{continued} after resuming, {losses} without"
    ours, theirs = trainer.base_model.state_dict(), resumed.base_model.state_dict()
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not unequal, f"weights differ after resuming: {unequal[:3]}"
    return {"steps": 6, "last_loss": losses[-1]}


def a_trial_sees_enough(device: str) -> Numbers:
    """What two rows take, token by token, is enough for eight; what they took is given back, and the weights are as before."""
    from llm_trainer.train import trial

    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = _train(device, folder, 1, use_amp=False)
    work, source = trainer.run.work, trainer.run.source
    weights = [parameter.clone() for parameter in trainer.base_model.parameters()]
    before = torch.cuda.memory_allocated(device)
    source.batch_size = 2
    per_token = trial.bytes_per_token(work, source)
    torch.cuda.synchronize(device)
    left = torch.cuda.memory_allocated(device) - before
    source.batch_size = 8
    of_eight = trial.bytes_per_token(work, source)
    assert per_token is not None and of_eight is not None and 0 < of_eight <= 1.1 * per_token
    assert left <= 1 << 20, f"{left:,} bytes are left of a trial"
    for parameter, was in zip(trainer.base_model.parameters(), weights, strict=True):
        assert torch.equal(parameter, was) and parameter.grad is None
    return {"bytes_per_token": per_token, "of_eight_rows": of_eight}


def images_stay_apart(device: str, family: str, attention: str, precision: str) -> Numbers:
    """Documents with images, laid flat in one row, have the loss and the gradients of the same documents padded."""
    from vision_families import family_model
    from vision_rows import flat, gradients, images, padded

    from llm_trainer.image_batch import moved
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.models.scored import scored

    model = family_model(family, resolve_attention(attention, device)).to(device)
    ours = scored(model)
    shown = images(ours).to(device)
    each = int(shown.lengths[0])
    is_half = precision == "bf16"
    losses, norms = [], []
    for batch in (padded(each), flat(each)):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half):
            scores = ours(**moved(batch, device), images=shown)
        scores.loss_sum.backward()
        losses.append(scores.loss_sum.item())
        norms.append(gradients(model))
    of_loss = abs(losses[1] - losses[0]) / losses[0]
    of_gradients = float((norms[1] - norms[0]).norm() / norms[0].norm())
    worst, tolerance = max(of_loss, of_gradients), PACKED_TOLERANCE[precision]
    assert worst < tolerance, f"{family} on {attention} in {precision}: packed differs from padded by {worst:.2g}"
    return {"loss": of_loss, "gradients": of_gradients, "tolerance": tolerance}


def opens_on_the_cpu(device: str, precision: str = "bf16") -> Numbers:
    """A checkpoint saved on the device goes on on the CPU, from the same weights and the same optimizer state."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = _train(device, folder, 3, **precision_options(precision))
        saved = {name: tensor.cpu() for name, tensor in trainer.base_model.state_dict().items()}
        again, _ = _train("cpu", folder, 3, resume="auto", use_amp=False)  # already there: it only loads
        for name, tensor in again.base_model.state_dict().items():
            assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
            assert torch.equal(tensor, saved[name]), f"{name} differs after loading"
        _, losses = _train("cpu", folder, 5, resume="auto", use_amp=False)
    assert len(losses) == 5, f"expected three steps on the device and two on the CPU, found {losses}"
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def fp16_skips_an_overflow(device: str) -> Numbers:
    """A loss scale that is far too large skips steps and comes down; then the run learns."""
    from llm_trainer.engine.torch import TorchEngine

    start_scale = 2.0**26
    build = TorchEngine.__init__

    def with_large_scale(engine: TorchEngine, *args: Any, **kwargs: Any) -> None:
        build(engine, *args, **kwargs)
        engine._scaler = torch.amp.GradScaler(engine.device.type, init_scale=start_scale)

    TorchEngine.__init__ = with_large_scale  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer, losses = _train(device, folder, 60, max_bad_steps=40, **precision_options("fp16"))
    finally:
        TorchEngine.__init__ = build  # type: ignore[method-assign]
    skipped, scale = trainer.run.progress.skipped_steps, trainer.run.engine._scaler.get_scale()
    assert skipped > 0, f"no step was skipped at a loss scale of {start_scale:g}"
    assert scale == start_scale / 2**skipped, f"{skipped} steps were skipped, and the scale is {scale:g}"
    assert losses[-1] < losses[0] - 0.5, f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}"
    return {"skipped_steps": skipped, "scale": scale, "first_loss": losses[0], "last_loss": losses[-1]}


def ddp_of_one_process(device: str) -> Numbers:
    """DistributedDataParallel over NCCL (gloo on the CPU) in a group of one process steps as the plain engine does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run(
        [*torchrun, __file__, device], capture_output=True, text=True, timeout=TIMEOUT_S, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _ddp_steps(device_name: str) -> None:
    """Two steps with and without DDP in this process, started by torchrun; prints how far apart their norms are."""
    from llm_trainer import configure_optimizer
    from llm_trainer.engine.device import detect_device
    from llm_trainer.engine.torch import TorchEngine
    from llm_trainer.models.scored import scored

    device = detect_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # `engine.dist` starts no group for one process, which needs none.
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ids = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(0)).to(device)
    norms: dict[bool, list[float]] = {}
    for ddp in (False, True):
        model = table.tiny_model().to(device)
        optimizer = configure_optimizer(model=model, lr=1e-2)
        engine = TorchEngine(device, "fp32", ddp=ddp)
        module = engine.prepare(scored(model), model, optimizer)
        norms[ddp] = []
        for _ in range(2):
            with engine.micro_step(last=True):
                scores = module(input_ids=ids, labels=ids)
                engine.backward(scores.loss_sum / scores.num_tokens)
            grad_norm, _ = engine.step(1.0)
            norms[ddp].append(grad_norm)
    found = max(abs(a - b) / b for a, b in zip(norms[True], norms[False], strict=True))
    assert found < 1e-5, f"gradient norms with and without DDP: {norms}"
    torch.distributed.destroy_process_group()
    print(json.dumps({"difference": found, "tolerance": 1e-5}))


def packed_images(device: str) -> list[tuple[str, str, str]]:
    """Families that see, with the attention and the precision in which they are packed on a device."""
    found = []
    for family in ("llava", "qwen2_5_vl", "qwen3_vl"):
        found += [(family, "auto", "fp32"), (family, "sdpa", "bf16")]
        if device != "cpu" and importlib.util.find_spec("flash_attn"):
            found.append((family, FLASH, "bf16"))
    return found


Check = tuple[str, Callable[[str], Numbers]]


def all_checks(device: str, trainers: tuple[str, ...] = tuple(TRAINERS)) -> list[Check]:
    """Every check of this file but the splits, by name; fp16 needs a GPU."""
    on_gpu = device != "cpu"
    halves = ("bf16", "fp16") if on_gpu else ("bf16",)
    checks: list[Check] = []
    for precision in ("fp32", *halves):
        for trainer in trainers:
            name = f"{trainer}: {precision} has the curve of the CPU"
            checks.append((name, partial(curve_of_the_cpu, trainer=trainer, precision=precision)))
    for precision in ("fp32", "bf16"):
        checks.append((f"{precision}: resuming is bit for bit", partial(resume_is_bit_for_bit, precision=precision)))
    for family, attention, precision in packed_images(device):
        check = partial(images_stay_apart, family=family, attention=attention, precision=precision)
        checks.append((f"{family}: images of packed documents on {attention} in {precision}", check))
    checks.append(("a checkpoint of the device goes on on the CPU", opens_on_the_cpu))
    checks.append(("DDP of one process is the plain engine", ddp_of_one_process))
    if on_gpu:
        checks.append(("fp16 skips an overflow, then learns", fp16_skips_an_overflow))
        checks.append(("a trial shows what a token takes", a_trial_sees_enough))
    return checks


if __name__ == "__main__":
    _ddp_steps(sys.argv[1])
