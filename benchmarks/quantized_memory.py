"""What a training step takes with adapters, with weights in few bits and with an optimizer in 8 bits, beside what
`llm-trainer plan` predicts.

`python benchmarks/quantized_memory.py` trains a model of 0.2 B parameters for three steps, each case in a process of its
own, in all four ways: with and without recomputation, and with a head in chunks or, in a plain loop, with whole logits.

The prediction is that of `plan` for the same configuration, on one device. It is of live bytes: what of PyTorch's tensors is
there at the worst moment of the third step (see `plan_error.py`). The process takes more: `resident` is the largest
resident size of the second step, less that before there was a model; the difference are holes of the allocator, and what
oneDNN keeps. Tokens per second are those of the processor time of the second step.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"adapter_config": {"rank": 8}}
CASES: dict[str, dict[str, Any]] = {  # sections of a configuration
    "full": {},
    "full, adamw8bit": {"optim_config": {"optim_type": "adamw8bit"}},
    "LoRA": LORA,
    "LoRA, also on lm_head": {"adapter_config": {"rank": 8, "target": [*TARGET, "lm_head"]}},
    "QLoRA, 8 bits": LORA | {"quantization_config": {"bits": 8}},
    "QLoRA, 4 bits": LORA | {"quantization_config": {"bits": 4}},
    "QLoRA, 4 bits, adamw8bit": LORA
    | {"quantization_config": {"bits": 4}, "optim_config": {"optim_type": "adamw8bit"}},
}
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,  # adapters on the head would take it apart from the embeddings
}
LENGTH, STEPS = 512, 3


def build(folder: Path) -> None:
    """Write the model that all cases train."""
    import torch

    from llm_trainer.models.build import build_model
    from llm_trainer.train_configs import ModelConfig

    torch.manual_seed(0)
    build_model(ModelConfig(**SHAPE)).save_pretrained(folder)


def status(name: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def play(options: argparse.Namespace) -> None:
    """Train, and print what it took."""
    import torch
    from plan_error import hand_step, peak_of, state_bytes, weight_bytes

    from llm_trainer import SFTTrainer, adapt, configure_optimizer
    from llm_trainer.config.load import parse
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.engine.device import DTYPES
    from llm_trainer.models.build import build_model
    from llm_trainer.models.quantize import keep_layout
    from llm_trainer.models.quantized_loading import loading_options
    from llm_trainer.plan.describe import describe
    from llm_trainer.plan.memory import ONE, Step, peak
    from llm_trainer.train.hooks import Hook

    # 1. the configuration, and what plan says of it
    run = {"precision": options.precision, "gradient_checkpointing": options.recompute}
    sections = {"optim_config": {"optim_type": "adamw"}} | CASES[options.case]
    sections |= {"model_config": options.folder, "file_dataset": "none.jsonl", "run_config": run, "sft_config": {}}
    config: TrainConfig = parse(sections | {"dataset_block_size": LENGTH}, "case")
    shape, job = describe(config, "sft")
    tokens = options.rows * LENGTH
    expected = peak(shape, job, ONE, 1, Step(tokens, options.recompute, not options.whole, on_gpu=False))

    # 2. the model
    torch.manual_seed(0)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # the library of products
    base, how = status("VmRSS"), {}
    if config.quantization_config is not None:
        how = loading_options(
            config.quantization_config, options.folder, torch.device("cpu"), DTYPES[options.precision]
        )
    model: Any = build_model(options.folder, options=how)
    if config.adapter_config is not None:
        model = adapt(model, config.adapter_config)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # as it was loaded, it holds all pages of its file
            parameter.data = parameter.data.clone()
    keep_layout(model)
    optimizer = configure_optimizer(model, config.optim_config.optimizer, lr=1e-5)
    ids = torch.randint(0, SHAPE["vocab_size"], (options.rows, LENGTH))
    batch = {"input_ids": ids, "labels": ids}

    # 3. three steps: the second is timed, and its size looked at; of the third all allocations are followed
    profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    times, resident = [0.0] * STEPS, 0

    def after(step: int) -> None:
        nonlocal resident
        times[step - 1] = time.process_time()
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the largest size is counted anew
        elif step == 2:
            resident = status("VmHWM")
            profiled.start()
        else:
            profiled.stop()

    if options.whole:
        one_step = hand_step(model, optimizer, batch, options.precision, options.recompute)
        for step in range(STEPS):
            one_step()
            after(step + 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            SFTTrainer(
                model=model,
                optimizer=optimizer,
                train_loader=[batch] * STEPS,
                max_epochs=1,
                precision=options.precision,
                gradient_checkpointing=options.recompute,
                packing="none",
                micro_batch_tokens=None,
                compile=False,
                device="cpu",
                save_dir=folder,
                save_interval=0,
                save_in_background=False,
                progress=False,
                hooks=[Hook("after", lambda run: after(run.progress.step), every_steps=1)],
            ).train()
    live = weight_bytes([model]) + state_bytes(optimizer) + peak_of(profiled)
    found = {
        "expected": expected.total,
        "live": live,
        "resident": resident - base,
        "speed": tokens / (times[1] - times[0]),
        "parameters": shape.num_parameters,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rows", type=int, default=2, help=f"of {LENGTH} tokens in a step")
    parser.add_argument("--folder", help="where the model lies, or will lie; default: a temporary one")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one")
    parser.add_argument("--play", action="store_true", help="play the case here")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    if options.play:
        options.case = options.case[0]
        play(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary) / "model"
        if not folder.exists():
            build(folder)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        print("| case | recomputed | logits | plan MB | live MB | error | resident MB | tokens/s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for case in options.case or CASES:
            for flags in ([], ["--recompute"], ["--whole"], ["--recompute", "--whole"]):
                command = [sys.executable, __file__, "--play", "--case", case, "--folder", str(folder), *flags]
                command += ["--precision", options.precision, "--rows", str(options.rows)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{case} {flags}: {done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                is_again = "yes" if "--recompute" in flags else "no"
                logits = "whole" if "--whole" in flags else "in chunks"
                error = found["expected"] / found["live"] - 1
                sizes = [f"{found[name] / 1e6:,.0f}" for name in ("expected", "live", "resident")]
                cells = [case, is_again, logits, *sizes[:2], f"{error:+.1%}", sizes[2], f"{found['speed']:.0f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
        print(f"{found['parameters'] / 1e6:.0f} M parameters in the last case")


if __name__ == "__main__":
    main()
