"""The sections of `gpu.py`, each a process: `python gpu_sections.py NAME DEVICE [--tiny] [--no-compile] [--blocked]`."""

import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# cuBLAS reads it when it starts: resuming bit for bit needs products that always add up in the same order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from gpu_report import Report, fastest, peak_memory, wait_for

TESTS = Path(__file__).resolve().parents[1] / "tests" / "gpu"
PACKAGES = ("transformers", "triton", "flash_attn", "accelerate", "peft", "deepspeed")
DOCUMENTS, TINY_DOCUMENTS = (37, 100, 260, 5, 111), (7, 20, 1, 33)  # lengths of what is packed
# Losses and gradients of packed documents against those of each alone, relative to their size.
PACKED_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def machine(report: Report) -> None:
    """What everything else ran on, and what it could do at best."""
    from importlib.metadata import PackageNotFoundError, version

    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing"
    facts["C compiler"] = shutil.which("cc") or shutil.which("gcc") or "missing"
    if report.device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(report.device)
        facts["memory GiB"] = torch.cuda.get_device_properties(report.device).total_memory / 2**30
        facts["CUDA"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    report.row("versions", facts)
    report.attempt("bf16 matrix product", matrix_product, report)
    report.attempt("memory copy", memory_copy, report)
    if report.can_compile:
        report.attempt("torch.compile", compile_something, report)


def matrix_product(report: Report) -> None:
    report.row("bf16 matrix product", {"TFLOP/s": report.measured_peak() / 1e12})


def memory_copy(report: Report) -> None:
    """Bytes read and written per second."""
    size = 2**30 if report.device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), report.device, 5)
    report.row("memory copy", {"GB/s": 2 * size / seconds / 1e9})


def compile_something(report: Report) -> None:
    """Whether `torch.compile` works here at all: it needs Triton and a C compiler."""
    import time

    values = torch.randn(1024, 1024, device=report.device)
    start = time.perf_counter()
    compiled = torch.compile(lambda x: (x * 2).sin().sum(-1))
    difference = float((compiled(values) - (values * 2).sin().sum(-1)).abs().max())
    assert difference < 1e-3, f"a compiled sum differs by {difference:.2g}"
    report.row("torch.compile", {"first call s": time.perf_counter() - start, "difference": difference})


def checks(report: Report) -> None:
    """Every check of tests/gpu."""
    import checks as gpu_checks

    trainers = ("sft",) if report.tiny else tuple(gpu_checks.TRAINERS)
    for name, check in gpu_checks.all_checks(report.device.type, trainers):
        run_check(report, name, check)


def invariance(report: Report) -> None:
    """Splits, layouts and token budgets, per trainer and precision."""
    import checks as gpu_checks

    trainers = ("sft",) if report.tiny else tuple(gpu_checks.TRAINERS)
    table_of = (lambda trainer, ranks: gpu_checks.cells(trainer, ranks)[:3]) if report.tiny else gpu_checks.cells
    for precision in ("bf16", "fp32"):
        for trainer in trainers:
            check = partial(gpu_checks.splits_do_not_matter, trainer=trainer, precision=precision, table_of=table_of)
            run_check(report, f"{trainer}, {precision}", check)


def run_check(report: Report, name: str, check: Callable[[str], dict[str, float]]) -> None:
    """A check's numbers as a row."""
    numbers = report.attempt(name, check, report.device.type)
    if numbers is not None:
        report.row(name, {"passed": True} | numbers)


