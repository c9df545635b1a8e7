"""The environment is read in one place."""

import ast
import re
from pathlib import Path

import pytest

import llm_trainer
from llm_trainer.config.env import Environment, environment, set_default
from llm_trainer.config.errors import ConfigError


def test_a_bare_environment_is_one_process():
    assert environment({}) == Environment()
    assert environment({"RANK": "", "TOKEN_DIR": ""}) == Environment()  # an empty variable says nothing


def test_torchrun_is_read():
    variables = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1234"}
    found = environment(variables | {"MASTER_ADDR": "node0", "PARALLEL_TYPE": "fsdp"})
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (3, 1, 4, 2)
    assert (found.master_addr, found.master_port, found.parallel_type, found.launched) == ("node0", 1234, "fsdp", True)


def test_checkpoint_folder_has_two_names():
    assert environment({"DIST_CHECKPOINT_DIR": "d"}).checkpoint_dir == "d"
    assert environment({"DIST_CHECKPOINT_DIR": "d", "CHECKPOINT_DIR": "c"}).checkpoint_dir == "c"


def test_names_of_instructions_are_read_as_onednn_reads_them():
    assert environment({"ONEDNN_MAX_CPU_ISA": "AVX512_core"}).max_cpu_isa == "avx512_core"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CKPT_MAX_TO_KEEP", "0", "an integer of at least 1"),
        ("WORLD_SIZE", "two", "an integer of at least 1"),
        ("RANK", "-1", "an integer of at least 0"),
        ("PARALLEL_TYPE", "tp", "one of ds, ddp, fsdp, none"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512", "one of SSE41, AVX, AVX2, AVX2_VNNI, AVX2_VNNI_2, AVX512_CORE, "),
    ],
)
def test_nonsense_is_named(name, value, expected):
    message = f"environment variable {name}: got {value!r}, expected {expected}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        environment({name: value})


def test_set_default_respects_the_user(monkeypatch):
    monkeypatch.setenv("LOG_DIR", "mine")
    monkeypatch.setenv("TOKEN_DIR", "")  # remembers that there was none, which `delenv` alone does not
    monkeypatch.delenv("TOKEN_DIR")
    set_default("LOG_DIR", "other")
    set_default("TOKEN_DIR", "tok")
    assert (environment().log_dir, environment().token_dir) == ("mine", "tok")


def test_no_other_module_touches_the_environment():
    package = Path(llm_trainer.__file__).parent
    touching = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "putenv"):
                touching.add(path.relative_to(package).as_posix())
    assert touching == {"config/env.py"}
