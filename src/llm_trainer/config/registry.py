"""Which algorithm a configuration means, and how code from outside the package adds its own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.schema import TrainConfig
from llm_trainer.config.section import add_section
from llm_trainer.config.table import ALGORITHMS, AlgorithmEntry, key_of


def register_algorithm(name: str, trainer: str, section: type) -> None:
    """Add an algorithm to the table: it then has YAML (`<name>_config:`), `create_trainer(name)` and all commands.

    Args:
        name: lower case, as in `llm-trainer config <name>`.
        trainer: `"package.module:Class"`, a subclass of `BaseTrainer` whose `section` is `"<name>_config"`.
        section: the class of its options, made with `config_section`; it has `gradient_accumulation_steps`.

    Raises:
        ConfigError: the name is taken, or one of the three is not what it should be.
    """
    module, colon, attribute = trainer.partition(":")
    if not name.isidentifier() or name != name.lower():
        raise ConfigError(f"register_algorithm: name: got {name!r}, expected a lower-case word such as 'unlikelihood'")
    if not (module and colon and attribute):
        raise ConfigError(f"register_algorithm: trainer: got {trainer!r}, expected 'package.module:Class'")
    is_section = isinstance(section, type) and hasattr(section, "__pydantic_fields__")
    if not is_section or "gradient_accumulation_steps" not in fields_of(section):
        raise ConfigError(
            f"register_algorithm: section: got {section!r}, expected a class made with config_section that has a field "
            "gradient_accumulation_steps"
        )
    known = ALGORITHMS.get(name)
    if known is None and key_of(name) in fields_of(TrainConfig):
        raise ConfigError(
            f"register_algorithm: name: {key_of(name)} is another section of the configuration; choose another"
        )
    if known is not None and known.trainer != trainer:  # the same line again is a module that was imported again
        raise ConfigError(f"register_algorithm: name: {name!r} is taken by {known.trainer}; choose another")
    ALGORITHMS[name] = AlgorithmEntry(trainer, section)
    add_section(TrainConfig, key_of(name), section, ALGORITHMS[name].description)


def import_plugins(plugins: Iterable[str], where: str) -> None:
    """Import modules (`package.module`, or the path of a .py file), which register algorithms when they are imported.

    Raises:
        ConfigError: there is no such module or file.
    """
    for plugin in plugins:
        if plugin.endswith(".py"):
            _import_file(Path(plugin), where)
            continue
        _import(plugin, plugin, where)


def _import(name: str, plugin: str, where: str) -> Any:
    """A module.

    Raises:
        ConfigError: there is none of this name, or it raises while it is imported.
    """
    try:
        return import_module(name)
    except ConfigError:  # of `register_algorithm`
        raise
    except Exception as error:
        if is_missing(name, error):
            raise ConfigError(
                f"{where}: plugins: no module {plugin!r} can be imported; expected an installed package, or the path of a "
                ".py file"
            ) from None
        raise ConfigError(
            f"{where}: plugins: {plugin} cannot be imported: it raised {type(error).__name__}: {error}"
        ) from error


def is_missing(name: str, error: Exception) -> bool:
    """Whether an import failed because there is no such module, and not for one that it imports itself.

    Args:
        name: what was to be imported, `package.module`.
        error: that the import raised.
    """
    return isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")


def _import_file(path: Path, where: str) -> None:
    """Import a file under its own name, so that processes that are started later find it too."""
    if not path.is_file():
        raise ConfigError(f"{where}: plugins: found no file {path}; expected a .py file, or the name of a module")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = _import(path.stem, str(path), where)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise ConfigError(
            f"{where}: plugins: {path} has the name of another module, {module.__file__}; rename the file"
        )


def algorithm(config: TrainConfig, where: str) -> str:
    """The name of the algorithm whose section the configuration has.

    Args:
        config: the whole run.
        where: its origin, for the message.

    Raises:
        ConfigError: there is no such section, or several.
    """
    present = [name for name in ALGORITHMS if getattr(config, key_of(name)) is not None]
    if len(present) == 1:
        return present[0]
    known = ", ".join(map(key_of, ALGORITHMS))
    found = " and ".join(map(key_of, present)) or "none of them"
    advice = "remove the others" if present else "add for example `sft_config: {}`"
    raise ConfigError(f"{where}: expected exactly one of {known}, which says how to train; found {found}; {advice}")


def section_of(config: TrainConfig, trainer_class: Any) -> str:
    """The key of the section that steers `trainer_class`: its own, or that of a class it derives from, if only that is there.

    So `PretrainTrainer`, which is `SFTTrainer`, learns from a `pretrain_config` too, and a subclass of a trainer may have
    no section of its own.

    Raises:
        ValueError: the class has no section.
    """
    sections = [kind.section for kind in trainer_class.__mro__ if vars(kind).get("section")]
    if not sections:
        raise ValueError(
            f"{trainer_class.__name__} has no section in a configuration: set its class attribute section (to 'sft_config', "
            f"say) and write _from_config, or give it model, optimizer and train_loader"
        )
    if sections[0] not in fields_of(TrainConfig):
        raise ValueError(
            f"{trainer_class.__name__}.section: {sections[0]!r} is no key of a configuration; add it with "
            f"llm_trainer.register_algorithm"
        )
    return next((key for key in sections if getattr(config, key) is not None), sections[0])


def options_of(config: TrainConfig, trainer_class: Any) -> Any:
    """The section that steers `trainer_class`; where the configuration has none, that with all defaults."""
    key = section_of(config, trainer_class)
    given = getattr(config, key)
    if given is not None:
        return given
    return ALGORITHMS[key.removesuffix("_config")].section()


def accumulation(config: TrainConfig, trainer_class: Any) -> int:
    """Micro-batches per optimizer step, from the algorithm's section."""
    return int(options_of(config, trainer_class).gradient_accumulation_steps)
