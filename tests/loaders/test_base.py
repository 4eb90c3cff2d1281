"""The random numbers of a view depend on nothing but seed, epoch, sample and view."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rocket_fast.loaders.base import TEXT_STREAM, DataConfig, sample_generator


def test_is_the_documented_philox():
    digest = np.frombuffer(hashlib.blake2b(b"shard/17", digest_size=16).digest(), dtype="<u8")
    counter = np.array([0, 2 * 1 + TEXT_STREAM, *digest.tolist()], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=np.array([5, 3], np.uint64), counter=counter))
    got = sample_generator(5, 3, "shard/17", 1, TEXT_STREAM)
    assert got.random(9).tolist() == expected.random(9).tolist()
    assert got.standard_normal(5).tolist() == expected.standard_normal(5).tolist()


def test_every_argument_matters_and_nothing_else():
    base = sample_generator(0, 0, "a", 0).random(4).tolist()
    others = [(1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 0, "a", 0, TEXT_STREAM)]
    for arguments in [*others, (2**64 - 1, 2, "é", 3)]:
        assert sample_generator(*arguments).random(4).tolist() != base
        sample_generator(*arguments).integers(0, 10, size=3, dtype=np.uint32)  # leaves half a number behind
    assert sample_generator(0, 0, "a", 0).random(4).tolist() == base


def test_threads_do_not_disturb_each_other():
    def numbers(i):
        generator = sample_generator(0, 0, str(i), 0)
        return [generator.random() for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(numbers, range(200)))
    assert together == [numbers(i) for i in range(200)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", ()),
        ("train", "a.tar"),
        ("batch_size", 0),
        ("workers", 0),
        ("captions", "json"),
        ("prefetch", -1),
        ("quality", "quick"),
        ("weights", (1.0, 2.0)),
        ("weights", (0.0,)),
        ("weights", (float("nan"),)),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        DataConfig(**{"train": ("a.tar",), field: value})
