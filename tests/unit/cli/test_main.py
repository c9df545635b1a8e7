"""The command line: a table of commands that is quick to show, and errors without a stack trace."""

import subprocess
import sys
from importlib import import_module

import pytest

from llm_trainer.cli.main import COMMANDS, main
from llm_trainer.config.errors import ConfigError


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, time\n"
        "from llm_trainer.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'yaml', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 0.3, time.process_time()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", ["config", "plot"])
def test_help_of_light_commands_imports_only_what_they_need(command):
    code = (
        "import sys\n"
        "from llm_trainer.cli.main import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'llm_trainer.cli.' + sys.argv[1] in sys.modules\n"
        "heavy = {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, command], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_can_be_asked_for_help(name, run, capsys):
    module, _, attribute = COMMANDS[name].target.partition(":")
    assert hasattr(import_module(module), attribute)
    assert run(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"Usage: llm-trainer {name} [OPTIONS]")
    assert run("--help") == 0
    assert COMMANDS[name].help in capsys.readouterr().out


def test_unknown_commands_are_refused(run, capsys):
    assert run("trian") == 2
    assert "No such command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "batch_size: got 0, expected an integer of at least 1"),
        ("batch_sise=1", "did you mean batch_size?"),
        ("sft_config={}", "found pretrain_config and sft_config; remove the others"),
        ("pretrain_config=null", "found none of them; add for example `sft_config: {}`"),
        ("file_dataset=nowhere.jsonl", "nowhere.jsonl: found no such file"),
        ("dataset_block_size=64", "dataset_block_size: got 64, but the model's longest sequence is 32"),
    ],
)
def test_users_mistakes_are_one_message_and_code_2(run, run_yaml, capsys, override, message):
    assert run("train", run_yaml, override) == 2
    error = capsys.readouterr().err
    said = error.removeprefix("importing torch and transformers ...\n")  # on a busy machine, the first time
    assert said.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_rows_beyond_what_positions_reach_steadily_are_refused(run, run_yaml, capsys):
    lists = "short_factor: [1.0, 1.0, 1.0, 1.0], long_factor: [2.0, 2.0, 2.0, 2.0]"
    rope = f"{{rope_type: longrope, factor: 2.0, original_max_position_embeddings: 16, {lists}}}"
    assert run("train", run_yaml, f"model_config.rope_scaling={rope}") == 2
    assert "dataset_block_size: rows of 32 tokens, and this model's RoPE" in capsys.readouterr().err


def test_traceback_shows_where_a_mistake_came_from(run_yaml):
    with pytest.raises(ConfigError):
        main(["train", str(run_yaml), "batch_size=0", "--traceback"])


def test_imports_are_not_looked_through_for_garbage():
    """In a process of its own: what is frozen stays so."""
    code = (
        "import gc, sys\n"
        "from llm_trainer.cli.collector import collector_waits\n"
        "with collector_waits():\n"
        "    assert not gc.isenabled()\n"
        "    made = [[number] for number in range(100_000)]\n"
        "assert gc.isenabled() and gc.get_freeze_count() > len(made), gc.get_freeze_count()\n"
        "gc.unfreeze()\n"
        "sys.modules['torch'] = gc  # there already\n"
        "with collector_waits():\n"
        "    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