def head(report: Report) -> None:
    """Head and loss alone: plain PyTorch against ours."""
    from head import VARIANTS, head_step

    sizes = (
        {"tokens": 128, "width": 32, "vocab": 1000}
        if report.tiny
        else {"tokens": 8192, "width": 1024, "vocab": 151_936}
    )
    options = Namespace(**sizes, device=report.device.type)
    rounds = 2 if report.tiny else 3
    found: dict[str, list[tuple[float, float]]] = {}

    def one_round(variant: str) -> None:
        torch.manual_seed(0)
        step = head_step(variant, options)
        step()
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = fastest(step, report.device, 5)
        found.setdefault(variant, []).append((seconds, peak_memory(report.device)))

    for _ in range(rounds):
        for variant in VARIANTS["head"]:
            report.attempt(variant, one_round, variant)
    for variant, results in found.items():
        seconds = [time for time, _ in results]
        middle = statistics.median(seconds)
        products = 8 if variant == "recomputed" else 6  # the logits, their two gradients; recomputed: the logits again
        flops = products * options.tokens * options.width * options.vocab
        numbers = {"ms": middle * 1e3, "peak GiB": max(memory for _, memory in results)}
        if variant != "plain" and "plain" in found:
            ratios = [theirs / ours for ours, (theirs, _) in zip(seconds, found["plain"], strict=False)]
            numbers["times as fast as plain"] = statistics.median(ratios)
        report.row(variant, numbers | report.utilisation(flops / middle), [1e3 * second for second in seconds])


def _small_model(report: Report, attention: str) -> Any:
    """Two layers with heads of 64, the same weights for every backend."""
    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.models.build import build_model

    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return build_model(shape, attention=resolve_attention(attention, report.device)).to(report.device)


