"""Collectives of a process that is alone: they give back what they got."""

import pytest
import torch

from llm_trainer.engine import dist


def test_alone_everything_is_ones_own() -> None:
    dist.start(torch.device("cpu"))
    tensor = torch.ones(2)
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.all_reduce(tensor) is tensor
    assert dist.gather_objects("a") == ["a"] and dist.broadcast_object({"b": 1}) == {"b": 1}
    dist.stop()


def test_main_process_first_passes_errors_on() -> None:
    with pytest.raises(KeyError, match="lost"), dist.main_process_first():
        raise KeyError("lost")
