"""Sharded runs with every option, and runs that a YAML describes. Started by test_fsdp.py."""

import hashlib
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from layouts import make_trainer
from ranks import fork_ranks, import_once
from table import tiny_model

from failing_memory import FailingMemory, num_rows
from later_copies import LaterCopies
from llm_trainer import DPOTrainer, configure_optimizer, create_trainer
from llm_trainer.checkpoint import full_tensor, optimizer_state_by_name
from llm_trainer.config.errors import is_installed
from llm_trainer.config.options import Fsdp
from llm_trainer.engine import dist, recompute
from llm_trainer.models.scored import ScoredModel
from llm_trainer.trainers.base import BaseTrainer
from policies import tiny

STEPS = 3
ADAPTED: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    "fsdp": {"engine": "fsdp"},
    "zero-3": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}},
}
REFERENCE = Path(__file__).parents[1] / "reference"


def curve(folder: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """A few steps; the curve, the share of parameters that this rank holds, and their type."""
    if "fsdp" in options:
        dist.share_data(
            options["fsdp"].tensor_parallel_size
        )  # before the stream asks which part of the data is this rank's
    trainer = make_trainer(folder, STEPS, **{"engine": "fsdp", "use_amp": False, **options})
    trainer.train()
    parameters = list(trainer.base_model.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return {
        "curve": curve(folder) if dist.is_main() else [],
        "share": held / sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype),
        "precision": trainer.run.engine.precision_name,
    }


def offloaded(folder: Path) -> dict[str, Any]:
    """Layers that are computed again, what enters them kept on the host, on three engines."""
    made: list[LaterCopies] = []

    def make(device: torch.device) -> LaterCopies:
        made.append(LaterCopies(device))
        return made[-1]

    recompute.COPIES["cpu"] = make
    recompute.ON_THEIR_WAY = 1  # of two layers, so that one comes back
    found: dict[str, Any] = {}
    for name, how in ADAPTED.items():
        options = {"gradient_checkpointing": True, "activation_offload": True, "use_amp": False, **how}
        make_trainer(folder / name, STEPS, **options).train()
        found[name] = curve(folder / name) if dist.is_main() else []
    inward = [sum(not copy.outward for copy in copies.begun) for copies in made]
    return {"curves": found, "inward": inward}


def short_of_memory(folder: Path) -> str:
    """The second rank cannot hold two rows of its second step, and nobody may wait for it; what this rank says then."""
    trainer = make_trainer(folder, STEPS, engine="fsdp", micro_batch_tokens=None, save_interval_steps=1)

    def fails(batch: dict[str, Any]) -> str:
        return "backward" * (dist.rank() == 1 and trainer.machine.step == 1 and num_rows(batch) > 1)

    FailingMemory(trainer, trainer.base_model.model.layers[1], fails)
    try:
        trainer.train()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def started_again(folder: Path) -> dict[str, Any]:
    """The same run, whose micro-batches are smaller now."""
    trainer = make_trainer(folder, STEPS, engine="fsdp", micro_batch_tokens=None)
    trainer.train()
    return {"curve": curve(folder) if dist.is_main() else [], "tokens": trainer.run.budget.tokens}


class Squares(nn.Module):
    """A user's own model: layers in a list, no transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Own(BaseTrainer):
    """A user's own algorithm; its optimizer has state before the trainer is made."""

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)

    def _compute_loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (outputs - 1).square().mean()

    def _count_tokens(self, batch: torch.Tensor) -> int:
        return batch.numel()


def own(folder: Path, engine: str) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = Squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    batches = list(torch.randn(8, 2, 4))
    how: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "use_amp": False, "progress": False, "device": "cpu"}
    per_rank = 2 // dist.world_size()
    Own(model, optimizer, batches, save_dir=str(folder), engine=engine, grad_accum_steps=per_rank, **how).train()
    return curve(folder) if dist.is_main() else []


