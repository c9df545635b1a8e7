"""Several models in a run: one module to the engine, a folder for each in a checkpoint."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.checkpoint import CheckpointError, load_checkpoint
from llm_trainer.data.collate import collate_flat
from llm_trainer.data.stream import SampleStream
from two_models import TwoModels, two_models

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
from table import Rows, tiny_model


def make(folder: Path, max_steps: int, shares_body: bool = False, kind: Callable[..., Any] = TwoModels) -> Any:
    stream = SampleStream(Rows("pretrain", 512), collate_flat, rows_per_step=4, batch_size=2, flat=True)
    given: dict[str, Any] = two_models(tiny_model(), shares_body)
    if kind is SFTTrainer:
        given = {"model": given["model"], "optimizer": configure_optimizer(model=given["model"])}
    return kind(
        **given,
        train_loader=stream,
        val_loader=SampleStream(Rows("pretrain", 512), collate_flat, rows_per_step=8, batch_size=4, flat=True),
        device="cpu",
        use_amp=False,
        max_steps=max_steps,
        eval_interval=2,
        save_dir=str(folder),
        progress=False,
        log_interval=1,
    )


def state_of(trainer: Any) -> list[torch.Tensor]:
    state = trainer.run.engine.optimizer_state()["state"]
    moments = [state[name][key] for name in sorted(state) for key in sorted(state[name])]
    return [tensor.clone() for tensor in [*trainer.saved_model.state_dict().values(), *moments]]


@pytest.mark.parametrize("shares_body", [False, True])
def test_both_are_saved_and_go_on_bit_for_bit(tmp_path: Path, shares_body: bool) -> None:
    """From a folder and from a single file; each has a Hugging Face folder, and the policy's is where it always is."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    whole = make(tmp_path / "whole", 4, shares_body)
    before = [tensor.clone() for tensor in whole.critic.state_dict().values()]
    whole.train()
    after = whole.critic.state_dict()
    assert all(not torch.equal(a, b) for a, b in zip(before, after.values(), strict=True))

    half = make(tmp_path / "half", 2, shares_body)
    half.train()
    file = half.save_checkpoint(path=str(tmp_path / "half.pt"))
    for path in (tmp_path / "half" / "checkpoint-00000002", file, tmp_path / "half" / "best_model.pt"):
        rest = make(tmp_path / "rest", 4, shares_body)
        rest.load_checkpoint(str(path))
        rest.train()
        for ours, theirs in zip(state_of(rest), state_of(whole), strict=True):
            assert torch.equal(ours, theirs)

    saved = tmp_path / "whole" / "checkpoint-00000004"
    policy = AutoModelForCausalLM.from_pretrained(saved / "model").state_dict()
    critic = AutoModelForTokenClassification.from_pretrained(saved / "critic").state_dict()
    assert all(torch.equal(policy[name], value) for name, value in whole.base_model.state_dict().items())
    assert all(torch.equal(critic[name], value) for name, value in after.items())
    assert (tmp_path / "whole" / "model").resolve().name == "model"
    served = dict(whole.machine.stream_weights())  # what a sampler is given is the policy alone
    assert served.keys() <= whole.base_model.state_dict().keys() and len(served) > 20


def test_the_policy_alone_is_taken_from_them(tmp_path: Path) -> None:
    """What a run of two models leaves is where a run of one begins; the other way round says what is missing."""
    both = make(tmp_path / "both", 2)
    both.train()
    file = both.save_checkpoint(path=str(tmp_path / "both.pt"))
    for path in (file, str(tmp_path / "both")):
        model = tiny_model(seed=5)
        load_checkpoint(path, model=model)
        assert torch.equal(model.lm_head.weight, both.base_model.lm_head.weight)

    alone = make(tmp_path / "alone", 2, kind=SFTTrainer)
    alone.train()
    assert not (tmp_path / "alone" / "checkpoint-00000002" / "critic").exists()
    file = alone.save_checkpoint(path=str(tmp_path / "alone.pt"))
    for path in (str(tmp_path / "alone" / "checkpoint-00000002"), file):
        with pytest.raises(CheckpointError, match="holds no critic, which this run saves too.*init_weights_path"):
            make(tmp_path / "other", 2).load_checkpoint(path)
