"""A run goes on where it stopped, whatever was chosen for it before and whatever is chosen now."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from table import STEPS, TRAINERS, Cell, Curve, differences, run

from llm_trainer import compiler
from llm_trainer.train import sizing

TOLERANCE = 1e-6
TOLERANCE_OF = {"ppo": 1e-5}  # of a new critic, see test_table.py
IN_MANY_WAYS = ("sft", "dpo", "grpo")  # the last with further rows, which have a position of their own
