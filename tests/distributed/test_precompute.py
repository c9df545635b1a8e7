"""Learning from pairs with two real processes: what is known before training, and metrics of a step, are those of one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "preference_ranks.py"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path, warm_python: str) -> dict[str, Any]:
    """What the ranks of both scenarios saw."""
    command = [warm_python, str(SCRIPT), str(tmp_path_factory.mktemp("pairs")), str(reference_dir / "tokenizer")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_reference_scored_by_two_ranks_is_that_of_one(played: dict[str, Any]) -> None:
    (alone,), together = (played[f"precomputed-{ranks}"]["results"] for ranks in (1, 2))
    assert together[0] == together[1] and together[0]["files"] == 1  # one file, which both read
    assert together[0]["table"] == alone["table"]  # a pair is scored together with the same others
    assert max(max(row) for row in alone["table"]) < 0
    assert len({tuple(row) for row in alone["table"]}) == 9


@pytest.mark.parametrize("name", ["precomputed", "unpaired"])
def test_every_step_is_that_of_one_process(name: str, played: dict[str, Any]) -> None:
    """Rewards are differences of log-probs: near 0 they are as exact as these."""
    alone, together = (played[f"{name}-{ranks}"]["lines"] for ranks in (1, 2))
    assert len(alone) == len(together) == (3 if name == "precomputed" else 5)
    for one, two in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one.get("rewards/margins") == pytest.approx(two.get("rewards/margins"), abs=2e-5)
    assert max(abs(line.get("rewards/margins", 0.0)) for line in alone) > 1e-3


def test_the_margin_of_kto_is_that_of_the_step(played: dict[str, Any]) -> None:
    for line in played["unpaired-2"]["lines"]:
        if "rewards/margins" in line:
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)


def test_a_reference_of_which_little_is_kept_is_a_frozen_copy(played: dict[str, Any]) -> None:
    """On every engine; of two ranks one has no mismatched rows, and makes up for the other's forwards of the reference."""
    done = played["where it began"]
    assert done["codes"] == [0, 0], "".join(text[-3000:] for text in done["texts"])
    curves = done["results"][0]
    expected = [(line["step"], line["loss"], line["grad_norm"], line["kl"]) for line in curves.pop("copy")]
    assert len(expected) == 4 and len({loss for _, loss, *_ in expected}) == 4
    assert {"ddp", "fsdp", "relay"} <= curves.keys()
    for name, lines in curves.items():
        assert len(lines) == 4, name
        for line, (step, *values) in zip(lines, expected, strict=True):
            assert line["step"] == step, name
            assert [line["loss"], line["grad_norm"], line["kl"]] == pytest.approx(values, rel=1e-5, abs=2e-6), name
