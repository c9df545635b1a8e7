"""What `llm-trainer plan` predicts for the memory of a training step, against what PyTorch allocates in one.

`python benchmarks/plan_error.py` trains three steps of each case with our own trainers and prints predicted / measured.

Measured is the peak of live bytes: weights and optimizer state are counted tensor by tensor, and during the third step
the profiler reports every allocation and release of PyTorch's CPU allocator, also those inside of kernels. Their running
sum is exact; the resident size of the process also has what the allocator of the system and the compiler keep.

`torchrun --standalone --nproc-per-node=2 benchmarks/plan_error.py --strategy fsdp` (or `ddp`) measures the main one of
several processes in the same way.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_trainer import AdapterConfig, DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer, adapt, configure_optimizer
from llm_trainer.config.env import environment
from llm_trainer.config.model import ModelConfig, MoeConfig, VLMConfig
from llm_trainer.config.vision import VisionConfig
from llm_trainer.engine import dist
from llm_trainer.engine.device import DTYPES
from llm_trainer.models.build import build_model
from llm_trainer.models.freezing import freeze_parts
from llm_trainer.models.quantize import stored_bytes
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.models.rewarding import reward_model
from llm_trainer.models.vision import unreached
from llm_trainer.plan.describe import quantized_by
from llm_trainer.plan.memory import DDP, FSDP2, ONE, Step, Strategy, peak
from llm_trainer.plan.shapes import Job, Shape, optimizer_bytes, shape_of, update_bytes
from llm_trainer.train.hooks import Hook
from llm_trainer.train_configs import QuantizationConfig
from llm_trainer.trainers.distill import CHUNK_ELEMENTS

IMAGE, SIDE, PATCH, PATCHES = 3, 64, 8, 64
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STRATEGIES = {"one": ONE, "ddp": DDP, "fsdp": FSDP2}


@dataclass(frozen=True)
class Case:
    """A model, a batch and a way to train; `whole` makes all logits at once in a plain loop.

    `adapters` are on "layers", or on "layers and head"; `bits` of the weights below them, 0: all. `images` are in a row, for a
    LLaVA with a tower of width `tower` over 64 patches; `frozen` are parts of it.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 6400
    width: int | None = None
    rows: int = 4
    length: int = 256
    precision: str = "fp32"
    checkpointing: bool = False
    architecture: str = "qwen3"
    optimizer: str = "adamw"
    algorithm: str = "sft"
    tied: bool = True
    experts: int = 0
    accumulation: int = 1
    whole: bool = False
    adapters: str = ""
    bits: int = 0
    images: int = 0
    tower: int = 256
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ", ".join(name if value is True else f"{name} {value}" for name, value in told.items()) or "plain"


def config_of(case: Case) -> ModelConfig:
    """The shape of the model of a case."""
    moe = None
    if case.experts:
        moe = MoeConfig(num_experts=case.experts, num_experts_per_tok=2, moe_intermediate_size=case.width or 256)
    values: dict[str, Any] = {
        "architecture": "qwen3_moe" if case.experts else case.architecture,
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "max_position_embeddings": case.length,
        "tie_word_embeddings": case.tied,
        "moe": moe,
    }
    if not case.images:
        return ModelConfig(**values)
    tower = VisionConfig(
        hidden_size=case.tower, num_hidden_layers=case.layers, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
    )
    return VLMConfig(**values, vision=tower, image_token_id=IMAGE)


def model_of(case: Case) -> Any:
    """The model of a case, with random weights."""
    model = build_model(config_of(case))
    if case.bits:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            how = QuantizationConfig(bits=case.bits)  # type: ignore[arg-type]
            device, dtype = torch.device("cpu"), DTYPES[case.precision]
            model = build_model(folder, options=loading_options(how, folder, device, dtype))
    if case.adapters:
        return adapted(model, case)
    if case.images:
        freeze_parts(model, case.frozen)
        for name in unreached(model, with_images=True):
            model.get_parameter(name).requires_grad_(False)
    return reward_model(model, 0) if case.algorithm == "reward" else model


def adapted(model: Any, case: Case) -> Any:
    """With adapters on the layers of a case."""
    target: Any = "all-linear"
    if "head" in case.adapters:
        target = [*LAYERS, "lm_head"]
    return adapt(model, AdapterConfig(rank=8, target=target))


def shape_of_case(case: Case, model: Any) -> Shape:
    """As `llm-trainer plan` sees a case: from a model without weights, where it has adapters."""
    if not case.adapters:
        return shape_of(model)
    empty, quantized = build_model(config_of(case), empty=True), None
    if case.bits:
        quantized = quantized_by(empty, QuantizationConfig(bits=case.bits))  # type: ignore[arg-type]
    return shape_of(adapted(empty, case).get_base_model(), quantized)


