"""How much messages, rows and judged steps weigh in the loss: what a file says of it, under any of its names."""

import math
from collections.abc import Sequence
from typing import Any

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location, show

# Of a message: whether it is trained on (true, false), or how much its tokens weigh in the loss (from 0 up).
MESSAGE_WEIGHTS = ("loss", "train", "weight", "loss_weight")
_ROW_WEIGHTS = ("loss_weight", "weight")  # of a row; `loss` and `train` mean other things in tables


def weight_of(holder: dict[str, Any], names: Sequence[str], location: Location) -> float | None:
    """The weight that any of the keys `names` gives; None: none of them is there.

    Whether and how much may be said by different keys: `"train": true, "weight": 0.5` is 0.5, a 0 among them is 0.
    """
    found = {}
    for name in names:
        value = holder.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            expected = "true, false, or a number from 0 up"
            fix = "repair the weight, or remove or rename the key"
            raise DataError(location.at(name), show(value), expected, fix, "loss_weight")
        found[name] = float(value)
    numbers = set(found.values()) - {0.0, 1.0}
    if len(numbers) > 1:
        said = ", ".join(f"{name} {value:g}" for name, value in found.items())
        raise DataError(location, f"two weights ({said})", "one", "remove all but one of these keys", "loss_weight")
    if 0.0 in found.values():
        return 0.0
    if numbers:
        return numbers.pop()
    return 1.0 if found else None


def row_weight(row: Any, location: Location) -> float:
    """How much the tokens of a whole row weigh in the loss, from 0 up; 1 where the row does not say.

    A column `weight` without numbers from 0 up is about something else, which is noted.
    """
    if not isinstance(row, dict):
        return 1.0
    try:
        weight = weight_of(row, _ROW_WEIGHTS, location)
    except DataError as error:
        if error.location.key != location.at("weight").key:
            raise
        location.note("row: its column 'weight' holds no weights and is not used")
        weight = weight_of(row, _ROW_WEIGHTS[:1], location)
    return 1.0 if weight is None else weight


def weight_as_a_whole(row: Any, location: Location) -> float:
    """How much a row counts that is no conversation: its `loss_weight`, from 0 up; 1 where it does not say.

    A column `weight` of such a row may be about anything: that it is not used is noted.
    """
    if not isinstance(row, dict):
        return 1.0
    if row.get("weight") is not None and row.get("loss_weight") is None:
        location.note("row: its column 'weight' is not used; 'loss_weight' says how much a row counts")
    weight = weight_of(row, _ROW_WEIGHTS[:1], location)
    return 1.0 if weight is None else weight


def step_weights(row: Any, num_steps: int, location: Location) -> list[float]:
    """How much each judged step of a row weighs: its column `weights`, one per step, times the weight of the row.

    Raises:
        DataError: there are more or fewer weights than steps, or one is no number from 0 up.
    """
    of_row = row_weight(row, location)
    given = row.get("weights") if isinstance(row, dict) else None
    if given is None:
        return [of_row] * num_steps
    here = location.at("weights")
    if not isinstance(given, list) or len(given) != num_steps:
        expected = f"a list of {counted(num_steps, 'number')}, one per step"
        raise DataError(here, show(given), expected, "repair or remove the column", "loss_weight")
    weights = []
    for i in range(num_steps):
        weight = weight_of({str(i): given[i]}, (str(i),), here)
        weights.append(of_row * (1.0 if weight is None else weight))
    return weights
