"""Methods of peft where weights are sharded: those that are taken have the curve of one process, and go on bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.config.adapters import KINDS, SHARDED_NOT

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("deepspeed", reason="needs DeepSpeed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_is_taken_is_that_of_one_process(kind: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "method_ranks.py"
    command = [sys.executable, str(script), str(tmp_path), "fsdp,zero-2,zero-3", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    for text in done.stdout.splitlines():
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        if (kind, line["engine"]) not in SHARDED_NOT:
            assert line["apart"] < 1e-5 and line["resumes"], line
