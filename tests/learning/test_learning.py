"""Each algorithm learns a known preference, to a level that a wrong loss does not reach; the controls show that."""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import digits
import learning_table as table
import reinforcement_table as reinforcement
import through_vllm

from vllm_process import needs_vllm


@pytest.mark.slow
@pytest.mark.parametrize("seed", table.SEEDS)
@pytest.mark.parametrize("name", table.EXPERIMENTS)
def test_held_out_accuracy(name: str, seed: int) -> None:
    outcome, expected = table.run(name, seed), table.EXPERIMENTS[name]
    assert 0.3 < outcome.accuracy[0] < 0.7  # chance
    assert expected.accepts(outcome.accuracy[1], outcome.margin), outcome
    assert outcome.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", digits.SEEDS)
def test_a_language_model_learns_to_see(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the images are inside scikit-learn")
    outcomes = digits.run(seed, tmp_path)
    missed = [name for name, measured in outcomes.items() if not digits.reached(name, measured)]
    assert not missed, outcomes


RUNS = [(name, seed) for name, experiment in reinforcement.EXPERIMENTS.items() for seed in experiment.seeds]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_held_out_accuracy_after_reinforcement(name: str, seed: int) -> None:
    experiment = reinforcement.EXPERIMENTS[name]
    outcome = reinforcement.run(experiment, seed)
    low, high = experiment.accuracy
    assert 0.3 < outcome.accuracy[0] < 0.7
    assert low <= outcome.accuracy[1] <= high, outcome


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Of vLLM."""
    with through_vllm.server() as url:
        yield url


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("way", through_vllm.WAYS)
def test_grpo_learns_from_what_vllm_draws(way: str, server: str) -> None:
    found = through_vllm.learned(server, way)
    before, after = found.outcome.accuracy
    assert 0.3 < before < 0.7 and after >= through_vllm.LEAST[way], found
    means, most = found.differences
    assert median(means) < 5e-6 and most < 1e-4, found
    assert found.loads >= 100
