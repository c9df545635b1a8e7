"""`calc_intermediate_size 4096 [multiple_of]`: the width of a SwiGLU layer and the parameters it leads to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import intermediate_size


def _multiple(text: str) -> int:
    return int(text.removeprefix("multiple_of="))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the width that a hidden size asks for."""
    parser = argparse.ArgumentParser(
        prog="calc_intermediate_size", description="SwiGLU width: 2/3 * 4 * hidden_size, rounded up to a multiple."
    )
    parser.add_argument("hidden_size", type=int, help="width of the residual stream")
    parser.add_argument("multiple_of", type=_multiple, nargs="?", default=64, help="default: 64")
    given = parser.parse_args(arguments)
    try:
        width = intermediate_size(given.hidden_size, given.multiple_of)
    except ConfigError as error:
        parser.error(str(error))
    print(f"intermediate_size {width}")
    print(f"{3 * given.hidden_size * width:,} parameters per SwiGLU layer (3 * {given.hidden_size} * {width})")
