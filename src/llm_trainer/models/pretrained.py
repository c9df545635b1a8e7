"""What is at a path, or behind a name of the hub: the one place that knows where a model may lie and what tells its kind."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm_trainer.checkpoint import valid_checkpoints
from llm_trainer.checkpoint.adapter_bases import BASE_FOLDER, Base, read_base
from llm_trainer.config.env import environment
from llm_trainer.models import inside


class Kind(Enum):
    """What can be found."""

    LANGUAGE_MODEL = "a language model"
    ANSWER_REWARD_MODEL = "a reward model of answers"
    STEP_REWARD_MODEL = "a reward model of steps"
    WEIGHTS = "weights without a config.json"
    TOKENIZER = "a tokenizer without a model"


# ends of the names of transformers' classes; what ends otherwise is taken for a language model
ENDINGS = {"ForSequenceClassification": Kind.ANSWER_REWARD_MODEL, "ForTokenClassification": Kind.STEP_REWARD_MODEL}
REWARD_MODELS = tuple(ENDINGS.values())
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # one of which a processor has


@dataclass(frozen=True)
class Pretrained:
    """What was found.

    Attributes:
        kind: what it is.
        source: what loads it: the folder or hub name for `from_pretrained`; of weights, the file or checkpoint folder for
            `load_checkpoint`.
        config: the content of its config.json; empty for weights and tokenizers. Of adapters that of their base.
        base: what the adapters in `source` stand on; None: it holds no adapters.
        place: what loads that base.
    """

    kind: Kind
    source: Path | str
    config: dict[str, Any] = field(default_factory=dict)
    base: Base | None = None
    place: Path | str = ""

    @property
    def model_source(self) -> Path | str:
        """What loads the model's configuration, and its weights unless there are adapters on them."""
        return self.source if self.base is None else self.place

    @property
    def has_processor(self) -> bool:
        """Whether a processor lies in `processor_source`; of names of the hub nobody looks."""
        return _holds_processor(self.processor_source)

    @property
    def processor_source(self) -> Path | str:
        """What a processor is read from: the folder of adapters, which has that of their training, or the model's."""
        return self.source if _holds_processor(self.source) else self.model_source

    @property
    def sees_images(self) -> bool:
        """Whether it is a vision-language model."""
        return inside.sees_images(SimpleNamespace(**self.config))

    @property
    def auto_class(self) -> Any:
        """The class of transformers that opens it: see `inside.auto_class`."""
        return inside.auto_class(SimpleNamespace(**self.config))

    def __str__(self) -> str:
        return ", ".join(self.config.get("architectures") or [self.kind.value])


def _holds_processor(folder: Path | str) -> bool:
    return any((Path(folder) / name).is_file() for name in PROCESSOR_FILES)


def find_pretrained(
    source: str | Path, expected: Collection[Kind] = tuple(Kind), key: str = "", hub: bool = True
) -> Pretrained:
    """Find out what `source` holds.

    Looked for, in this order: a folder of Hugging Face or of adapters (PEFT), a run's or a checkpoint's `model/`, the newest
    complete checkpoint of a run, a checkpoint without such a folder in it, a tokenizer's files; a file of weights; a name of
    the hub.

    Args:
        source: a path or a name.
        expected: what the caller can use.
        key: the key of the configuration that `source` was given for, to begin a message with.
        hub: `source` may be a name of the hub, whose config.json is then downloaded, or taken from the cache.

    Raises:
        ValueError: there is nothing, or something that is not expected.
    """
    path, name = Path(source), str(source)
    is_name = not name.startswith((".", "/", "~")) and name.count("/") <= 1  # `name` or `owner/name`, not a path

    # 1. what is there
    problem = "no such folder or file"
    found = None
    if path.is_dir():
        found = _in_folder(path)
        names = sorted(entry.name for entry in path.iterdir())
        problem = f"no model in it (found {', '.join(names[:8]) or 'nothing'})"
    elif path.is_file():
        kind = Kind.TOKENIZER if path.name == "tokenizer.json" else Kind.WEIGHTS
        found = Pretrained(kind, path)
    elif hub and is_name:
        found, problem = _on_the_hub(name)

    # 2. is it what the caller wants?
    where = f"{key}: {name}" if key else name
    if found is None:
        raise ValueError(f"{where}: {problem}; expected {_looked_for(expected, hub)}")
    if found.kind not in expected:
        raise ValueError(f"{where}: found {found}, expected {_looked_for(expected, hub)}")
    return found


def _in_folder(folder: Path) -> Pretrained | None:
    places = [folder, *valid_checkpoints(folder, "sizes")]
    for place in places:
        for candidate in (place, place / "model"):  # of a checkpoint, or a run's link to that of its newest or best one
            if (candidate / "config.json").is_file():
                config = _read_config(candidate / "config.json")
                return Pretrained(_kind_of(config), candidate, config)
            base = read_base(candidate)
            if base is not None:
                return _with_adapters(candidate, base)
    for place in places:
        if (place / "manifest.json").is_file():
            return Pretrained(Kind.WEIGHTS, place)
    names = {entry.name for entry in folder.iterdir()}
    if names & {"tokenizer_config.json", "tokenizer.json"} or names >= {"vocab.json", "merges.txt"}:
        return Pretrained(Kind.TOKENIZER, folder)
    return None


def _with_adapters(folder: Path, base: Base) -> Pretrained:
    """
    Raises:
        ValueError: the base is not where it is said to be.
    """
    problem: str | None = None
    if base.source is None:
        found = _in_folder(folder / BASE_FOLDER) if (folder / BASE_FOLDER).is_dir() else None
        source = str(folder / BASE_FOLDER)
    else:
        source = environment().base_model or base.source
        if Path(source).is_dir():
            found = _in_folder(Path(source))
        else:
            found, problem = _on_the_hub(source)
    if found is None or found.base is not None:
        raise ValueError(
            f"{folder}: these are adapters on {base}, and the base is not to be had from '{source}' "
            f"({problem or 'no model in it'}). Put it back there, or say where it is now: BASE_MODEL=path/or/name in the "
            f"environment; the fingerprint is compared"
        )
    return Pretrained(found.kind, folder, found.config, base, found.source)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path}: not valid JSON ({error}); expected the config.json of a Hugging Face folder"
        raise ValueError(message) from None


def _kind_of(config: dict[str, Any]) -> Kind:
    for name in config.get("architectures") or []:
        for ending, kind in ENDINGS.items():
            if name.endswith(ending):
                return kind
    return Kind.LANGUAGE_MODEL


def _on_the_hub(name: str) -> tuple[Pretrained | None, str]:
    """The model called `name`, or the reason why there is none."""
    from transformers import PretrainedConfig  # takes a second, and local folders do without it

    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        return None, f"no such folder or file here, and no model of this name could be read from the hub ({reason})"
    return Pretrained(_kind_of(config), name, config), ""


def _looked_for(expected: Collection[Kind], hub: bool) -> str:
    """`a reward model of answers: a Hugging Face folder ..., or a name of the hub`."""
    places = []
    if set(expected) & {Kind.LANGUAGE_MODEL, *REWARD_MODELS}:
        places.append("a Hugging Face folder (config.json and weights, or adapters on such a model)")
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
