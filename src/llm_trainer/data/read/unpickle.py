"""Reading pickles as data: lists, dicts, tuples, numbers, strings, bytes, None, bool, numpy arrays, nothing that runs.

A pickle is a program: `pickle.load` calls whatever callables the file names. Here a file can only name the few that
rebuild numpy arrays; any other name is refused at the instruction that looks it up, which comes before the one that
calls it (https://docs.python.org/3/library/pickle.html#restricting-globals).
"""

import pickle
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llm_trainer.data.read.errors import DataError, Location

# What the C code of `pickle` raises on a damaged stream, as its documentation warns.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, OverflowError,
    TypeError, UnicodeDecodeError, ValueError, MemoryError,
)  # fmt: skip


def _latin1(text: str, encoding: str) -> bytes:
    """How pickle protocols below 3 spell bytes; `_codecs.encode` itself would import whatever codec the file names."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    """A numpy scalar from its bytes; object scalars would hold raw pointers."""
    if dtype.hasobject or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of dtype {dtype}")
    return np.frombuffer(data, dtype, 1)[0]


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """How pickle protocol 5 spells a contiguous array; `np.frombuffer` itself refuses object dtypes."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


_NUMPY: dict[str, Any] = {
    "multiarray._reconstruct": np.empty(0).__reduce__()[0],  # public road to numpy's private constructor
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _frombuffer,
}
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
    **{f"numpy.core.{name}": function for name, function in _NUMPY.items()},  # written by numpy 1
    **{f"numpy._core.{name}": function for name, function in _NUMPY.items()},  # written by numpy 2
}


class _SafeUnpickler(pickle.Unpickler):
    """An unpickler that knows the names of `_ADMITTED` and no others."""

    def __init__(self, file: IO[bytes], location: Location) -> None:
        super().__init__(file)
        self._location = location

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global the stream names, before anything can be done with it."""
        admitted = _ADMITTED.get(f"{module}.{name}")
        if admitted is None:
            raise DataError(
                self._location,
                f"a pickle that asks for the global '{module}.{name}'",
                "lists, dicts, tuples, numbers, strings, bytes, None, bool and numpy arrays only",
                "convert the data where it was made, e.g. json.dump(rows) or numpy.save(ids); nothing was executed",
                reason="unsafe_pickle",
            )
        return admitted


def safe_load(path: Path | str, offset: int = 0) -> Any:
    """Load a pickle that holds plain data, without giving it a way to run code.

    Args:
        path: the file; read whole, a pickle cannot be memory mapped.
        offset: byte at which the pickle starts (an object `.npy` has a header before it).

    Returns:
        The data: Python containers, numbers, strings, bytes, numpy arrays and scalars.

    Raises:
        DataError: the stream names any other global, or is damaged.
    """
    location = Location(path)
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            return _SafeUnpickler(file, location).load()
        except DataError:
            raise
        except _DAMAGE as error:
            found = f"a pickle that cannot be read ({type(error).__name__}: {error})"
            raise DataError(
                location, found, "a complete pickle", "write the file again; it may be cut short"
            ) from error
