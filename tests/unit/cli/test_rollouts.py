"""`llm-trainer rollouts`: what is shown of the rollouts of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.rewarding import reward_model
from policies import STOP, rollouts_of, tiny, train
from writers import make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 rollouts, begun at steps 0, 4 and 8, of 4 prompts with 2 completions each."""
    path = tmp_path_factory.mktemp("run")
    make_trainer(path, max_epochs=1, source_options={"passes": 2, "rows_per_update": 4, "keep_rollouts": True}).train()
    return path


def shown(capsys: pytest.CaptureFixture[str], run: Any, *arguments: Any) -> str:
    assert run("rollouts", *arguments) == 0
    return capsys.readouterr().out


def test_the_last_rollout_with_its_rewards(folder: Path, run: Any, capsys: Any) -> None:
    text = shown(capsys, run, folder, "--rows", 3)
    assert "00000002: 8 completions of 4 prompts, made at optimizer step 8" in text
    assert text.count("--- completion") == 3
    assert re.search(r"^tokens: (\d+) sampled = \1 trained$", text, re.MULTILINE)
    assert re.search(r"--- completion 1 of prompt 0: \d tokens, ended by (stop|length)", text)
    assert re.search(r"reward \S+ \(reward 0 \S+\), advantage -?\d", text)
    assert "reference answer: answer " in text
    assert "[[" in text and "no tokenizer was found" in text


def test_a_rollout_by_step_sorted_by_reward(folder: Path, run: Any, capsys: Any) -> None:
    text = shown(capsys, run, folder, "--step", 5, "--sort", "reward")
    assert "made at optimizer step 4" in text
    for step, begun in ((1, 0), (4, 0), (8, 4), (9, 8)):  # as the log counts them: four updates on each
        assert f"made at optimizer step {begun}\n" in shown(capsys, run, folder, "--step", step, "--rows", 1)
    rewards = [float(value) for value in re.findall(r"^reward (\S+) \(", text, re.MULTILINE)]
    assert len(rewards) == 8 and rewards == sorted(rewards, reverse=True)
    smallest = shown(capsys, run, folder / "rollouts" / "00000001", "--sort", "advantage", "--ascending")
    advantages = [float(value) for value in re.findall(r"advantage (\S+)$", smallest, re.MULTILINE)]
    assert len(advantages) == 8 and advantages == sorted(advantages)


def test_tokens_as_text(folder: Path, run: Any, capsys: Any, request: pytest.FixtureRequest) -> None:
    tokenizer = request.config.rootpath / "tests" / "reference" / "tokenizer"
    text = shown(capsys, run, folder, "--tokenizer", tokenizer, "--rows", 1)
    assert "no tokenizer was found" not in text and "[[" in text


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path, run: Any, capsys: Any) -> None:
    assert run("rollouts", tmp_path) == 2
    assert "found no rollout, expected the save_dir of a run" in capsys.readouterr().err
    file = next((folder / "rollouts" / "00000000").glob("trained*.npy"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\xff")
    assert run("rollouts", folder, "--step", 1) == 2
    assert "damaged" in capsys.readouterr().err
    file.write_bytes(content)


class OfTokens(torch.nn.Module):
    """A tenth of its id for each token."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return ids / 10


def test_what_a_reward_model_gave_for_steps(
    tmp_path: Path, reference_dir: Path, run: Any, capsys: Any, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    steps = {"reward_model": OfTokens(), "reward_model_steps": "!", "tokenizer": tokenizer}
    train("grpo", tmp_path, reward_func=None, **steps, max_steps=1)
    text = shown(capsys, run, tmp_path)
    last = [float(ids[-1]) / 10 for ids in rollouts_of(tmp_path)[0].store["input_ids"]]
    found = re.findall(
        r"^reward (\S+) \(.*model_reward (\S+)\).*\nsteps by the reward model: (.*)$", text, re.MULTILINE
    )
    assert len(found) == 8
    for end, (total, mean, values) in zip(last, found, strict=True):
        scores = [float(value) for value in values.split(", ")]
        assert float(total) == float(mean) == pytest.approx(sum(scores) / len(scores), abs=1e-3)
        assert scores[-1] == pytest.approx(end, abs=1e-3) or end * 10 == STOP


def test_what_a_reward_model_gave_is_a_part_of_the_reward(tmp_path: Path, run: Any, capsys: Any) -> None:
    train("grpo", tmp_path, reward_model=reward_model(tiny(seed=1)), reward_weights=[0.5], max_steps=1)
    text = shown(capsys, run, tmp_path, "--sort", "reward")
    found = re.findall(r"^reward (\S+) \(even_share (\S+), model_reward (\S+)\)", text, re.MULTILINE)
    assert len(found) == 8 and "have no reward" not in text
    for total, by_function, by_model in found:
        assert float(total) == pytest.approx(0.5 * float(by_function) + float(by_model), abs=1e-3)
    totals = [float(total) for total, _, _ in found]
    assert totals == sorted(totals, reverse=True)
