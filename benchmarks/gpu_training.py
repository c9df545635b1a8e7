"""Training speed for `gpu.py`: our trainers against a hand-written loop and `transformers.Trainer`.

All variants train the same model with the same optimizer in one process, in alternating windows of a few steps, so that
what the machine does meanwhile meets all of them, and the memory of the state stands once.
"""

import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from engines import SHAPES, SMALLEST_VOCABULARY, Rows
from gpu_report import Report, peak_memory, wait_for

from llm_trainer import DPOTrainer, SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import collate_padded
from llm_trainer.data.kinds.pairs import collate_pairs
from llm_trainer.data.stream import SampleStream
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.build import build_model, flops_per_token
from llm_trainer.train.hooks import Hook

ROWS_PER_STEP = 2  # of 4,096 tokens; in DPO the two answers of a pair
LEARNING_RATE, BETA, MAX_GRAD_NORM = 1e-5, 0.1, 1.0
FORWARD_SHARE = 1 / 3  # of the FLOPs of a training step; a reference costs one forward

Window = Callable[[int], float]  # number of steps -> seconds per step


class PairRows:
    """Pairs of random full rows whose first halves are the prompt, the same in both."""

    def __init__(self, number: int, context: int) -> None:
        self.sides = Rows(2 * number, context)
        self.lengths = np.full(number, 2 * context)
        self.file_sizes, self.context = [number], context

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen, rejected = self.sides[2 * index], self.sides[2 * index + 1]
        half = self.context // 2
        rejected["input_ids"][:half] = chosen["input_ids"][:half]
        for side in (chosen, rejected):
            side["trained"][:half] = False
        return {"chosen": chosen, "rejected": rejected, "margin": 0.0}


class Enough(Exception):
    """Leaves `trainer.train()` after a window; the next call goes on from there."""


def our_window(trainer: Any, clock: list[Callable[[], None]], device: torch.device) -> Window:
    """Windows of one of our trainers; `clock` holds what its hook calls after every step."""

    def window(steps: int) -> float:
        ends: list[float] = []
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if done == 1 or done == steps + 1:  # the first step is not timed
                wait_for(device)
                ends.append(time.perf_counter())
            if done == steps + 1:
                raise Enough

        clock[:] = [tick]
        with contextlib.suppress(Enough):
            trainer.train()
        return (ends[1] - ends[0]) / steps

    return window


def our_trainer(kind: str, model: Any, reference: Any, optimizer: Any, how: dict[str, Any]) -> Window:
    """Our trainer with its own loader, hooks and logs."""
    is_dpo = kind == "dpo"
    number = 100_000
    if is_dpo:
        stream = SampleStream(
            PairRows(number, how["context"]),
            lambda samples: collate_pairs(samples, collate_padded),
            rows_per_step=ROWS_PER_STEP // 2,
            batch_size=ROWS_PER_STEP // 2,
        )
    else:
        stream = SampleStream(
            Rows(number, how["context"]), collate_padded, rows_per_step=ROWS_PER_STEP, batch_size=ROWS_PER_STEP
        )
    clock: list[Callable[[], None]] = []
    options = {"ref_model": reference, "starts_at_reference": False, "beta": BETA} if is_dpo else {}
    trainer = (DPOTrainer if is_dpo else SFTTrainer)(
        model=model,
        optimizer=optimizer,
        train_loader=stream,
        device=how["device"],
        max_epochs=1,
        max_grad_norm=MAX_GRAD_NORM,
        precision="bf16",
        compile=how["compile"],
        log_interval=10_000,
        save_interval=0,
        save_dir=tempfile.mkdtemp(),
        progress=False,
        hooks=[Hook("clock", lambda run: clock[0](), every_steps=1)],
        **options,
    )
    return our_window(trainer, clock, torch.device(how["device"]))


