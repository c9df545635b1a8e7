"""FSDP2 with its options, for any module, in both styles: the curve of plain DDP."""

import json
import math
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Any]:
    """What the ranks of every scenario in fsdp_ranks.py returned."""
    script, folder = Path(__file__).parent / "fsdp_ranks.py", tmp_path_factory.mktemp("fsdp")
    done = subprocess.run([warm_python, str(script), str(folder)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, scenario in report.items():
        assert set(scenario["codes"]) == {0}, f"{name}: {scenario['texts']}"
    return {name: scenario["results"] for name, scenario in report.items()} | {
        "said": {name: scenario["texts"] for name, scenario in report.items()}
    }


def assert_same(found: list, expected: list, rel: float = 1e-5) -> None:
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rel)


def assert_same_probe(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What the model answered at the end, on another engine."""
    for name in ("questions", "text_ids", "rendered", "stop_token_ids", "facts", "precision"):
        assert found[name] == expected[name] and found[name]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert [answer[0] for answer in found["answers"]] == [answer[0] for answer in expected["answers"]]


@pytest.mark.parametrize("name", ["sharded", "hybrid", "zero-2", "offload", "recomputed"])
def test_every_option_has_the_curve_of_ddp_on_half_the_weights(played: dict[str, Any], name: str) -> None:
    assert_same(played[name][0]["curve"], played["plain"][0]["curve"])
    assert [result["share"] for result in played[name]] == [0.5] * len(played[name])
    assert played["plain"][0]["share"] == 1.0


def test_what_recomputed_layers_keep_may_wait_on_the_host(played: dict[str, Any]) -> None:
    """DDP, FSDP2 and ZeRO-3; where layers are computed again and nothing waits, the same bits."""
    ours, plain = played["offloaded"][0], played["plain"][0]["curve"]
    assert ours["curves"]["fsdp"] == played["recomputed"][0]["curve"]
    for found in ours["curves"].values():
        assert_same(found, plain)
    assert len(ours["inward"]) == 3 and min(ours["inward"]) > 0


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *((engine, kind) for engine in ("torch", "fsdp") for kind in ("qat", "qat dpo", "float8")),
        ("deepspeed", "qat"),
        ("deepspeed", "qat dpo"),
    ],
)
def test_whole_weights_in_few_bits_have_the_curve_of_one_process(
    played: dict[str, Any], engine: str, kind: str
) -> None:
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")
    alone, together = played["few bits torch 1"][0][kind], played[f"few bits {engine} 2"][0][kind]
    assert len(alone) == len(together) == 3
    # Weights that differ in their last bit may be rounded to numbers next to each other: later steps are alike, not equal.
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-2)
    if kind != "float8":
        assert together[0] == pytest.approx(alone[0], rel=1e-5)
    if kind == "qat dpo":
        assert together[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_moments_in_8_bits_are_those_of_any_number_of_processes(played: dict[str, Any]) -> None:
    """On two, one, three (whose rows are uneven) and two again: what one leaves the next one has, bit for bit."""
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")
    legs = [played[f"8 bits relay {number}"] for number in range(4)]
    for before, after in pairwise(legs):
        assert {result["loaded"] for result in after} == {result["left"] for result in before}
    assert legs[0][0]["types"] == ["torch.float32", "torch.uint8"]
    alone, relay = played["8 bits alone 0"][0]["curve"], legs[-1][0]["curve"]
    assert [loss for loss, _ in relay] == pytest.approx([loss for loss, _ in alone], rel=2e-3) and len(alone) == 7


def test_tensor_parallel_layers_have_the_curve_of_ddp(played: dict[str, Any]) -> None:
    """Two by two processes: the matrices of layers are cut twice, the rest once."""
    results = played["tensor sharded"]
    assert_same(results[0]["curve"], played["plain"][0]["curve"])
    assert [result["share"] for result in results] == [pytest.approx(0.3376, abs=1e-4)] * 4


def test_bf16_keeps_weights_in_fp32(played: dict[str, Any]) -> None:
    ours, plain = played["bf16"][0], played["bf16 plain"][0]
    assert (ours["precision"], ours["dtype"], ours["share"]) == ("bf16", "torch.float32", 0.5)
    assert_same([loss for loss, _ in ours["curve"]], [loss for loss, _ in plain["curve"]], rel=5e-3)
    assert_same([norm for _, norm in ours["curve"]], [norm for _, norm in plain["curve"]], rel=5e-2)  # 1 % was seen
    assert ours["curve"] != played["sharded"][0]["curve"]


def test_a_users_own_model_algorithm_and_used_optimizer(played: dict[str, Any]) -> None:
    """Two ranks take two of the eight micro-batches per step, one process with two per step does the same."""
    assert_same(played["own fsdp"][0], played["own torch"][0])


def test_the_reference_is_sharded_too(played: dict[str, Any]) -> None:
    assert played["preference"] == [{"policy": True, "reference": True}] * 2


@pytest.mark.parametrize("engine", ["fsdp", "zero-3"])
def test_a_head_with_adapters_is_read_where_it_is_sharded(played: dict[str, Any], engine: str) -> None:
    pytest.importorskip("peft", reason="needs peft")
    expected, found = played["adapted head torch"], played[f"adapted head {engine}"]
    assert [result["why"] for result in (*expected, *found)] == [[""]] * 4
    assert_same(found[0]["curve"], expected[0]["curve"])


def test_ranks_that_generate_different_answers(played: dict[str, Any]) -> None:
    assert_same(played["on-policy fsdp"][0], played["on-policy torch"][0])


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_described_run(played: dict[str, Any], engine: str) -> None:
    """Evaluation, samples and checkpoints included; the second rank builds no weights of its own under FSDP."""
    expected, found = played["described torch"][0], played[f"described {engine}"][0]
    assert_same(found["curve"], expected["curve"])
    assert found["last"]["eval_loss"] == pytest.approx(expected["last"]["eval_loss"], rel=1e-5)
    answers = [
        [line for line in played["said"][f"described {e}"][0].splitlines() if "->" in line] for e in ("torch", engine)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 3
    assert_same_probe(found["probe"], expected["probe"])


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_adapters_with_rates_of_their_own(played: dict[str, Any], engine: str) -> None:
    """The second rank of FSDP builds neither the model nor its adapters with weights."""
    pytest.importorskip("peft", reason="needs peft")
    expected, found = played["adapted torch"][0], played[f"adapted {engine}"][0]
    assert_same(found["curve"], expected["curve"])
    assert expected["curve"] != played["described torch"][0]["curve"]
    assert_same_probe(found["probe"], expected["probe"])


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("engine", ["torch", "fsdp", "deepspeed"])
def test_adapters_that_begin_with_what_rows_say(played: dict[str, Any], engine: str, init: str) -> None:
    """The same rows on every rank, and as many as one process has; of DeepSpeed ZeRO-3, where weights are sharded after."""
    pytest.importorskip("peft", reason="needs peft")
    expected, found = played["begun alone"][0][init], played[f"begun {engine}"][0][init]
    assert_same(found, expected)


def test_a_section_for_deepspeed_is_used_in_one_process(played: dict[str, Any]) -> None:
    """ZeRO-3 with its optimizer on the host and recomputed activations, where smart_train finds one device."""
    (found,) = played["described alone"]
    assert found["engine"] == 3
    assert "DeepSpeedEngine, 1 process" in played["said"]["described alone"][0] and len(found["curve"]) == 12


def test_ranks_that_need_each_other_stop_together_and_go_on_cut_smaller(played: dict[str, Any]) -> None:
    first, second = played["short of memory"]
    assert second.startswith("OutOfMemoryError: step 2 ran out of memory: micro-batch ")
    assert re.search(r"2 rows of up to \d+ tokens .*can't allocate.*with micro-batches of at most \d+ tokens", second)
    assert "rank 1" in first and "failed: OutOfMemoryError: step 2 ran out of memory" in first
    assert_same(played["started again"][0]["curve"], played["plain"][0]["curve"])
    tokens = {result["tokens"] for result in played["started again"]}
    assert len(tokens) == 1 and f"at most {tokens.pop()} tokens" in second
