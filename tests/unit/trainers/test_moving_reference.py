"""A reference that moves towards the policy: when, how far, what a checkpoint holds of it, and what is refused."""

import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_trainer import GRPOTrainer, configure_optimizer
from llm_trainer.checkpoint.reading import load_folder
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.rollouts import Rollout
from llm_trainer.models.build import build_model
from llm_trainer.models.frozen import StartingPoint
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted

MOVES = {"kl_coef": 0.1, "ref_sync_steps": 2, "mixup_alpha": 0.25}
Weights = dict[str, torch.Tensor]


def tiny(seed: int = 0, **shape: Any) -> Any:
    torch.manual_seed(seed)
    given = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    return build_model(ModelConfig(vocab_size=24, **(given | shape)))


JUDGED: list[int] = []  # completions of each call


def even_share(prompts: Any, completions: Any, answers: Any) -> list[float]:
    JUDGED.append(len(completions))
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completions]


def make(folder: Path, model: Any = None, **options: Any) -> GRPOTrainer:
    """Four rollouts of two prompts, two updates on each."""
    noise = torch.Generator().manual_seed(1)
    model = tiny() if model is None else model
    given: dict[str, Any] = {
        "train_loader": [{"prompts": torch.randint(3, 24, (2, 4), generator=noise)} for _ in range(4)],
        "reward_func": even_share,
        "reward_in_process": True,
        "num_samples_per_prompt": 4,
        "rows_per_update": 4,
        "gen_max_seq_len": 6,
        "stop_token_ids": [2],
        "max_epochs": 1,
        "keep_rollouts": True,
        "save_interval": 0,
    }
    optimizer = configure_optimizer(model=model, lr=3e-3)
    return GRPOTrainer(
        model=model,
        optimizer=optimizer,
        device="cpu",
        use_amp=False,
        log_interval=1,
        save_dir=str(folder),
        progress=False,
        **(given | MOVES | options),
    )


def copied(model: Any) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def train(folder: Path, **options: Any) -> tuple[GRPOTrainer, list[Weights], list[Weights]]:
    """A run, and the weights of the policy and of the reference after every step, the ones at the start first."""
    policies, references = [], []

    def note(run: Any) -> None:
        policies.append(copied(run.trainer.base_model))
        references.append(copied(run.trainer._moving.model))

    trainer = make(folder, hooks=[Hook("note", note, every_steps=1)], **options)
    note(trainer.run)
    trainer.train()
    return trainer, policies, references


def logprobs_by(weights: Weights, rollout: Rollout, row: int) -> np.ndarray:
    model = tiny()
    model.load_state_dict(weights, strict=False)
    ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
    with torch.no_grad():
        found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    wrote = np.array(rollout.store["trained"][row])[1:]
    return found.numpy()[wrote]


def test_it_moves_between_rollouts_as_the_formula_says(tmp_path: Path) -> None:
    _, policies, references = train(tmp_path, ref_sync_steps=3)
    assert len(policies) == 9
    expected = references[0]
    # Rollouts begin after 0, 2, 4 and 6 steps: the second one too early, the fourth one, too.
    for step in range(1, 9):
        before = policies[step - 1]
        if step == 5:
            expected = {name: torch.lerp(expected[name], before[name], 0.25) for name in expected}
            assert any(not torch.equal(expected[name], references[0][name]) for name in expected)
        assert_equal(references[step], expected)
    made = [Rollout(path) for path in sorted((tmp_path / "rollouts").glob("[0-9]" * 8))]
    for number, rollout in enumerate(made):  # every row was compared with one reference
        for row in range(len(rollout)):
            wrote = np.array(rollout.store["trained"][row])
            expected_here = logprobs_by(references[2 * number + 1], rollout, row)
            np.testing.assert_allclose(rollout.store["ref_logprobs"][row][wrote], expected_here, atol=1e-5)


def test_by_default_it_becomes_the_policy(tmp_path: Path) -> None:
    trainer, policies, references = train(tmp_path, mixup_alpha=1.0)
    assert_equal(references[3], policies[2])
    assert_equal(references[8], policies[6])
    assert trainer._get_extra_config_info()["reference"] == "moves by 1 every 2 steps"


def test_without_the_option_it_stays_and_no_checkpoint_holds_it(tmp_path: Path) -> None:
    trainer = make(tmp_path, ref_sync_steps=None, mixup_alpha=1.0, max_steps=4)
    first: Any = trainer.reference
    before = copied(first)
    trainer.train()
    assert_equal(copied(first), before)
    assert not list(tmp_path.glob("checkpoint-*/reference"))


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """In the middle of rollouts and at the end of one, before the reference moves."""
    whole, policies, references = train(tmp_path / "whole")
    make(tmp_path / "cut", max_steps=stop).train()
    saved = load_file(tmp_path / "cut" / f"checkpoint-{stop:08d}" / "reference" / "model.safetensors")
    assert_equal({name: saved[name] for name in references[stop] if name in saved}, saved)
    for name in saved:
        assert torch.equal(saved[name], references[stop][name])
    rest, *_ = train(tmp_path / "cut", resume="auto")
    assert rest._moving is not None and whole._moving is not None
    assert_equal(copied(rest.base_model), policies[-1])
    assert_equal(copied(rest._moving.model), references[-1])
    assert rest._moving.moved_at == whole._moving.moved_at == 6


