"""What people see: what is waited for, and what models write and files hold, without the characters that a terminal obeys.

A model can write, or a row can hold, the bytes that move a cursor, rename a window or ask a terminal to answer.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_KEPT = "\n\t"
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]  # C0, delete and C1 of ECMA-48
_REORDERING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # of text from right to left (Unicode UAX 9)
_SURROGATES = [*range(0xD800, 0xE000)]  # which no encoding can write
_SHOWN = {code: repr(chr(code))[1:-1] for code in [*_CONTROLS, *_REORDERING, *_SURROGATES] if chr(code) not in _KEPT}


def printable(text: str) -> str:
    """`text` with its control characters written out, `\\x1b` for an escape; line ends and tabs stay.

    Each character is looked at by itself, so a sequence that comes in several pieces is caught too.
    """
    return text.translate(_SHOWN)


@contextmanager
def waiting(what: str, speaks: bool = True, after_s: float = 1.0) -> Iterator[None]:
    """Say on stderr what is waited for, such as "loading the tokenizer", where the block takes longer than `after_s` seconds.

    Args:
        speaks: whether this process is the one that prints.
    """
    timer = threading.Timer(after_s, _say, [f"{what} ..."])
    timer.daemon = True  # an interpreter that ends does not wait for it
    if speaks:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
