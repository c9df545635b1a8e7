"""Options and fixtures that every test room shares."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `from reference_cases import ...` in every room

# Whatever the shell says: each worker compiles 200 files of tests otherwise, and each process that a test starts this package.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_tests = count()
_frozen = 0  # modules that are there since garbage was last collected
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference",
        default=str(ROOT / "tests" / "reference"),
        help="folder of reference cases to compare with (same format as tests/reference)",
    )


def pytest_configure(config: pytest.Config) -> None:
    from one_thread import use_one_thread
    from quick_disk import keep_in_memory, never_wait

    never_wait()
    keep_in_memory()
    use_one_thread()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start
    in_memory = os.environ.get("PYTEST_DEBUG_TEMPROOT")
    os.environ["LLM_TRAINER_CACHE"] = tempfile.mkdtemp(prefix="llm-trainer-tests-", dir=in_memory)  # never the user's


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["LLM_TRAINER_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def imported_for_good() -> None:
    """What was imported is looked through by no collection of the garbage after: transformers asks for one in every run."""
    global _frozen
    if len(sys.modules) > _frozen:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of token stores for each test: what one has made, another does not find."""
    folder = os.environ["LLM_TRAINER_CACHE"]
    monkeypatch.setenv("LLM_TRAINER_CACHE", f"{folder}/{next(_tests)}")


@pytest.fixture(scope="session")
def reference_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of reference cases (`--reference DIR`, by default tests/reference)."""
    return Path(request.config.getoption("--reference"))


@pytest.fixture(scope="session")
def warm_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `llm-trainer` and `python` that start at once (see `warm.py`), for PATH."""
    from warm import commands

    with commands(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of a `python` that has imported what scripts need that fork ranks."""
    from warm import commands

    with commands(tmp_path_factory.mktemp("warm-ranks"), of="ranks") as folder:
        yield str(folder / "python")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(bytes)` is a folder with a disk of its own of that size; tests skip where nothing may be mounted."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small disk cannot be mounted here: {getattr(error, 'stderr', '') or error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy: a store may still be memory mapped


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data files that are never committed; tests that read them skip when the folder is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.parametrize`-like: a test with an argument `<group>_case` runs once per reference case of that group."""
    from reference_cases import GROUPS, iter_cases

    for name in metafunc.fixturenames:
        group = name.removesuffix("_case")
        if name.endswith("_case") and group in GROUPS:
            cases = list(iter_cases(Path(metafunc.config.getoption("--reference")), group))
            metafunc.parametrize(name, cases, ids=[case.name for case in cases])
