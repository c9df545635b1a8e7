"""What a model with adapters trains, by part and class of modules."""

import dataclasses
from typing import Any, NamedTuple, Self

from torch import nn

from llm_trainer.config.adapters import LORA
from llm_trainer.models.quantize import num_values
from llm_trainer.models.targets import Parts


class TableRow(NamedTuple):
    """The modules of one class in one part of a model.

    Attributes:
        part, kind: where they are, and their class.
        found, adapted: how many there are, and how many have something that is trained.
        trained, parameters: numbers of parameters.
    """

    part: str
    kind: str
    found: int
    adapted: int
    trained: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class AdaptersTable:
    """What a model with adapters trains.

    Attributes:
        kind: of the adapters, in words.
        rows: by part and class of modules.
    """

    kind: str
    rows: tuple[TableRow, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Of a `PeftModel`."""
        adapted: Any = model
        config = next(iter(adapted.peft_config.values()))
        kind = str(config.peft_type.value).lower()
        if kind == LORA:
            kind = f"lora of rank {config.r}, alpha {config.lora_alpha:g}"
        return cls(kind, tuple(_rows(adapted.get_base_model())))

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows for machines."""
        return [row._asdict() for row in self.rows]

    def lines(self) -> list[str]:
        """For people: what the adapters are, and the rows in columns."""
        cells = [("part", "module", "found", "adapted", "trained", "share")]
        for row in self.rows:
            share = f"{row.trained / max(1, row.parameters):.2%}"
            cells.append((row.part, row.kind, f"{row.found:,}", f"{row.adapted:,}", f"{row.trained:,}", share))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.kind]
        for line in cells:
            left = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
            right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
            lines.append("  ".join([*left, *right]))
        return lines


def _rows(model: nn.Module) -> list[TableRow]:
    """The table of a model into which peft has put adapters."""
    parts = Parts(model)

    # 1. whose each parameter is
    owners: dict[str, tuple[str, str]] = {}  # name of a module -> (part, class)
    numbers: dict[str, list[int]] = {}  # -> (trained, all) parameters
    for name, parameter in model.named_parameters():
        owner, module = _owner(model, name)
        owners[owner] = (parts.of(owner), type(_innermost(module)).__name__)
        counts = numbers.setdefault(owner, [0, 0])
        counts[0] += num_values(parameter) * parameter.requires_grad
        counts[1] += num_values(parameter)

    # 2. modules of one class together
    rows: dict[tuple[str, str], TableRow] = {}
    for owner, key in owners.items():
        trained, every = numbers[owner]
        row = rows.get(key, TableRow(*key, 0, 0, 0, 0))
        found, adapted = row.found + 1, row.adapted + (trained > 0)
        rows[key] = TableRow(*key, found, adapted, row.trained + trained, row.parameters + every)
    return list(rows.values())


def _owner(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The outermost module around a parameter that peft has put in the place of another one, or the one that has it."""
    path, module = [], model
    for step in name.split(".")[:-1]:
        path.append(step)
        module = module.get_submodule(step)
        if _replaced(module) is not None:
            break
    return ".".join(path), module


def _replaced(module: nn.Module) -> nn.Module | None:
    """What a module of peft stands for."""
    for name in ("base_layer", "original_module"):
        if module._modules.get(name) is not None:
            return module._modules[name]
    return None


def _innermost(module: nn.Module) -> nn.Module:
    replaced = _replaced(module)
    return module if replaced is None else _innermost(replaced)
