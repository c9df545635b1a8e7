"""Commands that are printed can be typed as they are printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.cli.executable import typed


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment with one command, which is not on PATH; the work is done beside it."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    command = folder / "llm-trainer"
    command.write_text("#!/bin/sh\necho ran $1\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(tmp_path)
    return folder


def output_of(command: str) -> str:
    return subprocess.run(["sh", "-c", f"{command} plot"], capture_output=True, text=True).stdout


def test_an_environment_that_is_not_activated(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed() == "env/bin/llm-trainer" and output_of(typed()) == "ran plot\n"
    monkeypatch.chdir(os.sep + "usr")
    assert typed() == str(scripts / "llm-trainer") and output_of(typed()) == "ran plot\n"


def test_an_environment_that_is(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.defpath}")
    assert typed() == "llm-trainer" and output_of(typed()) == "ran plot\n"


def test_a_command_of_another_environment_is_not_meant(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "llm-trainer").write_text("#!/bin/sh\necho other\n")
    (other / "llm-trainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}{os.defpath}")
    assert output_of(typed()) == "ran plot\n"


def test_without_a_script_only_the_name_is_left(scripts: Path) -> None:
    assert typed("no-such-command") == "no-such-command"
