"""Pickles and object arrays give plain data; whatever else is in one is not called."""

import os
import pickle
import struct

import numpy as np
import pytest

from rocket_fast.loaders.shards import ShardSet
from rocket_fast.loaders.sources.pickles import load_object_array, load_pickle

PLAIN = {
    "list": [1, 2.5, None, True, "ü", b"\x00\xff", (3, 4), 2**70],
    "sets": [{1, 2}, frozenset({3})],
    "numpy": [np.int64(3), np.float32(0.5), np.str_("né"), np.bytes_(b"ab"), np.bool_(True)],
    "arrays": [np.arange(3), np.array(["a", "bc"]), np.array([["x", None], [1, []]], dtype=object), np.zeros((0,))],
}
EXPECTED = {
    **PLAIN,
    "numpy": [3, 0.5, "né", b"ab", True],
    "arrays": [[0, 1, 2], ["a", "bc"], ["x", None, 1, []], []],
}


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_as_python_values(tmp_path, protocol):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(PLAIN, protocol=protocol))
    found = load_pickle(path)
    assert found == EXPECTED
    assert [type(value) for value in found["numpy"]] == [int, float, str, bytes, bool]


def test_names_of_older_numpy_are_known(tmp_path):
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps(PLAIN, protocol=2).replace(b"numpy._core.", b"numpy.core."))
    assert load_pickle(path) == EXPECTED


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda flag: Calls(os.system, f"touch {flag}"), "system"),
        (lambda flag: Calls(eval, f"open({flag!r}, 'w')"), "eval"),
        (lambda flag: Calls(open, flag, "w"), "open"),
        (lambda flag: Calls(getattr, flag, "upper"), "getattr"),
        (lambda flag: Calls(np.load, flag), "load"),
        (lambda flag: Calls(bytearray, 1 << 40), "bytearray"),
    ],
)
def test_what_is_named_is_not_called(tmp_path, call, name, protocol):
    flag = tmp_path / "it-ran"
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps([(1, "a", call(str(flag)))], protocol=protocol))
    with pytest.raises(ValueError, match=rf"pickle: got '\S+\.{name}', expected plain data; nothing was called"):
        load_pickle(path)
    assert not flag.exists()


def test_a_malicious_array_or_pickle_in_the_data_is_named_with_its_path(tmp_path):
    flag = tmp_path / "it-ran"
    array = np.empty(2, dtype=object)
    array[:] = [{"image_id": 1, "captions": ["a"]}, Calls(os.system, f"touch {flag}")]
    np.save(tmp_path / "cc3m.npy", array, allow_pickle=True)
    (tmp_path / "yfcc.pkl").write_bytes(pickle.dumps(list(array)))
    for name in ("cc3m.npy", "yfcc.pkl"):
        with pytest.raises(ValueError, match=rf"{name} .* cannot be read: pickle: got '\w+\.system'"):
            ShardSet([str(tmp_path / name)])
    assert not flag.exists()


def test_forged_types_do_not_reach_numpy(tmp_path):
    """Object arrays filled from raw bytes would be pointers of the file's choosing."""
    dtype, array = np._core.multiarray.scalar, np._core.multiarray._reconstruct
    forged = [
        (array, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, struct.pack("<q", 0x41414141))),
        (array, (np.ndarray, (0,), b"b"), (1, (1 << 40,), np.dtype("i8"), False, b"1234567")),
        (dtype, (np.dtype("V8"), b"12345678"), None),
        (dtype, (np.dtype([("a", "O")]), b"12345678"), None),
        (np.ndarray, ((1 << 40,),), None),
        (np.dtype, ("O8,O8",), None),
    ]

    class Forged:
        def __init__(self, parts):
            self.parts = parts

        def __reduce__(self):
            return self.parts if self.parts[2] is not None else self.parts[:2]

    for number, parts in enumerate(forged):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(Forged(parts)))
        if number == 0:
            assert all(isinstance(value, int) for value in load_pickle(path))  # the bytes, not what they point to
            continue
        with pytest.raises(ValueError, match="cannot be read"):
            load_pickle(path)


def test_damaged_files_are_errors(tmp_path):
    whole = pickle.dumps(PLAIN)
    array = np.array([{"image_id": i, "captions": ["a"]} for i in range(9)], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    saved = (tmp_path / "a.npy").read_bytes()
    assert len(load_object_array(tmp_path / "a.npy")) == 9
    for part in (0, 0.01, 0.5, 0.99):
        (tmp_path / "cut").write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match="cannot be read"):
            load_pickle(tmp_path / "cut")
        (tmp_path / "cut").write_bytes(saved[: int(part * len(saved))])
        with pytest.raises(ValueError, match=r"cannot be read|magic|EOF|header"):
            load_object_array(tmp_path / "cut")
    np.save(tmp_path / "numbers.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"array: got 'int64', expected an object array"):
        load_object_array(tmp_path / "numbers.npy")
