"""The bases of models with adapters, as one run knows them: what its checkpoints leave out, and are compared with."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.adapter_bases import BASE_FOLDER, Base, check_base, find_base, fingerprint, read_base
from llm_trainer.checkpoint.adapter_names import base_names, saves_adapters
from llm_trainer.checkpoint.adapters import Saved
from llm_trainer.checkpoint.folders import names_alone
from llm_trainer.checkpoint.valid import valid_checkpoints
from llm_trainer.checkpoint.weights import tensors_by_name
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.model_group import ModelGroup, members_of


class Bases:
    """What the models of one run stand on, by their names; all ranks call it together.

    Args:
        engine: gathers weights.
        save_dir: of the run's checkpoints.
        say: called with a line about a base that lies nowhere else than in checkpoints.
    """

    def __init__(self, engine: Engine, save_dir: Path, say: Callable[[str], None]) -> None:
        self._engine, self._save_dir, self._say = engine, save_dir, say
        self._found: dict[str, Base] = {}

    def look_at(self, model: nn.Module) -> int | None:
        """Find out what the models of a run stand on, before an engine shards them.

        Returns:
            Bytes of what a checkpoint writes of them; None: all.
        """
        members = members_of(model)
        if not any(map(saves_adapters, members.values())):
            return None
        found: dict[str, Base | None] = {}
        failure = None
        if dist.is_main():  # elsewhere there may be no weights
            try:
                found = {name: find_base(member) for name, member in members.items()}
            except OSError as error:
                failure = f"the base of the adapters could not be looked at: {error}"
        found, failure = dist.gather_patiently((found, failure))[0]
        if failure is not None:
            raise CheckpointError(failure)
        self._found = {name: base for name, base in found.items() if base is not None}
        for name, base in self._found.items():
            if base.source is None:
                self._say(
                    f"checkpoints hold the base of {name}, once for all of them in {self._save_dir}: {base.kept_because}"
                )
        if not self._found:
            return None
        return sum(self._bytes_of(name, member, model) for name, member in members.items())

    def _bytes_of(self, name: str, member: nn.Module, model: nn.Module) -> int:
        base = self._found.get(name)
        is_whole = base is None or base.source is None
        named = tensors_by_name(member)
        if base is None:
            named = {inner: named[inner] for inner in names_alone(model, name, self._found) or named}
        tensors = {id(tensor): tensor for tensor in named.values()}
        return sum(tensor.nbytes for tensor in tensors.values() if is_whole or tensor.requires_grad)

    # Saving.

    def wanted(self, model: nn.Module, state: Mapping[str, Any]) -> tuple[set[str] | None, dict[str, Saved]]:
        """Names of the tensors that a checkpoint needs (None: all), and, on the main process, what of adapters it holds.

        Args:
            model: a model or a group of several.
            state: see `snapshot.state_of`.

        Raises:
            CheckpointError: on all ranks, there is no space for what is found out on the way.
        """
        if not self._found:
            return None, {}
        names: list[str] = []
        saved: dict[str, Saved] = {}
        failure = None
        if dist.is_main():
            try:
                names, saved = self._names(model, state["optimizer"]["state"])
            except OSError as error:
                failure = f"how the adapters are called could not be found out: {error}"
        names, failure = dist.gather_patiently((names, failure))[0]
        if failure is not None:
            raise CheckpointError(failure)
        return set(names), saved

    def _names(self, model: nn.Module, stepped: Mapping[str, Any]) -> tuple[list[str], dict[str, Saved]]:
        names: list[str] = []
        saved = {}
        for name, member in members_of(model).items():
            prefix = ""
            if isinstance(model, ModelGroup):
                prefix = f"{name}."
            base = self._found.get(name)
            if base is None:
                wanted = list(names_alone(model, name, self._found) or tensors_by_name(member))
            else:
                own = {other.removeprefix(prefix) for other in stepped if other.startswith(prefix)}
                saved[name] = Saved.of(member, base, own, self._earlier(name, base))
                wanted = saved[name].names(member)
            names += [f"{prefix}{other}" for other in wanted]
        return names, saved

    def _earlier(self, name: str, base: Base) -> Path | None:
        """The folder of a model in an earlier checkpoint of this run that holds the same base."""
        if base.source is not None:
            return None
        for path in valid_checkpoints(self._save_dir, "sizes"):
            folder = path / name
            there = read_base(folder)
            if there is not None and there.fingerprint == base.fingerprint and (folder / BASE_FOLDER).is_dir():
                return folder
        return None

    # Loading.

    def check(self, path: str) -> None:
        """Compare with those of a checkpoint.

        Raises:
            CheckpointError: its adapters were trained on another base.
        """
        for name, own in self._found.items():
            there = read_base(Path(path) / name)
            if there is not None:
                whose = "this run's"
                if own.source is not None:
                    whose = f"this run's '{own.source}', its"
                check_base(own.fingerprint, whose, there, Path(path) / name)

    def loaded(self, path: str, model: nn.Module) -> None:
        """Note what the models stand on now that a checkpoint is loaded, which may have held a base."""
        for name, own in self._found.items():
            there = read_base(Path(path) / name)
            if there is None:  # all of the model, as a single file has it, and as checkpoints of before
                self._found[name] = self._after_all(name, own, model)
            elif there.source is None and there.fingerprint != own.fingerprint:
                self._found[name] = there

    def _after_all(self, name: str, own: Base, model: nn.Module) -> Base:
        prefix = ""
        if isinstance(model, ModelGroup):
            prefix = f"{name}."
        originals = {f"{prefix}{inner}": original for original, inner in base_names(members_of(model)[name]).items()}
        weights = self._engine.weights(originals)
        found = None
        if dist.is_main():
            found = fingerprint((original, weights[inner]) for inner, original in originals.items())
        found = dist.gather_patiently(found)[0]
        if found == own.fingerprint:
            return own
        because = "it is the one of a checkpoint that held all of the model"
        return replace(own, source=None, revision=None, fingerprint=found, kept_because=because)
