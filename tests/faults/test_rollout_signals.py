"""SIGTERM in each phase of GRPO and PPO: saved, exit 75, and what was sampled and judged is not made again."""

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from policy_lives import Kill, aim_at, make, outcome

from llm_trainer import get_trainer_class
from llm_trainer.generation.in_process import InProcess
from llm_trainer.train.signals import TrainingInterrupted
from policies import even_share

# Of one run, in the order in which they interrupt it, and how often the phase has come before in that life.
PHASES = {"syncing": 1, "generating": 3, "rewarding": 1, "scoring": 1, "updating": 2, "saving": 1}


def noisy_share(prompts: Any, completions: Any, answers: Any) -> list[float]:
    """Not the same twice."""
    noise = random.SystemRandom()
    return [share + noise.random() for share in even_share(prompts, completions, answers)]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_signal_in_each_phase_and_a_run_that_is_given_its_rollouts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is interrupted in all phases; another one, that is not, learns from its rollouts and ends in the same bits."""
    options: dict[str, Any] = {"reward_func": noisy_share, "save_in_background": False, "max_epochs": 1}
    for phase, count in PHASES.items():
        with monkeypatch.context() as patches:
            aim_at(phase, Kill(count, signal.SIGTERM), get_trainer_class(name), patches.setattr)
            trainer = make(name, tmp_path / "signalled", **options)
            began = time.monotonic()
            with pytest.raises(TrainingInterrupted) as stop:
                trainer.train()
        assert stop.value.code == 75 and time.monotonic() - began < 10, phase
    make(name, tmp_path / "signalled", **options).train()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it samples")

    monkeypatch.setattr(InProcess, "generate", refuse)
    stored = str(tmp_path / "signalled" / "rollouts")
    make(name, tmp_path / "given", **options | {"reward_func": None, "rollouts": stored}).train()
    signalled, given = outcome(tmp_path / "signalled"), outcome(tmp_path / "given")
    assert len(signalled["rollouts"]) == 3 and len(signalled["metrics"]) == 6
    for what in ("weights", "state", "metrics"):
        assert signalled[what] == given[what], what
