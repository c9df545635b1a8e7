"""Data flows through the house in one direction: which room may import which, held by reading the source."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llm_trainer"
ROOMS = sorted(
    path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.stem[0] != "_")
)

# room -> rooms it may import when its module is loaded
MAY_IMPORT = {
    "config": set(),
    "losses": set(),
    "tutorial": set(),
    "train_configs": {"config"},
    "optim": set(),
    "optimizer": {"optim"},
    "checkpoint": set(),
    "generation": set(),
    "data": {"config"},
    "models": {"losses", "config"},
    "engine": {"config", "checkpoint", "optim"},
    "trainers": {"losses", "models", "generation", "config"},
    "state": set(),
    "train": {"state", "engine", "checkpoint", "data", "config", "plan", "optim"},
    "plan": {"config", "losses", "models", "data", "optim"},
    "cli": {"config", "data"},
}
FREE = {"assemble", "py"}  # the door sees everything
# Imported in exactly one file each, and inside functions: they are heavy or rare.
ONE_FILE_EACH = ("wandb", "tensorboard", "deepspeed", "peft", "accelerate", "bitsandbytes", "vllm", "torchao")
FORBIDDEN_IN_ALGORITHMS = ("torch.distributed", "os")
A_KIND_OF_TENSOR = "torch.distributed.tensor"


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, at_load_only: bool) -> set[str]:
    """Dotted names of all imported modules; `at_load_only` leaves out functions and TYPE_CHECKING blocks."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if at_load_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_load_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        found |= imports(node, at_load_only)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_in_one_direction(path: Path) -> None:
    room = room_of(path)
    if room in FREE or (path.name == "__init__.py" and path.parent == SOURCE):
        return
    own = {name.split(".")[1] for name in imports(ast.parse(path.read_text()), True) if name.startswith("llm_trainer.")}
    allowed = MAY_IMPORT[room] | {room}
    assert own & set(ROOMS) <= allowed, f"{path.name} imports {sorted(own & set(ROOMS) - allowed)}"


@pytest.mark.parametrize("name", ONE_FILE_EACH)
def test_heavy_libraries_are_imported_in_one_file_inside_functions(name: str) -> None:
    def uses(path: Path, at_load_only: bool) -> bool:
        everything = imports(ast.parse(path.read_text()), at_load_only)
        theirs = [module for module in everything if not module.startswith("llm_trainer.")]
        return any(part == name for module in theirs for part in module.split("."))

    assert [path for path in modules() if uses(path, True)] == []
    assert len([path for path in modules() if uses(path, False)]) <= 1


@pytest.mark.parametrize("room", ["trainers", "losses", "models"])
def test_algorithms_know_no_ranks_no_environment_and_do_not_print(room: str) -> None:
    for path in (SOURCE / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        found = {name for name in imports(tree, False) if name.startswith(FORBIDDEN_IN_ALGORITHMS)}
        assert not {name for name in found if not name.startswith(A_KIND_OF_TENSOR)}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                assert called not in ("print", "hasattr") and method not in ("item", "cuda"), f"{path}:{node.lineno}"


def test_the_environment_is_read_in_one_file() -> None:
    readers = [path for path in modules() if "os.environ" in path.read_text() or "getenv" in path.read_text()]
    assert [path.relative_to(SOURCE).as_posix() for path in readers] == ["config/env.py"]


def test_the_package_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, llm_trainer; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_loop_stays_short() -> None:
    """The heart of the framework must fit on a few screens."""
    assert len((SOURCE / "train" / "loop.py").read_text().splitlines()) <= 200


def test_every_public_name_exists() -> None:
    import llm_trainer

    assert all(getattr(llm_trainer, name) for name in llm_trainer.__all__)
