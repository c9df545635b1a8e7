from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exported import Made
from llm_trainer.export.formats import FORMATS
from llm_trainer.export.request import Request, Written
from llm_trainer.export.source import find_source


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path) -> Made:
    """Tiny trained models, each made when it is first asked for."""
    return Made(tmp_path_factory.mktemp("made"), reference_dir / "tokenizer")


@pytest.fixture(scope="session")
def written(made: Made) -> Callable[[str, str], tuple[Path, Written]]:
    """`written(kind, format)`: the folder of an export that has not passed the gate yet; made once."""
    return _written(made)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path) -> Any:
    """Tiny trained models that see, each made when it is first asked for."""
    pytest.importorskip("PIL", reason="needs pillow")
    from exported_vision import Seen

    return Seen(tmp_path_factory.mktemp("seen"), reference_dir / "tokenizer")


@pytest.fixture(scope="session")
def written_seen(seen: Any) -> Callable[[str, str], tuple[Path, Written]]:
    """As `written`."""
    return _written(seen)


def _written(made: Made) -> Callable[[str, str], tuple[Path, Written]]:
    known: dict[tuple[str, str], tuple[Path, Written]] = {}

    def write(kind: str, to: str) -> tuple[Path, Written]:
        if (kind, to) not in known:
            folder = made.folder / "exports" / f"{kind}-{to}"
            folder.mkdir(parents=True)
            request = Request(find_source(made.run(kind), lambda line: None), folder, None, None, lambda line: None)
            known[kind, to] = folder, FORMATS[to].write(request)
        return known[kind, to]

    return write
