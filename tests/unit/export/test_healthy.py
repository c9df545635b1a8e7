"""Healthy exports of every kind pass the gate, and are what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from exported import Made
from llm_trainer.export.door import export
from llm_trainer.export.probe import read_probe

pytest.importorskip("peft", reason="needs peft")

WHOLE = ["dense", "untied", "llama", "moe", "new tokens"]
MERGED = ["lora", "rslora", "dora", "pissa", "lora-ga", "lora on the head", "saved head", "a norm too", "a few tokens"]
MERGED += ["lora of llama", "lora of an untied model", "lora in bf16", "experts", "qlora"]
BESIDE = ["lora", "dora", "rs-pissa", "olora", "lora-ga", "a few tokens", "two adapters", "experts", "qlora"]
CASES = [
    *((kind, "hf", {}) for kind in WHOLE),
    *((kind, "merged", {}) for kind in MERGED),
    *((kind, "adapter", {}) for kind in BESIDE),
    ("dense", "hf", {"dtype": torch.bfloat16}),
    ("moe", "hf", {"dtype": torch.float16}),
    ("lora", "merged", {"dtype": torch.bfloat16}),
    ("two adapters", "merged", {"weights": {"default": 0.5, "second": -1.0}}),
]


@pytest.mark.parametrize(("kind", "to", "options"), CASES, ids=lambda value: str(value))
def test_healthy_exports_pass(kind: str, to: str, options: dict[str, Any], made: Made, tmp_path: Path) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    said: list[str] = []
    probe = read_probe(made.run(kind) / "model")
    assert probe is not None and probe.was_trained
    out = export(made.run(kind), to, tmp_path / "out", say=said.append, **options)
    assert said[-1].startswith("gate: log-probabilities of ") and sorted(tmp_path.iterdir()) == [out]
    if "weights" in options:
        assert "no record of what the model answered" in said[0]
    else:
        precision = "bf16" if kind == "lora in bf16" else "fp32"
        assert said[0].startswith(f"reopened, compared with training in {precision}")
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "probe.json" not in names
    if to != "adapter":
        expected = options.get("dtype", torch.bfloat16 if kind == "lora in bf16" else torch.float32)
        found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert found.dtype is expected and "lora" not in str(found)
