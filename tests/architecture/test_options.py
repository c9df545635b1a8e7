"""No dead options: every field of every configuration class, and every setting of a trainer, is read by the code."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from llm_trainer.config import algorithms, reinforcement, schema
from llm_trainer.config.options import Sampling, Settings
from llm_trainer.config.table import ALGORITHMS, key_of

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llm_trainer"
_ALL = {**vars(algorithms), **vars(reinforcement), **vars(schema)}.values()
SECTIONS = [value for value in _ALL if isinstance(value, type) and is_dataclass(value)]


def reads(*skip: str) -> dict[str, int]:
    """Attribute name -> number of places that read it outside the files `skip`."""
    found: dict[str, int] = {}
    for path in SOURCE.rglob("*.py"):
        if path.name in skip or "tutorial" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[node.attr] = found.get(node.attr, 0) + 1
    return found


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_of_the_configuration_is_read(section: type) -> None:
    known = reads("schema.py", "algorithms.py", "reinforcement.py")
    dead = [f.name for f in fields(section) if not known.get(f.name)]  # type: ignore[arg-type]
    # The schema itself resolves these: other names of fields that are read, and the name behind `OptimConfig.optimizer`;
    # `plugins` is read from the file, before there is a configuration; sections of algorithms by the keys of their table.
    assert set(dead) <= {"mask_prompt", "max_lr", "optim_type", "plugins", *map(key_of, ALGORITHMS)}


@pytest.mark.parametrize("section", [Settings, Sampling])
def test_every_setting_of_a_trainer_is_read(section: type) -> None:
    known = reads("options.py")
    assert [f.name for f in fields(section) if not known.get(f.name)] == []
