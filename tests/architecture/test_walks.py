"""How much a reader must read to follow a question through the code: the files of each walk, and its budget in lines."""

from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llm_trainer"

WALKS = {  # question -> the files that answer it, and most lines of code, blank lines, comments and docstrings included
    "the loop": (["train/loop.py"], 120),
    "one training step": (
        [
            "train/loop.py",
            "train/work.py",
            "train/terms.py",
            "state.py",
            "algorithm.py",
            "engine/base.py",
            "engine/torch.py",
            "train/guards.py",
        ],
        1036,
    ),
    "DPO": (["trainers/preference.py", "trainers/references.py"], 400),
    "a description becomes objects": (["assemble.py"], 200),
}


@pytest.mark.parametrize("question", WALKS)
def test_a_walk_stays_short(question: str) -> None:
    files, budget = WALKS[question]
    lines = sum(len((SOURCE / file).read_text().splitlines()) for file in files)
    assert lines <= budget, f"{question}: {lines} lines in {', '.join(files)}"
