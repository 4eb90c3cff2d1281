"""Pickles and numpy object arrays of plain data, without what makes pickles dangerous: nothing in them is called.

A pickle may name any function and have it called. Here the few names that containers and numpy's values need stand for
stand-ins of our own, and any other name is an error. numpy's own functions are not called either: they trust what a
pickle says of types and sizes. Arrays come back as flat lists, numpy's scalars as Python's.
"""

from __future__ import annotations

import gc
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rocket_fast.errors import InvalidArgument, require

_PLAIN_DTYPE = re.compile(r"[<>|=]?([biufSU]\d+|b1|\?|O8?)")


class _Dtype:
    """Stands for ``numpy.dtype``: a kind and size, and a byte order given afterwards."""

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("ascii", "replace") if isinstance(code, bytes) else str(code)
        if not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"a numpy type {text!r} other than numbers, strings and objects")
        self.code = text.lstrip("<>|=")
        self.order = text[0] if text[0] in "<>|=" else "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        order = order.decode("ascii", "replace") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"a numpy byte order {order!r}")
        self.order = order

    @property
    def is_object(self) -> bool:
        return self.code.startswith("O")

    def values(self, data: Any) -> list[Any]:
        """Python values of the raw bytes (a string's characters, if Python 2 wrote it)."""
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, dtype=np.dtype(self.order + self.code)).tolist()


class _Array(list[Any]):
    """Stands for an array under construction: its values in a row, whatever its shape."""

    def __setstate__(self, state: Any) -> None:
        _version, _shape, dtype, _fortran, data = state
        self[:] = list(data) if dtype.is_object else dtype.values(data)


class _Ndarray:
    """Stands for the name ``numpy.ndarray``, an argument of the reconstruction."""

    def __init__(self, *_: object) -> None:
        raise pickle.UnpicklingError("an array made by calling numpy.ndarray")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: _Dtype, *_: object) -> _Array:
    return _Array(dtype.values(data))


def _scalar(dtype: _Dtype, data: Any = b"") -> Any:
    return data if dtype.is_object else dtype.values(data)[0]


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """How Python 2's protocols write ``b""``; with an argument it would make bytes of any size."""
    return b""


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    **{(module, "bytes"): _empty_bytes for module in ("builtins", "__builtin__")},
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Ndarray,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module, name))
        require(stand_in is not None, "pickle", f"{module}.{name}", "plain data; nothing was called")
        return stand_in


def load_pickle(path: Path) -> Any:
    """The plain data in a pickle; ValueError, naming it, for anything else in there, and for a damaged file."""
    with open(path, "rb") as file:
        return _unpickle(file)


def load_object_array(path: Path) -> list[Any]:
    """The elements of a .npy file's object array."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        require(read is not None, "npy version", version, "1.0 or 2.0")
        assert read is not None
        _, _, dtype = read(file)
        require(dtype == np.dtype(object), "array", str(dtype), "an object array of records")
        array = _unpickle(file)
    require(isinstance(array, list), "array", type(array).__name__, "an object array of records")
    return array


def _unpickle(file: BinaryIO) -> Any:
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects, none of them garbage
    try:
        return _Unpickler(file, encoding="latin1").load()
    except InvalidArgument:
        raise
    except Exception as error:  # unpicklers raise nearly anything on damaged bytes
        raise ValueError(f"the pickle cannot be read: {error}") from error
    finally:
        if collecting:
            gc.enable()
