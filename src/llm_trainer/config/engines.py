"""The table of engines: what executes a step, and what drives it. An engine of your own is one more line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineEntry:
    """One line of the table.

    Attributes:
        make: `"module:function"` of `(engine.base.EngineOptions) -> Engine`, imported when it is asked for.
        driver: `"module:function"` of what calls the steps: `(work, progress, after)`, as `train.loop.fit`.
        package: an optional one that it needs.
    """

    make: str
    driver: str = "llm_trainer.train.loop:fit"
    package: str | None = None


ENGINES: dict[str, EngineEntry] = {
    "torch": EngineEntry("llm_trainer.engine.torch:make"),
    "fsdp": EngineEntry("llm_trainer.engine.fsdp:make"),
    "deepspeed": EngineEntry("llm_trainer.engine.deepspeed:make", package="deepspeed"),
    "hf": EngineEntry(
        "llm_trainer.engine.torch:make_unwrapped",
        driver="llm_trainer.train.transformers_driver:fit",
        package="accelerate",
    ),
}


def known_engine(name: str) -> str:
    """`name` itself.

    Raises:
        ValueError: it is neither 'auto' nor in the table.
    """
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"got {name!r}, expected one of auto, {', '.join(ENGINES)}")
    return name
