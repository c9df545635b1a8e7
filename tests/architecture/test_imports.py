"""Data flows through the house in one direction: who may import whom, over ALL imports, those in functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llm_trainer"

# room -> rooms it may import, from wherever in its files
MAY_IMPORT = {
    # leaves
    "config": set(),
    "compiler": set(),
    "kernels": {"compiler"},
    "losses": {"kernels"},
    "position": set(),
    "state": {"position"},
    "image_batch": set(),
    "model_group": set(),
    "layout": {"state"},
    "disk": set(),
    "cores": set(),
    "lock": {"disk"},
    "terminal": set(),
    "tutorial": set(),
    "checkpoint": {"cores", "disk", "model_group"},
    "generation": {"image_batch"},
    "optim": set(),
    "rewards": {"config"},
    "episodes": {"config", "generation", "rewards"},
    "train_configs": {"config"},
    "optimizer": {"optim"},
    # data, models and engines
    "data": {"config", "losses", "machine", "position", "state", "layout", "disk", "lock", "image_batch"},
    "models": {"config", "losses", "layout", "checkpoint", "compiler", "kernels", "image_batch"},
    "engine": {"config", "checkpoint", "optim", "state", "cores", "model_group"},
    "plan": {"config", "losses", "optim"},
    # an algorithm, what it may ask, and what runs it
    "machine": {"generation", "layout"},
    "regulariser": {"state"},
    "algorithm": {"machine", "position", "state", "layout", "model_group", "regulariser"},
    "train": {
        "algorithm",
        "position",
        "state",
        "layout",
        "engine",
        "checkpoint",
        "config",
        "compiler",
        "kernels",
        "disk",
        "lock",
        "model_group",
        "terminal",
    },
    "trainers": {
        "algorithm",
        "image_batch",
        "regulariser",
        "machine",
        "state",
        "layout",
        "losses",
        "models",
        "generation",
        "rewards",
        "episodes",
        "config",
        "optim",
    },
    # what other tools open
    "export": {"checkpoint", "config", "data", "disk", "models"},
    # a description becomes objects
    "builder": {"layout", "config", "data", "models", "engine", "checkpoint", "disk", "terminal"},
    "assemble": {"builder", "config", "data", "engine", "optim", "models", "state", "checkpoint", "lock"},
    "cli": {
        "algorithm",
        "assemble",
        "builder",
        "layout",
        "trainers",
        "train",
        "config",
        "data",
        "disk",
        "cores",
        "lock",
        "plan",
        "models",
        "generation",
        "rewards",
        "engine",
        "export",
        "checkpoint",
        "state",
        "terminal",
    },
}
# What else is imported, and why: (file, room).
LICENSED = {
    ("trainers/base.py", "train"): "the one trainer file that starts a run",
    ("trainers/base.py", "assemble"): "the door of the config style",
    ("engine/score.py", "data"): "cuts the rows of a dataset into micro-batches as a stream does",
    ("generation/in_process.py", "engine"): "tells that memory has run out, and lets go of what took it",
    ("generation/seeing.py", "models"): "a tower is run as in training",
    ("plan/describe.py", "data"): "the size of a vocabulary is the tokenizer's",
    ("plan/describe.py", "models"): "counts the parameters of a model without weights",
    ("plan/tower.py", "models"): "tells a tower from its projector",
    ("trainers/rollouts.py", "data"): "implements what makes a rollout",
    ("trainers/prompt_images.py", "data"): "keeps the images of prompts in the rows of a rollout",
    ("trainers/played.py", "data"): "episodes become rows of a rollout, and messages ids",
    ("trainers/completions.py", "data"): "completions become rows of a rollout",
    ("trainers/ahead.py", "data"): "says whether rollouts can be made ahead",
    ("trainers/on_policy.py", "data"): "puts the source of rollouts around that of prompts",
    ("trainers/updates.py", "data"): "counts the updates of a rollout",
    ("trainers/grpo.py", "data"): "adds columns to a rollout",
    ("trainers/ppo.py", "data"): "adds columns to a rollout",
    ("trainers/judging.py", "data"): "adds columns to a rollout",
    ("trainers/ptx.py", "data"): "adds rows to the steps of a source",
    ("trainers/shaping.py", "data"): "reads the columns of a rollout",
    ("trainers/language.py", "data"): "amends the steps of a source with answers of the model's own",
    ("train/run.py", "data"): "asks for the workers of loaders, and holds the sources of steps",
    ("train/sources.py", "data"): "loaders become step sources here",
    ("train/rows.py", "data"): "a stream lays out its rows itself, the batches of a loader are laid out for it",
    ("train/run.py", "optim"): "tells a plateau schedule the validation loss",
    ("train/run.py", "image_batch"): "counts what towers were shown",
    ("train/configured.py", "optim"): "asks whether a schedule is ours",
    ("train/budget.py", "data"): "the protocol of a step source",
    ("train/sizing.py", "data"): "how a source lays out what it cuts",
    ("train/sizing.py", "plan"): "what a micro-batch takes",
    ("train/trial.py", "data"): "the longest rows of a stream",
    ("train/loop.py", "data"): "seeds a step",
    ("train/first_rows.py", "data"): "the first rows of a source, whatever this rank's share of them",
    ("train/first_rows.py", "models"): "adapters begin with what these rows say",
    ("train/retry.py", "data"): "the rows of a step, for messages",
    ("train/work.py", "data"): "the protocol of a step source",
    ("train/evaluate.py", "data"): "the same, and the chat format of prompts",
    ("train/transformers_driver.py", "data"): "seeds a step as the loop does",
    ("train/machine.py", "generation"): "tells weights from others as those are told that a sampler was sent",
    ("train/evaluate.py", "generation"): "answers to prompts",
    ("train/probing.py", "generation"): "asks a model as it is",
    ("train/probing.py", "data"): "the chat format that training uses",
    ("train/probing.py", "export"): "what a model is asked, and how the answers are written down",
    ("train/probing_sight.py", "models"): "what a model is shown, by which towers are known",
    ("train/probing_sight.py", "data"): "pictures go the way of rows",
    ("train/probing_sight.py", "image_batch"): "pictures go the way of rows",
    ("train/probing_sight.py", "export"): "what a model is shown, and how what it sees is written down",
    ("train/snapshot.py", "data"): "the protocol of a step source",
    ("train/preflight.py", "data"): "shows the ledger and the batch equation",
    ("train/preflight.py", "models"): "shows adapters, what is frozen, attention and the head",
    ("train/preflight.py", "optim"): "shows the schedule",
    ("train/preflight.py", "plan"): "expected memory",
    ("train/size.py", "models"): "parameters and FLOPs of a token",
    ("train/size.py", "optim"): "what an optimizer's state takes",
    ("train/size.py", "plan"): "the shape of a model and the peak of a device",
}
# Look into what other libraries have made and import nothing else of ours, so that every room may import them.
FOR_ALL = {"llm_trainer.models.experts", "llm_trainer.models.inside", "llm_trainer.models.quantize"}
# Imported in exactly one file each, and inside functions: they are heavy or rare.
ONE_FILE_EACH = (
    "wandb",
    "tensorboard",
    "deepspeed",
    "peft",
    "accelerate",
    "bitsandbytes",
    "vllm",
    "torchao",
    "datasets",
    "gguf",
    "xllamacpp",
)
FORBIDDEN_IN_ALGORITHMS = ("torch.distributed", "os")
A_KIND_OF_TENSOR = "torch.distributed.tensor"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = path
    return found


MODULES = modules()


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


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    everything = imports(ast.parse(MODULES[name].read_text()), at_load_only=False)
    found = {imported for imported in everything if imported in MODULES}
    packages = {imported.rpartition(".")[0] for imported in found}
    return found - packages - {name}  # `from a.b import c` names the package a.b too


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name)])
def test_rooms_import_in_one_direction(name: str) -> None:
    room, path = room_of(name), MODULES[name].relative_to(SOURCE).as_posix()
    theirs = {room_of(imported) for imported in own_imports(name) - FOR_ALL} - {room, ""}
    licensed = {other for file, other in LICENSED if file == path}
    assert theirs <= MAY_IMPORT[room] | licensed, f"{path} imports {sorted(theirs - MAY_IMPORT[room] - licensed)}"


def test_what_every_room_may_import_imports_nothing_else_of_ours() -> None:
    for name in FOR_ALL:
        assert own_imports(name) <= FOR_ALL


def test_every_licence_is_used() -> None:
    for path, room in LICENSED:
        name = ".".join(["llm_trainer", *Path(path).with_suffix("").parts])
        assert room in {room_of(imported) for imported in own_imports(name)}, (path, room)


def test_no_file_reaches_itself_again() -> None:
    """Over all imports, annotations and functions included: a reader who follows them always comes to an end."""
    graph = {name: own_imports(name) for name in MODULES}
    while graph:  # take away what imports nothing that is left, until nothing is left
        leaves = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: imported for name, imported in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", ONE_FILE_EACH)
def test_heavy_libraries_are_imported_in_one_file_inside_functions(name: str) -> None:
    def uses(path: Path, at_load_only: bool) -> bool:
        everything = imports(ast.parse(path.read_text()), at_load_only)
        theirs = [module for module in everything if not module.startswith("llm_trainer.")]
        return any(part == name for module in theirs for part in module.split("."))

    assert [path for path in MODULES.values() if uses(path, True)] == []
    of_its_own = {"torchao": 2}  # weights in few bits, and products in 8 bits: two things of one library
    assert len([path for path in MODULES.values() if uses(path, False)]) <= of_its_own.get(name, 1)


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
    readers = [path for path in MODULES.values() if "os.environ" in path.read_text() or "getenv" in path.read_text()]
    assert [path.relative_to(SOURCE).as_posix() for path in readers] == ["config/env.py"]


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, llm_trainer; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_trainer_reaches_for_the_run() -> None:
    """An algorithm asks its `machine`; only `base.py` holds the run."""
    for path in (SOURCE / "trainers").glob("*.py"):
        assert path.name == "base.py" or ".run." not in path.read_text(), path


def test_every_public_name_exists() -> None:
    import llm_trainer

    assert all(getattr(llm_trainer, name) for name in llm_trainer.__all__)
