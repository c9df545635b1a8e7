"""Python's collector of garbage, which waits while libraries are imported."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_waits() -> Iterator[None]:
    """The context of imports: what they make is not looked through for garbage, now or later.

    torch and transformers make about a million objects that stay. Looking through them again and again took a fifth of the
    processor time of their imports (docs/results.md). Where torch is there already, nothing is done.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
