"""Each algorithm learns a known preference, to a level that a wrong loss does not reach; the controls show that."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import learning_table as table
import reinforcement_table as reinforcement


@pytest.mark.slow
@pytest.mark.parametrize("seed", table.SEEDS)
@pytest.mark.parametrize("name", table.EXPERIMENTS)
def test_held_out_accuracy(name: str, seed: int) -> None:
    outcome, expected = table.run(name, seed), table.EXPERIMENTS[name]
    assert 0.3 < outcome.accuracy[0] < 0.7  # chance
    assert expected.accepts(outcome.accuracy[1], outcome.margin), outcome
    assert outcome.seconds < 60


RUNS = [(name, seed) for name, experiment in reinforcement.EXPERIMENTS.items() for seed in experiment.seeds]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_held_out_accuracy_after_reinforcement(name: str, seed: int) -> None:
    experiment = reinforcement.EXPERIMENTS[name]
    outcome = reinforcement.run(experiment, seed)
    low, high = experiment.accuracy
    assert 0.3 < outcome.accuracy[0] < 0.7
    assert low <= outcome.accuracy[1] <= high, outcome
