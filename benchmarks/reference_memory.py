"""What the reference of DPO costs where adapters are trained: the peak memory of a process, beside plain fine-tuning.

`python benchmarks/reference_memory.py` trains a model of 0.1 B parameters with LoRA of rank 8 for a few steps, each case in
a process of its own: fine-tuning; DPO whose reference is the policy where the run began; DPO with a frozen copy. All have
as many tokens per micro-batch, in rows of the same length.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

CASES = ("sft", "dpo", "dpo, frozen copy")
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32_000}
LENGTH, ROWS, STEPS = 256, 8, 4  # 2,048 tokens per micro-batch


def batches_of(case: str) -> list[dict[str, Any]]:
    """Micro-batches of as many tokens: rows, or half as many pairs."""
    import torch

    torch.manual_seed(1)
    if case == "sft":
        ids = torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH))
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * STEPS
    batch = {}
    for part, length in (("prompt", LENGTH // 2), ("chosen", LENGTH // 2), ("rejected", LENGTH // 2)):
        ids = torch.randint(3, SHAPE["vocab_size"], (ROWS // 2, length))
        batch |= {f"{part}_input_ids": ids, f"{part}_attention_mask": torch.ones_like(ids)}
    return [batch] * STEPS


def play(case: str) -> None:
    """Train, and print what it took."""
    import peft
    import torch

    from llm_trainer import configure_optimizer, create_trainer
    from llm_trainer.models.build import build_model
    from llm_trainer.models.frozen import frozen_copy
    from llm_trainer.train.hooks import Hook
    from llm_trainer.train_configs import ModelConfig

    torch.manual_seed(0)
    model = peft.get_peft_model(build_model(ModelConfig(**SHAPE)), peft.LoraConfig(r=8, target_modules="all-linear"))
    own: dict[str, Any] = {} if case == "sft" else {"share_prompts": False}
    if "copy" in case:
        own["ref_model"] = frozen_copy(model)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = create_trainer(
            case.partition(",")[0],
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-4),
            train_loader=batches_of(case),
            max_epochs=1,
            micro_batch_tokens=None,
            precision="bf16",
            compile=False,
            save_interval=0,
            save_in_background=False,
            progress=False,
            device="cpu",
            save_dir=folder,
            hooks=[Hook("clock", lambda run: ends.append(time.process_time()), every_steps=1)],
            **own,
        )
        trainer.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = trainer.run.engine.held
    found = {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": statistics.median(b - a for a, b in pairwise(ends)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": trained,
        "held": 0 if held is None else held.num_bytes,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help="play this one here")
    options = parser.parse_args()
    if options.case:
        play(options.case)
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    sizes = found["dpo"][0]
    print(f"{sizes['parameters'] / 1e6:.0f} M parameters, {sizes['trained'] / 1e6:.2f} M trained")
    print(f"kept for the reference: {sizes['held'] / 2**20:.1f} MiB")
    print("| case | peak GiB | to sft | CPU s per step |\n|---|---|---|---|")
    plain = statistics.median(run["peak"] for run in found["sft"])
    for case, runs in found.items():
        peak = statistics.median(run["peak"] for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        print(f"| {case} | {peak / 2**30:.2f} | {peak / plain:.2f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