def _scores_and_gradient(
    report: Report, model: Any, batches: list[dict[str, torch.Tensor]], precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all tokens of the batches, one after the other, and the gradient of their sum."""
    from contextlib import nullcontext

    model.zero_grad()
    logprobs = []
    for batch in batches:
        autocast = torch.autocast(report.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with autocast:
            scores = model(**batch)
        scores.loss_sum.backward()
        logprobs.append(scores.logprobs.detach().flatten())
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return torch.cat(logprobs), gradient


def _documents(report: Report) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Documents laid flat in one batch, and each in a batch of its own."""
    import numpy as np

    from llm_trainer.data.collate import LanguageSample, collate_flat, collate_padded

    noise = np.random.default_rng(0)
    samples = []
    for length in TINY_DOCUMENTS if report.tiny else DOCUMENTS:
        ids = noise.integers(3, 512, length)
        samples.append(LanguageSample(input_ids=ids, trained=np.ones(length, dtype=bool), document_lengths=[length]))
    alone = [collate_padded([sample]) for sample in samples]
    batches: list[Any] = [collate_flat(samples), *alone]
    flat, *rest = [{name: value.to(report.device) for name, value in batch.items()} for batch in batches]
    return flat, rest


def attention(report: Report) -> None:
    """Packed documents are unpacked ones, and the compiled model is the plain one, on every backend."""
    from llm_trainer.models.attention import BACKENDS

    flat, alone = _documents(report)
    backends = ("blocked", "sdpa") if report.tiny else BACKENDS
    for backend in backends:
        if backend.startswith("flash_attention") and importlib.util.find_spec("flash_attn") is None:
            report.leave_out(backend, "it needs the package flash_attn, which is not installed")
            continue
        if backend == "flex_attention" and report.device.type != "cuda":
            report.leave_out(backend, "it compiles for minutes on a CPU")
            continue
        for precision in ("bf16",) if backend.startswith("flash_attention") else ("fp32", "bf16"):
            report.attempt(f"{backend}, {precision}", packed, report, backend, precision, flat, alone)
    if report.device.type == "cuda":
        for backend in ("blocked", "flex_attention", "sdpa"):
            report.attempt(f"{backend}, 16 documents of 1,024", packed_speed, report, backend)


def packed(
    report: Report, backend: str, precision: str, flat: dict[str, torch.Tensor], alone: list[dict[str, torch.Tensor]]
) -> None:
    """One backend in one precision."""
    from llm_trainer.models.scored import scored

    model = scored(_small_model(report, backend))
    expected, gradient = _scores_and_gradient(report, model, alone, precision)
    tolerance = PACKED_TOLERANCE[precision]

    def compare(name: str, batches: list[dict[str, torch.Tensor]]) -> None:
        logprobs, found = _scores_and_gradient(report, model, batches, precision)
        numbers = {
            "log-probs": float((logprobs - expected).abs().max()),
            "gradient": float((found - gradient).norm() / gradient.norm()),
        }
        worst = max(numbers.values())
        assert worst < tolerance, f"{numbers}, expected less than {tolerance}"
        report.row(name, {"passed": True} | numbers | {"tolerance": tolerance})

    name = f"{backend}, {precision}"
    report.attempt(f"{name}: packed", compare, f"{name}: packed", [flat])
    if report.can_compile:
        model.compile()
        report.attempt(f"{name}: compiled", compare, f"{name}: compiled", [flat])


def packed_speed(report: Report, backend: str) -> None:
    """Forward and backward of four layers as wide as the 0.6 B model over 16,384 packed tokens."""
    from engines import SHAPES

    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.models.build import build_model
    from llm_trainer.models.scored import scored

    shape = SHAPES["0.6b"] | {"num_hidden_layers": 4, "vocab_size": 6400}
    with report.device:
        built = build_model(ModelConfig(**shape), attention=resolve_attention(backend, report.device))
    model = scored(built)
    lengths = torch.full((16,), 1024)
    ids = torch.randint(3, 6400, (1, int(lengths.sum())), device=report.device)
    positions = torch.arange(1024).repeat(16)[None].to(report.device)

    def step() -> None:
        with torch.autocast(report.device.type, torch.bfloat16):
            scores = model(input_ids=ids, labels=ids, position_ids=positions, document_lengths=lengths)
        scores.loss_sum.backward()

    torch.cuda.reset_peak_memory_stats()
    seconds = fastest(step, report.device, 5)
    numbers = {"tokens/s": ids.numel() / seconds, "peak GiB": peak_memory(report.device)}
    report.row(f"{backend}, 16 documents of 1,024", numbers)


def decoding(report: Report) -> None:
    """Tokens per second of `generation/sampler.py`."""
    from gpu_training import make_model

    model = make_model("tiny" if report.tiny else "0.6b", report.device, report.attention).to(torch.bfloat16)
    sizes, new_tokens, rounds = ((1, 2), 4, 2) if report.tiny else ((1, 16, 64), 96, 2)
    for size in sizes:
        report.attempt(f"batch {size}", decode, report, model, size, new_tokens, rounds)
    report.leave_out("compiled", "the sampler takes the compiled wrapper off: its cache grows by a token per call")


def decode(report: Report, model: Any, size: int, new_tokens: int, rounds: int) -> None:
    """One batch size: prompts of 64 random tokens, sampled at temperature 1 until `new_tokens` each."""
    import time

    import numpy as np

    from llm_trainer.generation.sampler import generate

    prompts = np.random.default_rng(0).integers(16, 6000, (size, 64)).tolist()
    speeds = []
    for number in range(rounds + 1):
        wait_for(report.device)
        start = time.perf_counter()
        length = 4 if number == 0 else new_tokens  # the first call only warms up
        written = generate(model, prompts, max_new_tokens=length, pad_token_id=0, seed=number)
        wait_for(report.device)
        assert all(len(ids) == length for ids in written.ids)
        if number > 0:
            speeds.append(size * length / (time.perf_counter() - start))
    middle = statistics.median(speeds)
    report.row(f"batch {size}", {"tokens/s": middle, "ms per token": 1e3 * size / middle}, speeds)


def training(report: Report, name: str) -> None:
    """`sft-0.6b` and the like."""
    from gpu_training import training

    training(report, *name.split("-", 1))


def bits(report: Report) -> None:
    """Inputs of layers on the host, and float8."""
    from gpu_bits import bits

    bits(report)


OTHERS: dict[str, Callable[[Report], None]] = {
    "machine": machine,
    "checks": checks,
    "invariance": invariance,
    "head": head,
    "attention": attention,
    "decoding": decoding,
    "bits": bits,
}


def run(name: str, report: Report) -> None:
    """Run one section."""
    section = OTHERS[name] if name in OTHERS else partial(training, name=name)
    report.attempt("all", section, report)


def main(name: str, device: str, *flags: str) -> None:
    """Run one section in this process."""
    sys.path[:0] = [str(TESTS), str(Path(__file__).parent)]
    # What is deprecated inside torch and transformers says nothing about this machine.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(1)
    can_compile = place.type == "cuda" and "--no-compile" not in flags
    report = Report(place, "--tiny" in flags, can_compile, "blocked" if "--blocked" in flags else "auto")
    run(name, report)


if __name__ == "__main__":
    main(*sys.argv[1:])