def test_a_signal_after_it_has_moved(tmp_path: Path) -> None:
    """A checkpoint between the move and the first update: it does not move again."""
    _, policies, references = train(tmp_path / "whole")
    calls: list[int] = []

    def judged(prompts: Any, completions: Any, answers: Any) -> list[float]:
        calls.append(len(calls))
        if len(calls) == 3:  # of the rollout that begins after four steps
            os.kill(os.getpid(), signal.SIGTERM)
        return even_share(prompts, completions, answers)

    cut = make(tmp_path / "cut", reward_func=judged)
    with pytest.raises(TrainingInterrupted):
        cut.train()
    assert cut._moving is not None and cut._moving.moved_at == cut.run.progress.step == 4
    (path,) = (tmp_path / "cut").glob("checkpoint-00000004")
    assert load_folder(path).state["trainer"] == {"reference_moved_at": 4}
    rest, *_ = train(tmp_path / "cut", resume="auto")
    assert rest._moving is not None
    assert_equal(copied(rest.base_model), policies[-1])
    assert_equal(copied(rest._moving.model), references[-1])


def test_a_rollout_of_the_moved_reference_is_found_again(tmp_path: Path) -> None:
    """As after a kill when rollout 2 was finished, with a checkpoint from before the reference moved for it."""
    _, policies, _ = train(tmp_path / "whole")
    make(tmp_path / "killed", max_steps=4).train()
    shutil.copytree(tmp_path / "whole" / "rollouts" / "00000002", tmp_path / "killed" / "rollouts" / "00000002")
    again = make(tmp_path / "killed", resume="auto")
    JUDGED.clear()
    again.train()
    assert JUDGED == [8]  # the last rollout alone
    assert_equal(copied(again.base_model), policies[-1])


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"ref_sync_steps": None, "mixup_alpha": 1.0}, {}, "holds no reference.*whose reference did not move"),
        ({}, {"ref_sync_steps": None, "mixup_alpha": 1.0}, "several models, such as .* a reference that moves"),
    ],
)
def test_a_checkpoint_of_a_run_whose_reference_did_otherwise(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    make(tmp_path, max_steps=2, **then).train()
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, resume="auto", **now).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_sync_steps": None}, "mixup_alpha: got 0.25, but the reference never moves; expected ref_sync_steps"),
        ({"kl_coef": 0.0}, "ref_sync_steps: got 2, but there is no reference"),
        ({"rollouts": "elsewhere"}, "ref_sync_steps: the rollouts of another run"),
        ({"mixup_alpha": 0.0}, "mixup_alpha"),
        ({"mixup_alpha": 1.5}, "mixup_alpha"),
        ({"ref_sync_steps": 0}, "ref_sync_steps"),
        ({"reward_func": None}, "ref_sync_steps: got .*, but nothing makes rollouts, since nothing judges"),
        ({"ref_model": tiny(hidden_size=32)}, r"lm_head.weight, which is \(24, 16\), .* policy and \(24, 32\)"),
        (
            {"ref_model": tiny(tie_word_embeddings=False)},
            r"lm_head.weight, .* tied or a buffer in the policy",
        ),
    ],
)
def test_what_cannot_move_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        make(tmp_path, **options)


def with_adapters(seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    options = {"r": 1, "target_modules": ["q_proj"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        return peft.get_peft_model(tiny(), peft.LoraConfig(**options))


def test_of_a_policy_with_adapters_these_move(tmp_path: Path) -> None:
    """Nothing else is kept, and a run that goes on with a model of other adapters has those of its reference."""
    policies: list[Weights] = []

    def note(run: Any) -> None:
        policies.append({name: p.detach().clone() for name, p in run.trainer.base_model.named_parameters()})

    def run(folder: Path, seed: int, **options: Any) -> GRPOTrainer:
        trainer = make(folder, with_adapters(seed), hooks=[Hook("note", note, every_steps=1)], **options)
        assert isinstance(trainer.reference, StartingPoint)
        note(trainer.run)
        trainer.train()
        return trainer

    whole = run(tmp_path / "whole", 0)
    assert not list((tmp_path / "whole").glob("checkpoint-*/reference"))
    learned = [name for name in policies[0] if "lora" in name]
    expected = policies[0]
    for step in (2, 4, 6):  # before rollouts
        expected = {name: torch.lerp(expected[name], policies[step][name], 0.25) for name in learned}
    assert_equal(whole.run.engine.held.state_dict(), expected)
    run(tmp_path / "cut", 0, max_steps=3)
    rest = run(tmp_path / "cut", 1, resume="auto")
    assert_equal(rest.run.engine.held.state_dict(), expected)
    assert_equal(copied(rest.base_model), copied(whole.base_model))


def test_adapters_that_are_off_cannot_move(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ref_sync_steps: the reference is the policy with its adapters off"):
        make(tmp_path, with_adapters(), reference="base")
