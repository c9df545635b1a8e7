"""What is at a path, or behind a name of the hub: the one place that knows where a model may lie and what tells its kind."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from llm_trainer.checkpoint import valid_checkpoints

NAMES_SHOWN = 8  # of what lies in a folder, in messages


class Kind(Enum):
    """What can be found."""

    LANGUAGE_MODEL = "a language model"
    ANSWER_REWARD_MODEL = "a reward model of answers"
    STEP_REWARD_MODEL = "a reward model of steps"
    WEIGHTS = "weights without a config.json"
    TOKENIZER = "a tokenizer without a model"


# ends of the names of transformers' classes; what ends otherwise is taken for a language model
ENDINGS = {
    "ForSequenceClassification": Kind.ANSWER_REWARD_MODEL,
    "ForTokenClassification": Kind.STEP_REWARD_MODEL,
}
REWARD_MODELS = tuple(ENDINGS.values())


@dataclass(frozen=True)
class Pretrained:
    """What was found.

    Attributes:
        kind: what it is.
        source: what loads it: the folder or hub name for `from_pretrained`; of weights, the file or checkpoint folder for
            `load_checkpoint`.
        config: the content of its config.json; empty for weights and tokenizers.
    """

    kind: Kind
    source: Path | str
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(self.config.get("architectures") or [self.kind.value])


def find_pretrained(
    source: str | Path, expected: Collection[Kind] = tuple(Kind), key: str = "", hub: bool = True
) -> Pretrained:
    """Find out what `source` holds.

    Looked for, in this order: a Hugging Face folder, a run's or a checkpoint's `model/`, the newest complete checkpoint of
    a run, a checkpoint without a Hugging Face folder in it, a tokenizer's files; a file of weights; a name of the hub.

    Args:
        source: a path or a name.
        expected: what the caller can use.
        key: the key of the configuration that `source` was given for, to begin a message with.
        hub: `source` may be a name of the hub, whose config.json is then downloaded, or taken from the cache.

    Raises:
        ValueError: there is nothing, or something that is not expected.
    """
    path = Path(source)
    where = f"{source}"
    if key:
        where = f"{key}: {source}"

    # 1. what is there
    if path.is_dir():
        found = _in_folder(path)
        problem = f"no model in it (found {_names_in(path)})"
    elif path.is_file():
        found = _of_file(path)
        problem = ""
    elif hub and _may_be_a_hub_name(str(source)):
        found, problem = _on_the_hub(str(source))
    else:
        found, problem = None, "no such folder or file"

    # 2. is it what the caller wants?
    if found is None:
        raise ValueError(f"{where}: {problem}; expected {_looked_for(expected, hub)}")
    if found.kind not in expected:
        raise ValueError(f"{where}: found {found}, expected {_looked_for(expected, hub)}")
    return found


def _in_folder(folder: Path) -> Pretrained | None:
    for candidate in _model_folders(folder):
        config_file = candidate / "config.json"
        if config_file.is_file():
            config = _read_json(config_file)
            return Pretrained(_kind_of(config), candidate, config)
    for checkpoint in (folder, *valid_checkpoints(folder, "sizes")):
        if (checkpoint / "manifest.json").is_file():
            return Pretrained(Kind.WEIGHTS, checkpoint)
    if _holds_tokenizer(folder):
        return Pretrained(Kind.TOKENIZER, folder)
    return None


def _model_folders(folder: Path) -> Iterator[Path]:
    yield folder
    yield folder / "model"  # of a checkpoint, or a run's link to that of its newest or best one
    for checkpoint in valid_checkpoints(folder, "sizes"):
        yield checkpoint / "model"


def _of_file(path: Path) -> Pretrained:
    if path.name == "tokenizer.json":
        return Pretrained(Kind.TOKENIZER, path)
    return Pretrained(Kind.WEIGHTS, path)


def _kind_of(config: dict[str, Any]) -> Kind:
    for name in config.get("architectures") or []:
        for ending, kind in ENDINGS.items():
            if name.endswith(ending):
                return kind
    return Kind.LANGUAGE_MODEL


def _holds_tokenizer(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return bool(names & {"tokenizer_config.json", "tokenizer.json"}) or names >= {"vocab.json", "merges.txt"}


def _may_be_a_hub_name(source: str) -> bool:
    """Whether `source` is `name` or `owner/name`, and not written as a path."""
    return not source.startswith((".", "/", "~")) and source.count("/") <= 1


def _on_the_hub(name: str) -> tuple[Pretrained | None, str]:
    """The model called `name`, or the reason why there is none."""
    from transformers import PretrainedConfig  # takes a second, and local folders do without it

    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        return None, f"no such folder or file here, and no model of this name could be read from the hub ({reason})"
    return Pretrained(_kind_of(config), name, config), ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); expected the config.json of a Hugging Face folder"
        ) from None


def _names_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:NAMES_SHOWN]) or "nothing"


def _looked_for(expected: Collection[Kind], hub: bool) -> str:
    """`a reward model of answers: a Hugging Face folder ..., or a name of the hub`."""
    places = []
    if set(expected) & {Kind.LANGUAGE_MODEL, *REWARD_MODELS}:
        places.append("a Hugging Face folder (config.json and weights)")
        places.append("the save_dir of a run that has saved a checkpoint")
        places.append("one of its checkpoint-... folders")
    if Kind.WEIGHTS in expected:
        places.append("a .pt file")
    if Kind.TOKENIZER in expected:
        places.append("a tokenizer folder")
    if hub:
        places.append("a name of the hub")
    wanted = " or ".join(kind.value for kind in Kind if kind in expected)
    return f"{wanted}: {', '.join(places[:-1])} or {places[-1]}"