def preference(folder: Path) -> dict[str, bool]:
    """The reference is sharded as the policy is."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    how: dict[str, Any] = {"device": "cpu", "save_dir": str(folder), "engine": "fsdp"}
    trainer = DPOTrainer(model=model, optimizer=optimizer, train_loader=[], **how)
    assert trainer.reference is not None
    return {
        name: all(isinstance(p, DTensor) for p in module.parameters())
        for name, module in (("policy", trainer.base_model), ("reference", trainer.reference))
    }


def adapted_head(folder: Path, **options: Any) -> dict[str, Any]:
    """Adapters on the head, whose weights are read and not called; the curve, and why it does not run in chunks."""
    import peft

    warnings.simplefilter("ignore")  # of what peft asks of transformers, and of embeddings that are not tied any more
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = make_trainer(folder, STEPS, model=model, optimizer=optimizer, val_loader=None, **options)
    why = [inner.whole_logits for inner in trainer.model.modules() if isinstance(inner, ScoredModel)]
    trainer.train()
    return {"curve": curve(folder) if dist.is_main() else [], "why": why}


def on_policy(folder: Path, engine: str) -> list[tuple[float, float]]:
    """The student writes answers of its own, which are longer on one rank than on the other."""
    from llm_trainer.trainers.distill import Distillation

    torch.manual_seed(0)
    teacher = tiny_model(seed=1)
    kd = Distillation(
        teacher_model=teacher, on_policy_fraction=1.0, max_new_tokens=6, stop_token_ids=tuple(range(0, 512, 3))
    )
    trainer = make_trainer(folder, STEPS, engine=engine, kd=kd)
    trainer.train()
    return curve(folder) if dist.is_main() else []


def described(folder: Path, engine: str, name: str = "sft", **sections: Any) -> dict[str, Any]:
    """A run from a configuration: on the second rank of a sharded one the model is built without memory."""
    from llm_trainer.config.load import parse

    data = folder.parent / "chat.jsonl"
    config = parse(
        {
            "model_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            "tokenizer": str(REFERENCE / "tokenizer"),
            "vocabulary_config": {"add_tokens": ["count to"], "pad_to_multiple_of": 64},
            "file_dataset": str(data),
            "eval_dataset": str(data),
            "eval_prompts": ["count to 3"],
            "n_epochs": 2,
            "batch_size": 2,
            "dataset_block_size": 64,
            "optim_config": {"initial_lr": 1e-2},
            "eval_config": {"eval_batch_interval": 2, "max_seq_len": 8, "temperature": 0.0},
            "run_config": {
                "save_dir": str(folder),
                "engine": engine,
                "precision": "fp32",
                "log_interval": 1,
                "progress": False,
            },
            "sft_config": {"train_on": "all"},
            **sections,
        },
        "this test",
    )
    trainer = create_trainer(name, train_config=config)
    last = trainer.train()
    return {
        "last": last,
        "curve": curve(folder) if dist.is_main() else [],
        "engine": vars(trainer.run.engine).get("stage"),
        "probe": json.loads((folder / "model" / "probe.json").read_text()),
    }


def alone(folder: Path) -> dict[str, Any]:
    """A section for DeepSpeed where a launcher has found one device."""
    os.environ["PARALLEL_TYPE"] = "none"
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    return described(folder, "auto", ds_config={"zero_config": offload, "activation_checkpointing": {}})


def adapted(folder: Path, engine: str) -> dict[str, Any]:
    """Adapters whose B learns faster, in several parameter groups with a schedule, and the rows of new tokens."""
    rates = {"initial_lr": 1e-2, "lr_multipliers": {"lora_B": 4}, "enable_lr_scheduler": True, "warmup_iters": 2}
    changes = {"optim_config": rates, "adapter_config": {"rank": 4, "dora": True}}
    return described(folder, engine, eval_dataset=None, eval_prompts=[], **changes)


FEW_BITS: dict[str, dict[str, Any]] = {  # whole weights that are trained for few bits, or multiplied in few
    "qat": {"quantization_config": {"qat": "int4"}},
    "qat dpo": {"quantization_config": {"qat": "int8"}, "sft_config": None, "dpo_config": {}},
    "float8": {"quantization_config": {"float8": "rowwise"}},
}


def in_few_bits(folder: Path, engine: str) -> dict[str, Any]:
    """As many rows a step on one process as on two."""
    from llm_trainer.engine import device
    from llm_trainer.models import float8

    float8.EMULATES, device.compute_capability = True, lambda device: (9, 0)
    quiet = {"eval_dataset": None, "eval_prompts": []}
    accumulation = {"gradient_accumulation_steps": 2 // dist.world_size()}
    found = {}
    for kind, sections in FEW_BITS.items():
        if engine == "deepspeed" and kind == "float8":
            continue
        name = "dpo" if "dpo" in kind else "sft"
        sections = {"sft_config": {}, **sections, **quiet}
        sections[f"{name}_config"] = sections[f"{name}_config"] | accumulation
        rows = "pairs.jsonl" if name == "dpo" else "chat.jsonl"
        sections["file_dataset"] = str(folder.parent / rows)
        if engine == "deepspeed":
            sections["ds_config"] = {"zero_config": {"stage": 3}}
        precision = "bf16" if kind == "float8" else "fp32"
        run = {"save_dir": str(folder / kind), "engine": engine, "precision": precision, "log_interval": 1}
        sections["run_config"] = run | {"progress": False, "max_steps": 3}
        found[kind] = described(folder / kind, engine, name, **sections)["curve"]
    return found


EIGHT_BITS = {"alone": [(2, 7)], "relay": [(2, 3), (1, 4), (3, 5), (2, 7)]}  # processes, and the step they end at


def eight_bits(folder: Path, last_step: int) -> dict[str, Any]:
    """Moments in 8 bits of shards: the curve, and a hash of the state as it is loaded and as it is left."""
    model = tiny(vocab_size=512, hidden_size=64)
    optimizer = configure_optimizer(model, "adamw8bit_fsdp", lr=1e-2)
    options = {"engine": "fsdp", "use_amp": False, "val_loader": None, "checkpoints_to_keep": 9}
    trainer = make_trainer(folder, last_step, model=model, optimizer=optimizer, **options)

    def state() -> str:
        hashed = hashlib.sha256()
        for name, values in optimizer_state_by_name(trainer.base_model, optimizer)["state"].items():
            for key, value in values.items():
                hashed.update(f"{name} {key}".encode())
                hashed.update(full_tensor(value).numpy().tobytes())
        return hashed.hexdigest()

    trainer.run._resume()
    loaded = state()
    trainer.train()
    types = {str(value.dtype) for values in optimizer.state.values() for value in values.values()}
    return {"curve": curve(folder) if dist.is_main() else [], "loaded": loaded, "left": state(), "types": sorted(types)}


def begun(folder: Path, engine: str) -> dict[str, Any]:
    """Adapters that begin with what the first rows say, whoever has them; three steps of each initialisation."""
    found = {}
    for init in ("eva", "lora_ga"):
        run = folder.with_name(f"{folder.name}-{init}")
        how = {"save_dir": str(run), "engine": engine, "precision": "fp32", "max_steps": 3, "log_interval": 1}
        adapters = {"rank": 4, "target": ["q_proj", "down_proj"], "init": init}
        sections: dict[str, Any] = {"adapter_config": adapters, "run_config": how, "vocabulary_config": {}}
        sections |= {"batch_size": 4 // dist.world_size(), "eval_dataset": None, "eval_prompts": []}
        if engine == "deepspeed":
            sections["ds_config"] = {"zero_config": {"stage": 3}}
        found[init] = described(run, engine, **sections)["curve"]
    return found


def main(folder: Path) -> None:
    import_once()
    make_trainer(folder / "unused", 1)  # imports the rest

    rows = [
        [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
        for n in range(1, 13)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenarios: dict[str, tuple[int, Any]] = {
        "plain": (2, partial(train, engine="torch")),
        "sharded": (2, train),
        "hybrid": (4, partial(train, fsdp=Fsdp(shard_size=2))),
        "zero-2": (2, partial(train, fsdp=Fsdp(reshard_after_forward=False, sync_each_micro_batch=False))),
        "tensor sharded": (4, partial(train, fsdp=Fsdp(tensor_parallel_size=2))),
        "offload": (2, partial(train, fsdp=Fsdp(cpu_offload=True))),
        "recomputed": (2, partial(train, gradient_checkpointing=True)),
        "offloaded": (2, offloaded),
        "bf16": (2, partial(train, use_amp=True, precision="bf16")),
        "bf16 plain": (2, partial(train, engine="torch", use_amp=True, precision="bf16")),
        "own torch": (1, partial(own, engine="torch")),
        "own fsdp": (2, partial(own, engine="fsdp")),
        "preference": (2, preference),
        **{f"adapted head {name}": (2, partial(adapted_head, **how)) for name, how in ADAPTED.items()},
        **{f"on-policy {engine}": (2, partial(on_policy, engine=engine)) for engine in ("torch", "fsdp")},
        "described alone": (1, alone),
        **{f"described {engine}": (2, partial(described, engine=engine)) for engine in ("torch", "fsdp", "deepspeed")},
    }
    pairs = [{"prompt": row[:1], "chosen": row[1:], "rejected": [row[1] | {"content": "none"}]} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    if is_installed("torchao"):
        for ranks, engine in ((1, "torch"), (2, "torch"), (2, "fsdp"), (2, "deepspeed")):
            scenarios[f"few bits {engine} {ranks}"] = (ranks, partial(in_few_bits, engine=engine))
    if is_installed("peft"):
        for engine in ("torch", "fsdp", "deepspeed"):
            scenarios[f"adapted {engine}"] = (2, partial(adapted, engine=engine))
            scenarios[f"begun {engine}"] = (2, partial(begun, engine=engine))
        scenarios["begun alone"] = (1, partial(begun, engine="torch"))
    report = {
        name: fork_ranks(scenario, folder / name.replace(" ", "-"), ranks)
        for name, (ranks, scenario) in scenarios.items()
    }
    for name, scenario in (("short of memory", short_of_memory), ("started again", started_again)):
        report[name] = fork_ranks(scenario, folder / "short", 2)
    for name, legs in (EIGHT_BITS if is_installed("torchao") else {}).items():
        for number, (ranks, last_step) in enumerate(legs):
            scenario = partial(eight_bits, last_step=last_step)
            report[f"8 bits {name} {number}"] = fork_ranks(scenario, folder / f"8-bits-{name}", ranks)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