def predicted(case: Case, model: Any, strategy: Strategy = ONE) -> float:
    """Bytes that the plan expects at the peak on one device."""
    shape, pairs = shape_of_case(case, model), case.algorithm in ("dpo", "reward")
    job = Job(
        row_tokens=case.length,
        rows=case.rows * case.accumulation,
        rows_per_sample=2 if pairs else 1,
        flops_per_token=0.0,
        state_bytes=optimizer_bytes(case.optimizer, 0.0, model),
        update_bytes=update_bytes(case.optimizer, model),
        precision=case.precision,
        frozen_bytes=4.0 * shape.num_parameters if case.algorithm in ("dpo", "kto", "kd") else 0.0,
        teacher_chunk=CHUNK_ELEMENTS if case.algorithm == "kd" else 0,
        has_head=case.algorithm != "reward",
    )
    step = Step(
        case.rows * job.sample_tokens,
        case.checkpointing,
        not case.whole,
        case.accumulation > 1,
        on_gpu=False,
        patches=case.rows * case.images * PATCHES,
    )
    return peak(shape, job, strategy, environment().world_size, step).total


def weight_bytes(models: list[Any]) -> float:
    """Bytes of weights, with the scales of those in few bits."""
    every = [parameter for model in models for parameter in model.parameters()]
    scales = sum(stored_bytes(parameter) - parameter.nbytes for parameter in every)
    return tensor_bytes(every) + scales


def tensor_bytes(tensors: Any) -> int:
    """Bytes of distinct tensors, of sharded ones those that are here."""
    here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    distinct = {t.data_ptr(): t.numel() * t.element_size() for t in here if t.numel() > 1}
    return sum(distinct.values())


def peak_of(profiled: torch.profiler.profile) -> int:
    """The largest running sum of what was allocated and released, in bytes."""
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = largest = 0
    for _, change in changes:
        total += change
        largest = max(largest, total)
    return largest


def batch_of(case: Case) -> dict[str, Tensor]:
    """Random tokens `[B, T]`, every one of them supervised as far as the algorithm allows."""
    ids = torch.randint(IMAGE + 1, case.vocab, (case.rows, case.length))
    if case.images:
        ids[:, : case.images * PATCHES] = IMAGE
        pixels = torch.randn(case.rows * case.images, 3, SIDE, SIDE)
        return {"input_ids": ids, "labels": ids, "pixel_values": pixels}
    if case.algorithm in ("sft", "kd"):
        return {"input_ids": ids, "labels": ids}
    prompt, answer = ids[:, :2], ids[:, 2:]
    parts = {"prompt": prompt, "chosen": answer, "rejected": answer.flip(1)}
    further = {}
    if case.algorithm == "kto":
        parts, further = {"prompt": prompt, "completion": answer}, {"desirable": torch.arange(case.rows) % 2 == 0}
    masks = {f"{name}_attention_mask": torch.ones_like(part) for name, part in parts.items()}
    return {f"{name}_input_ids": part for name, part in parts.items()} | masks | further


def measured(case: Case, model: Any, strategy: Strategy = ONE) -> float:
    """Bytes at the peak of the third training step."""
    gradients = tensor_bytes(model.parameters()) if strategy is DDP else 0  # its buckets are never released
    profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    optimizer = configure_optimizer(model, case.optimizer, lr=1e-5)
    batch = batch_of(case)
    if case.whole:
        step = hand_step(model, optimizer, batch, case.precision, case.checkpointing)
        step()
        step()
        with profiled:
            step()
        return weight_bytes([model]) + state_bytes(optimizer) + peak_of(profiled)

    def watch(run: Any) -> None:
        if run.progress.step == 2:
            profiled.start()
        elif run.progress.step == 3:
            profiled.stop()

    classes: dict[str, Any] = {"dpo": DPOTrainer, "kto": KTOTrainer, "reward": RewardTrainer}
    frozen = {"dpo": "ref_model", "kto": "ref_model", "kd": "teacher_model"}.get(case.algorithm)
    further = {} if frozen is None else {frozen: model_of(case)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = classes.get(case.algorithm, SFTTrainer)(
            model=model,
            optimizer=optimizer,
            train_loader=[batch] * (3 * case.accumulation * environment().world_size),
            max_epochs=1,
            grad_accum_steps=case.accumulation,
            precision=case.precision,
            gradient_checkpointing=case.checkpointing,
            packing="none",
            micro_batch_tokens=None,
            compile=False,
            device="cpu",
            engine="fsdp" if strategy is FSDP2 else "torch",
            save_dir=folder,
            save_interval=0,
            progress=False,
            hooks=[Hook("watch", watch, every_steps=1)],
            **further,
        )
        trainer.train()
    models = [model, *further.values()]
    return gradients + weight_bytes(models) + state_bytes(optimizer) + peak_of(profiled)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return tensor_bytes(value for value in values if isinstance(value, Tensor))


def hand_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], precision: str, checkpointing: bool
) -> Callable[[], None]:
    """A step of a plain loop over a transformers model, which makes all logits."""
    precise = precision == "fp32"
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


