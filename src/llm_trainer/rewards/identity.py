"""What tells the code of a reward function from that of another by the same name."""

import hashlib
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any


def code_hash(function: Callable[..., Any]) -> str:
    """Hash of what a function does, wherever in its file it stands; '' where there is no code of Python's to be read.

    Of an object that can be called it is the code of its class. Functions that it calls, and values that it reads from
    elsewhere, are not looked at.
    """
    while isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None:
        code = getattr(type(function).__call__, "__code__", None)
    if code is None:
        return ""
    found, codes = hashlib.sha256(), [code]
    while codes:
        code = codes.pop()
        found.update(code.co_code + repr(code.co_names).encode())
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                codes.append(constant)
            elif isinstance(constant, frozenset):
                found.update(repr(sorted(map(repr, constant))).encode())  # whose order differs from process to process
            else:
                found.update(repr(constant).encode())
    return found.hexdigest()[:16]
