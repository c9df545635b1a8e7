"""A rich CPU stands in for a poor one: in a process whose 16-bit instructions are hidden, everything still trains."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHAPE = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
END = "end of the runs without DeepSpeed"
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def described(folder: Path, **changes: Any) -> Any:
    """A run of a few steps in 'auto' precision."""
    from llm_trainer.config.load import parse

    rows = [{"prompt": f"count to {n}", "completion": "one two three"[: 3 + n]} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model_config": SHAPE | {"max_position_embeddings": 64},
        "tokenizer": str(Path(__file__).parents[1] / "reference" / "tokenizer"),
        "file_dataset": str(folder / "rows.jsonl"),
        "batch_size": 2,
        "run_config": {"save_dir": str(folder / "run"), "device": "cpu", "log_interval": 1, "progress": False},
        "sft_config": {},
    }
    return parse(values | changes, "this test")


def auto_precision(folder: Path) -> dict[str, Any]:
    from llm_trainer import SFTTrainer

    trainer = SFTTrainer(train_config=described(folder))
    last = trainer.train()
    # Once more, from the folder that was written, under transformers.
    config = described(folder, model_config=str(folder / "run" / "model"))
    config.run_config.save_dir, config.run_config.engine = str(folder / "again"), "hf"
    SFTTrainer(train_config=config).train()
    print(END)
    return {"precision": trainer.run.engine.precision_name, "loss": last["loss"], "step": trainer.run.progress.step}


def refusals(folder: Path) -> dict[str, Any]:
    """DeepSpeed's fp16 in both styles: the messages, and what of the described run has been made by then."""
    import torch

    from llm_trainer import SFTTrainer
    from llm_trainer.engine.zero import DeepSpeedError

    model = torch.nn.Embedding(8, 8)
    explicit: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "train_loader": [],
        "device": "cpu",
        "save_dir": str(folder / "explicit"),
        "engine": "deepspeed",
        "deepspeed": FP16,
    }
    config = described(folder, ds_config={"fp16_config": {"enabled": True}, "zero_config": {"stage": 1}})
    config.tokenizer = str(folder / "not-there")  # would be the first thing to be loaded
    found = {}
    for style, arguments in (("explicit", explicit), ("described", {"train_config": config})):
        try:
            SFTTrainer(**arguments)
        except DeepSpeedError as error:
            found[style] = str(error)
    return found


def main(folder: Path) -> None:
    report = {"trained": auto_precision(folder)}
    if importlib.util.find_spec("deepspeed") is not None:
        report["refused"] = refusals(folder)
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("poor"))]
    poor = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=poor, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stdout, "noise": done.stderr}


def test_auto_precision_is_fp32(report: dict[str, Any]) -> None:
    assert report["trained"]["precision"] == "fp32"
    assert report["trained"]["step"] == 4 and 0 < report["trained"]["loss"] < 7


def test_libraries_add_nothing_to_what_a_run_says(report: dict[str, Any]) -> None:
    """Neither bars of reading and writing weights nor, of runs that do not use it, DeepSpeed's accelerator."""
    said = report["said"].partition(END)[0]
    assert said.count("step 4/4") == 2 and "Setting accelerator" not in said
    assert "Loading weights" not in report["noise"] and "Writing model shards" not in report["noise"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("style", ["explicit", "described"])
def test_deepspeeds_fp16_is_refused_before_anything_is_loaded(report: dict[str, Any], style: str) -> None:
    message = report["refused"][style]
    assert message.startswith(
        "deepspeed: got fp16, which this cpu does not compute in; it needs a CPU with AVX512-FP16"
    )
    assert "switch on bf16 instead" in message


if __name__ == "__main__":
    main(Path(sys.argv[1]))
