"""An argument of another kind is named before anything is made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import DPOTrainer, GRPOTrainer, Hook, SFTTrainer, configure_optimizer
from llm_trainer.train.objects import KINDS, check_objects
from policies import tiny


class Other:
    """No object of any kind that a trainer takes."""


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [Other, "text", 3])
def test_every_argument_is_looked_at(name: str, value: Any) -> None:
    if (name, value) in {("save_dir", "text"), ("reward_func", "text")} or (value == 3 and name in _LOOKED_AT_LATER):
        return
    if isinstance(value, type) and name.endswith("_loader"):
        return  # its __iter__ is looked for later
    with pytest.raises(TypeError, match=rf"X: {name}: got the .*; expected "):
        check_objects("X", {name: value})


_LOOKED_AT_LATER = ("train_loader", "val_loader", "ptx_loader", "reward_func")


def test_what_fits_passes() -> None:
    model = nn.Linear(2, 2)
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters()))
    hooks = [Hook("see", print, every_steps=1)]
    check_objects(
        "X", {"model": model, "scheduler": schedule, "hooks": hooks, "save_dir": Path("a"), "ref_model": None}
    )
    check_objects(
        "X", {"reward_func": len, "train_loader": [{}], "tokenizer": Other(), "val_loader": None, "another": 3}
    )


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer, GRPOTrainer])
def test_a_trainer_without_a_model(trainer: Any) -> None:
    with pytest.raises(TypeError, match=f"{trainer.__name__}: model: got NoneType; expected a model that is loaded"):
        trainer(None, optimizer=None, train_loader=None)


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_ids_that_are_fractions(key: str, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    batch = {"input_ids": ids, "labels": ids} | {key: ids.float()}
    model = tiny()
    optimizer = configure_optimizer(model=model, lr=1e-3)
    trainer = SFTTrainer(model, optimizer, [batch], save_dir=str(tmp_path), use_amp=False, progress=False)
    with pytest.raises(ValueError, match=f"SFTTrainer: {key}: got torch.float32; expected token ids"):
        trainer.train()
