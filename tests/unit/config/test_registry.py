"""The table of algorithms, and everything that follows from it."""

import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest

import llm_trainer
from llm_trainer import train_configs
from llm_trainer.config.errors import fields_of
from llm_trainer.config.load import example, parse
from llm_trainer.config.options import Balancing
from llm_trainer.config.registry import algorithm, import_plugins, options_of, register_algorithm, section_of
from llm_trainer.config.table import ALGORITHMS, key_of
from llm_trainer.losses.language import LanguageLoss
from llm_trainer.train_configs import ConfigError, DPOConfig, LossConfig, PretrainConfig, SFTConfig, TrainConfig
from llm_trainer.trainers.base import BaseTrainer

MINIMAL = {"model_config": "m", "file_dataset": "a.jsonl"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_line_of_the_table_is_all_that_an_algorithm_needs(name: str) -> None:
    line, trainer = ALGORITHMS[name], llm_trainer.get_trainer_class(name)
    assert issubclass(trainer, BaseTrainer) and trainer.section == key_of(name)
    assert line.description and getattr(train_configs, line.section.__name__) is line.section
    assert TrainConfig.__annotations__[key_of(name)] == f"{line.section.__name__} | None"
    described = parse(MINIMAL | {key_of(name): {}}, "here")
    assert algorithm(described, "here") == name
    assert options_of(described, trainer) == line.section()
    assert f"\n{key_of(name)}:  # " in example(name)


def test_the_configuration_has_the_sections_of_the_table_and_no_others() -> None:
    known = {line.section for line in ALGORITHMS.values()}
    annotated = {name: typing.get_args(field.annotation) for name, field in fields_of(TrainConfig).items()}
    assert {name for name, members in annotated.items() if known & set(members)} == set(map(key_of, ALGORITHMS))


def test_a_section_may_be_that_of_a_class_above() -> None:
    class Mine(llm_trainer.SFTTrainer):
        pass

    plain = TrainConfig(model_config="m", file_dataset="a", pretrain_config=PretrainConfig())
    chats = TrainConfig(model_config="m", file_dataset="a", sft_config=SFTConfig(gradient_accumulation_steps=3))
    assert section_of(plain, llm_trainer.PretrainTrainer) == "pretrain_config"
    assert section_of(chats, Mine) == "sft_config" and options_of(chats, Mine).gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match="BaseTrainer has no section in a configuration: set its class attribute"):
        section_of(plain, BaseTrainer)
    Mine.section = "unheard_config"
    with pytest.raises(ValueError, match=r"Mine.section: 'unheard_config' is no key .* llm_trainer.register_algorithm"):
        section_of(plain, Mine)


def test_exactly_one_section_says_how_to_train() -> None:
    two = parse(MINIMAL | {"dpo_config": {}, "kto_config": {}}, "two")
    with pytest.raises(ConfigError, match="two: expected exactly one of .* found dpo_config and kto_config; remove"):
        algorithm(two, "two")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("Un likely", "a:B", DPOConfig), "name: got 'Un likely', expected a lower-case word"),
        (("unlikely", "a.B", DPOConfig), "trainer: got 'a.B', expected 'package.module:Class'"),
        (("unlikely", "a:B", LossConfig), "section: got .* expected a class made with config_section"),
        (("dpo", "a:B", DPOConfig), "name: 'dpo' is taken by llm_trainer.trainers.preference:DPOTrainer"),
        (("optim", "a:B", DPOConfig), "name: optim_config is another section of the configuration"),
    ],
)
def test_lines_that_cannot_be_meant(line: tuple[str, str, type], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_algorithm(*line)
    assert "unlikely" not in ALGORITHMS


def test_plugins_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.yaml: plugins: no module 'no.such' can be imported"):
        import_plugins(["no.such"], "run.yaml")
    with pytest.raises(ConfigError, match="run.yaml: plugins: found no file .*mine.py"):
        import_plugins([str(tmp_path / "mine.py")], "run.yaml")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match=r"json.py has the name of another module, .*json/__init__.py; rename"):
        import_plugins([str(tmp_path / "json.py")], "run.yaml")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("plugin_unclosed", "x = (\n", r"plugin_unclosed.py cannot be imported: it raised SyntaxError: .* line 1"),
        (
            "plugin_lacking",
            "import nowhere_at_all\n",
            "it raised ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
    ],
)
def test_plugins_that_cannot_be_imported(
    name: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        import_plugins([str(tmp_path / f"{name}.py")], "run.yaml")


def test_the_loss_section_has_the_options_of_the_loss() -> None:
    """`losses` stays free of pydantic, so these two stand twice."""
    section = LossConfig()
    for option in fields(LanguageLoss):
        assert type(option.default)(getattr(section, option.name)) == option.default, option.name
    assert {f.name for f in fields(LossConfig)} == {f.name for f in (*fields(LanguageLoss), *fields(Balancing))}


def test_reading_the_table_imports_nothing_heavy() -> None:
    code = "import sys, llm_trainer.config.registry; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