def _batches(kind: str, context: int) -> Iterator[dict[str, torch.Tensor]]:
    """Ids and labels `[ROWS_PER_STEP, context]` of the same kind of rows; chosen before rejected."""
    rows: Any = PairRows(100_000, context) if kind == "dpo" else Rows(100_000, context)
    index = 0
    while True:
        if kind == "dpo":
            pair = rows[index]
            samples = [pair["chosen"], pair["rejected"]]
            index += 1
        else:
            samples = [rows[index + i] for i in range(ROWS_PER_STEP)]
            index += ROWS_PER_STEP
        batch = collate_padded(samples)
        yield {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def _answer_logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[rows]` summed log-probabilities of the labels, as a DPO loop writes them."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return -losses.view(labels.shape).sum(1)


def hand_loop(kind: str, model: Any, reference: Any, optimizer: Any, how: dict[str, Any]) -> Window:
    """The loop that a careful person writes: a transformers model, bf16 autocast, fused AdamW, clipped gradients."""
    device = torch.device(how["device"])
    parameters = list(model.parameters())
    policy = torch.compile(model) if how["compile"] else model
    frozen = torch.compile(reference) if how["compile"] and reference is not None else reference
    batches = _batches(kind, how["context"])

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if kind != "dpo":
            return policy(**batch, use_cache=False).loss
        with torch.no_grad():
            expected = _answer_logps(frozen, batch)
        log_ratios = _answer_logps(policy, batch) - expected
        chosen, rejected = log_ratios.chunk(2)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    def step() -> None:
        batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def window(steps: int) -> float:
        model.train()
        step()
        wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        return (time.perf_counter() - start) / steps

    return window


def transformers_trainer(kind: str, model: Any, reference: Any, optimizer: Any, how: dict[str, Any]) -> Window:
    """`transformers.Trainer` on a copy of the model, whose forward it replaces."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    own = deepcopy(model)
    context, device = how["context"], torch.device(how["device"])

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = np.random.default_rng(index).integers(16, SMALLEST_VOCABULARY, context)
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):
        def __init__(self, steps: int) -> None:
            self.steps, self.ends = steps, []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, self.steps + 1):
                wait_for(device)
                self.ends.append(time.perf_counter())

    def window(steps: int) -> float:
        clock = Clock(steps)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps + 1,
                per_device_train_batch_size=ROWS_PER_STEP,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=MAX_GRAD_NORM,
                optim="adamw_torch_fused",
                bf16=True,
                use_cpu=device.type == "cpu",
                torch_compile=how["compile"],
                logging_steps=10_000,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            Trainer(model=own, args=arguments, train_dataset=Dataset(), callbacks=[clock]).train()
        return (clock.ends[1] - clock.ends[0]) / steps

    return window


BUILDERS = {"hand": hand_loop, "ours": our_trainer, "transformers.Trainer": transformers_trainer}


def training(report: Report, kind: str, shape: str) -> None:
    """Rows of one algorithm and model: tokens/s, MFU and peak memory of every variant, and ratios within a round."""
    device = report.device
    rounds, steps = (2, 2) if report.tiny else (3, 6)
    context = 16 if report.tiny else 4096  # so few tokens that no kernel is compiled
    model = make_model("tiny" if report.tiny else shape, device, report.attention)
    reference = deepcopy(model).requires_grad_(False).eval() if kind == "dpo" else None
    optimizer = configure_optimizer(model=model, lr=LEARNING_RATE)
    flops = flops_per_token(model, context) * (1 + FORWARD_SHARE * (kind == "dpo"))
    windows: dict[str, Window] = {}

    def start(name: str, compiled: bool) -> None:
        """Build a variant and let it run two steps, in which everything compiles."""
        how = {"context": context, "device": device.type, "compile": compiled}
        window = BUILDERS[name](kind, model, reference, optimizer, how)
        label = f"{name}, compiled" if compiled else name
        began = time.perf_counter()
        window(1)
        report.say(f"{label}: the first two steps took {time.perf_counter() - began:.1f} s")
        windows[label] = window

    plain = ["hand", "ours"]
    wanted = [(name, False) for name in plain]
    if report.can_compile:
        wanted += [(name, True) for name in plain]
    if kind == "sft" and shape == "0.6b":
        if importlib.util.find_spec("accelerate") is None:
            report.leave_out("transformers.Trainer", "it needs accelerate, which is not installed")
        else:
            wanted.append(("transformers.Trainer", False))
    found: dict[str, list[tuple[float, float]]] = {}
    for name, compiled in wanted:
        label = f"{name}, compiled" if compiled else name
        report.attempt(label, start, name, compiled)
        if label in windows and compiled:  # compiling takes most of the time: keep what there is
            results = report.attempt(label, measure, windows[label], steps, context, flops, report)
            if results is not None:
                report.row(f"{label}, first round", results[0])

    for _ in range(rounds):
        for label in list(windows):
            results = report.attempt(label, measure, windows[label], steps, context, flops, report)
            if results is None:
                del windows[label]
                continue
            numbers, memory = results
            found.setdefault(label, []).append((numbers["tokens/s"], memory))
    for label in windows:
        report.row(label, *summary(label, found, flops, report))
    if device.type == "cuda" and windows:
        report.attempt("profile", profile, list(windows)[-1], windows, report)


def make_model(shape: str, device: torch.device, attention: str) -> Any:
    """A model with random weights on `device`, made there."""
    with device:
        return build_model(ModelConfig(**SHAPES[shape]), attention=resolve_attention(attention, device))


def measure(window: Window, steps: int, context: int, flops: float, report: Report) -> tuple[dict[str, float], float]:
    """Numbers of one window, and its peak memory in GiB."""
    if report.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = window(steps)
    speed = ROWS_PER_STEP * context / seconds
    memory = peak_memory(report.device)
    return {"tokens/s": speed, "ms per step": seconds * 1e3} | report.utilisation(speed * flops), memory


def summary(
    label: str, found: dict[str, list[tuple[float, float]]], flops: float, report: Report
) -> tuple[dict[str, float], list[float]]:
    """Medians of a variant, and its ratio to the hand-written loop of the same kind, round by round."""
    speeds = [speed for speed, _ in found[label]]
    middle = statistics.median(speeds)
    numbers = {"tokens/s": middle} | report.utilisation(middle * flops)
    numbers["peak GiB"] = max(memory for _, memory in found[label])
    for baseline in ("hand", "hand, compiled"):
        if baseline != label and baseline in found:
            pairs = zip(speeds, [speed for speed, _ in found[baseline]], strict=False)
            numbers[f"/ {baseline}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return numbers, speeds


def profile(label: str, windows: dict[str, Window], report: Report) -> None:
    """What the device does in two steps of a variant: the kernels that take longest, and how busy it is."""
    from torch.profiler import ProfilerActivity

    label = "ours, compiled" if "ours, compiled" in windows else label
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = windows[label](1)
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total_us = sum(event.self_device_time_total for event in kernels)
    report.row(f"profile of {label}", {"busy share": total_us / (2e6 * seconds), "kernels": len(kernels)})
    for event in kernels[:14]:
        numbers = {"share": event.self_device_time_total / total_us, "calls": event.count}
        report.row(f"kernel {event.key[:90]}", numbers)
