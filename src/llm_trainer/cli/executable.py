"""How a command is typed on this machine."""

import shutil
import sys
from pathlib import Path


def typed(name: str = "llm-trainer") -> str:
    """`name` as a person types it in this folder: alone where PATH leads to it, else with the folder that it lies in.

    In a virtual environment that is not activated that is `.venv/bin/llm-trainer`, say.

    Args:
        name: one of this package's console scripts.
    """
    ours = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    if not ours.exists() or (on_path is not None and ours.samefile(on_path)):
        return name
    here = Path.cwd()
    if ours.is_relative_to(here):
        ours = ours.relative_to(here)
    return str(ours)