PLAIN = Case()
SEEING: list[dict[str, Any]] = [
    {"images": 2},
    {"images": 2, "hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "tower": 384, "rows": 2},
    {"images": 3, "tower": 640, "layers": 6, "rows": 6, "vocab": 2000},
    {"images": 2, "frozen": ("vision",)},
    {"images": 2, "frozen": ("language", "vision")},
    {"images": 2, "frozen": ("language",), "tower": 512},
]
CASES = [
    replace(PLAIN, precision=precision, checkpointing=checkpointing, **changes)
    for changes in (
        dict[str, Any](),
        {"rows": 1, "length": 128},
        {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "rows": 2},
        {"layers": 2, "rows": 8, "length": 512},
        {"architecture": "llama", "kv_heads": 4, "width": 1024, "tied": False},
        {"vocab": 32000, "layers": 2},
        {"optimizer": "lion", "accumulation": 2, "rows": 2},
        {"experts": 4, "width": 256},
        {"optimizer": "muon"},
        {"optimizer": "adafactor", "layers": 2, "rows": 1},
        {"optimizer": "sgd", "layers": 2, "rows": 1, "length": 128},
        {"algorithm": "dpo", "rows": 2},
        {"algorithm": "kto", "rows": 2},
        {"algorithm": "kd", "rows": 2},
        {"algorithm": "reward", "rows": 2},
        {"whole": True, "rows": 2},
        {"adapters": "layers"},
        {"adapters": "layers and head", "tied": False},
        {"adapters": "layers", "whole": True, "rows": 2},
        {"adapters": "layers", "architecture": "llama", "width": 1024, "tied": False},
        {"adapters": "layers", "bits": 4},
        {"adapters": "layers", "bits": 8},
        {"adapters": "layers", "bits": 4, "vocab": 512, "length": 512},
        {"adapters": "layers", "bits": 8, "vocab": 512, "length": 512},
        {"adapters": "layers and head", "bits": 4, "tied": False},
        {"optimizer": "adamw8bit"},
        *SEEING,
    )
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
]
SMALL = replace(PLAIN, rows=2, length=128, vocab=512)  # nothing of it is large enough to be compiled
QUICK = [
    SMALL,
    replace(SMALL, precision="bf16"),
    replace(SMALL, precision="bf16", checkpointing=True, architecture="llama", tied=False, optimizer="lion"),
    replace(SMALL, layers=2, checkpointing=True, accumulation=2),
    replace(SMALL, adapters="layers and head", tied=False),
    replace(SMALL, adapters="layers", precision="bf16", rows=4),
    replace(SMALL, images=1, tower=128, precision="bf16"),
]
FEW_BITS = [  # need bitsandbytes
    replace(SMALL, adapters="layers", bits=4),
    replace(SMALL, adapters="layers", bits=4, precision="bf16", rows=4),
    replace(PLAIN, adapters="layers", bits=8, checkpointing=True),
    replace(SMALL, optimizer="adamw8bit"),
]


def compare(case: Case, strategy: Strategy = ONE) -> tuple[float, float]:
    """Predicted and measured bytes of a case."""
    torch.manual_seed(0)
    model = model_of(case)
    expected = predicted(case, model, strategy)
    return expected, measured(case, model, strategy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the cases of the test")
    parser.add_argument("--strategy", choices=STRATEGIES, default="one")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'predicted MB':>12} {'measured MB':>12} {'error':>7}  case")
    worst = 0.0
    for case in [*QUICK, *FEW_BITS] if options.quick else CASES:
        if options.strategy != "one" and (case.whole or case.optimizer == "adafactor"):
            continue  # torch 2.13's Adafactor cannot take the norm of a sharded gradient
        expected, found = compare(case, STRATEGIES[options.strategy])
        error = expected / found - 1
        worst = max(worst, error, key=abs)
        if dist.is_main():
            print(f"{expected / 1e6:12.1f} {found / 1e6:12.1f} {error:+7.1%}  {case}", flush=True)
    if dist.is_main():
        print(f"worst: {worst:+.1%}")
    dist.stop()


if __name__ == "__main__":
    main()
