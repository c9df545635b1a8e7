"""Pickles are read as data: what runs code is refused before it runs."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.data.read.errors import DataError
from llm_trainer.data.read.unpickle import safe_load

PLAIN = [{"a": (1, 2.5, True, None), "b": b"\x00\xff", "c": "né"}, [-(10**30)]]
EVIL = {"posix.mkdir": (os.mkdir, "{}"), "builtins.exec": (exec, "import os; os.mkdir('{}')")}


class Runs:
    """Pickles to a call of `function(argument)`."""

    def __init__(self, function: object, argument: object) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_arrays_survive_every_protocol(tmp_path: Path, protocol: int) -> None:
    arrays = [
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.asfortranarray(np.eye(3)),
        np.float32(1.5),
        np.array(["x"]),
    ]
    ragged = np.array([[1, 2], [3]], dtype=object)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([PLAIN, arrays, ragged], protocol))
    plain, loaded, objects = safe_load(tmp_path / "x.pkl")
    assert plain == PLAIN
    for got, expected in zip(loaded, arrays, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert objects.tolist() == [[1, 2], [3]]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_call_is_refused_by_name_and_never_made(tmp_path: Path, name: str, protocol: int) -> None:
    function, argument = EVIL[name]
    victim, path = tmp_path / "victim", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([1, Runs(function, argument.format(victim))], protocol, fix_imports=False))
    with pytest.raises(DataError, match=rf"evil\.pkl: found a pickle that asks for the global '{name}'") as caught:
        safe_load(path)
    assert caught.value.reason == "unsafe_pickle"
    assert not victim.exists()
    pickle.loads(path.read_bytes())
    assert victim.exists()  # the file was a real attack


@pytest.mark.parametrize("value", [OrderedDict(a=1), range(3), Path("x"), np.random.default_rng(0)])
def test_other_classes_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match="numpy arrays only"):
        safe_load(tmp_path / "x.pkl")


@pytest.mark.parametrize("damage", [b"", b"\x80", b"hello", pickle.dumps(PLAIN)[:-5], b"\x80\x04]K\x01R."])
def test_a_damaged_stream_is_reported(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(damage)
    with pytest.raises(DataError, match="cannot be read"):
        safe_load(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("_codecs encode", ("x", "rot13")), ("numpy._core.multiarray scalar", (np.dtype("O"), b"12345678"))],
)
def test_the_admitted_names_do_nothing_else(tmp_path: Path, call: str, arguments: tuple) -> None:
    body = pickle.dumps(arguments, 0)[:-1]  # a tuple on the stack, to be called with
    (tmp_path / "x.pkl").write_bytes(b"c" + call.replace(" ", "\n").encode() + b"\n" + body + b"R.")
    with pytest.raises(DataError, match="cannot be read"):
        safe_load(tmp_path / "x.pkl")
