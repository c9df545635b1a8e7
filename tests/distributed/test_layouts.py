"""Any layout of processes goes on from the checkpoint of any other, on the same curve."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

LAYOUTS = ("one", "ddp-2", "fsdp-2", "fsdp-3")
TOLERANCE = 1e-5  # sums over ranks are added in another order


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Any]:
    """The curves of all layouts, uninterrupted and in two legs."""
    return play(warm_python, tmp_path_factory.mktemp("layouts"))


def play(python: str, folder: Path, *which: str) -> dict[str, Any]:
    """What `layouts.py` prints."""
    command = [python, str(Path(__file__).parent / "layouts.py"), str(folder), *which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PAIRS = [(layout, layout) for layout in LAYOUTS]
PAIRS += [("one", "ddp-2"), ("ddp-2", "fsdp-2"), ("fsdp-2", "fsdp-3"), ("fsdp-3", "one")]
PAIRS += [("tensor-2", "one"), ("fsdp-3", "tensor-2"), ("zero3-2", "fsdp-2"), ("fsdp-3", "zero3-2")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_layout_goes_on_from_another(played: dict[str, Any], first: str, second: str) -> None:
    check(played, first, second)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_layout_goes_on_from_every_other(tmp_path: Path, warm_python: str) -> None:
    played = play(warm_python, tmp_path, "every-pair")
    for first in LAYOUTS:
        for second in LAYOUTS:
            check(played, first, second)


def check(played: dict[str, Any], first: str, second: str) -> None:
    """The curve of two legs is that of one process, uninterrupted."""
    whole, both = played["one"]["curve"], played[f"{first} {second}"]["curve"]
    assert [step for step, *_ in both] == [1, 2, 3, 4, 5]
    for expected, found in zip(whole, both, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_for_bit(played: dict[str, Any], layout: str) -> None:
    both, whole = played[f"{layout} {layout}"], played[layout]
    assert both["curve"] == whole["curve"] and both["weights"] == whole["weights"]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_process_verifies_what_all_read(played: dict[str, Any], first: str, second: str) -> None:
    main, *others = played[f"{first} {second}"]["hashed"]
    assert main >= 4 and not any(others)


def test_a_rank_that_cannot_write_its_shards_is_named_and_nothing_is_lost(played: dict[str, Any]) -> None:
    done, files = played["full disk"]
    assert done["codes"] == [0, 0], done["texts"]
    (warning,) = done["results"][0]
    assert "the shards of rank 1 could not be saved" in warning and "No space left on device" in warning
    assert "Training goes on" in warning
    checkpoints = [name for name in files if name.startswith("checkpoint-")]
    assert checkpoints[-1] == "checkpoint-00000005" and "checkpoint-00000002" not in files
    assert not [name for name in files if "partial" in name or name == ".shards"]


def test_a_single_file_serves_any_layout(played: dict[str, Any]) -> None:
    """`best_model.pt` is whole, whoever wrote it."""
    best = min(value for _, value in played["one"]["evaluations"])
    for values in played["files"].values():
        assert values == pytest.approx([best] * len(values), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["body of its own", "body shared"])
def test_two_models_go_from_one_layout_to_the_next(played: dict[str, Any], name: str) -> None:
    """A policy and its critic, each with its optimizer state: one process, FSDP2, ZeRO-3, DDP, two steps each."""
    whole, relay = played[name]
    assert whole["models"] == relay["models"] == ["critic", "model"]
    assert len(whole["curve"]) == len(relay["curve"]) == 8
    for one, other in zip(relay["curve"], whole["curve"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_adapters_go_from_one_layout_to_the_next(played: dict[str, Any]) -> None:
    """One process and FSDP2 on a base that was made in memory, then ZeRO-3 and DDP on the same one in a folder."""
    if "adapters" not in played:
        pytest.skip("needs peft")
    whole, relay = played["adapters"]
    assert len(whole["curve"]) == len(relay["curve"]) == 8
    for one, other in zip(relay["curve"], whole["curve"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    model = {name for name in relay["files"] if name.startswith("model/")}
    assert model == {
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
        "model/base.json",
        "model/generation_config.json",
    }
