"""Pictures without captions beside the pairs: a stream of its own, over its own epochs, exact to resume."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_support import TOKENIZER, VIEWS, assert_same, opened, write_members

from rocket_fast.batch import Batch
from rocket_fast.image_augment import ImageAugmentConfig, ViewConfig
from rocket_fast.loaders.base import DataConfig
from rocket_fast.loaders.choose import open_loader
from rocket_fast.loaders.unpaired import unpaired_data, unpaired_views

Image = pytest.importorskip("PIL.Image")

PLAIN = ViewConfig(size=4, scale=(1.0, 1.0), flip_prob=0.5)
PAIRS, PICTURES = 20, 11


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """20 pairs, and 11 pictures of levels 10, 20 ... 110, in a folder and a tar without captions."""
    write_members(tmp_path / "p.tar", {f"{i}": {"png": png(200 + i), "txt": b"a pair"} for i in range(PAIRS)})
    (tmp_path / "alone").mkdir()
    for i in range(1, 8):
        (tmp_path / f"alone/{i}.png").write_bytes(png(10 * i))
    write_members(tmp_path / "alone.tar", {f"{i}": {"png": png(10 * i)} for i in range(8, PICTURES + 1)})
    patterns = (str(tmp_path / "alone"), str(tmp_path / "alone.tar"))
    return DataConfig(train=(str(tmp_path / "p.tar"),), batch_size=8, unpaired=patterns, unpaired_ratio=4)


def both(data: DataConfig, image: ImageAugmentConfig = VIEWS, **options: int):
    return open_loader(data, image, None, TOKENIZER, device=torch.device("cpu"), **{"seed": 3, **options})[0]


def endless(loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader
        loader.set_epoch(loader.state_dict()["epoch"] + 1)


def epochs(loader, batches: int) -> list[Batch]:
    """So many batches, over as many epochs as it takes."""
    found = list(islice(endless(loader), batches))
    loader.close()
    return found


def levels(batches: list[Batch]) -> list[int]:
    return [int(level) for batch in batches for level in batch.unpaired[0][:, 0, 0, 0]]


def assert_all_same(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)
        assert all(torch.equal(x, y) for x, y in zip(a.unpaired, b.unpaired, strict=True))


def test_every_batch_has_its_pictures_and_pairs_are_what_they_are_without(data: DataConfig) -> None:
    loader = both(data)
    assert (len(loader), loader.samples, loader.skipped) == (2, PAIRS, {})
    batches = epochs(loader, 4)
    with opened(replace(data, unpaired=()), text=None, seed=3) as alone:
        assert_same(batches[0], next(iter(alone)))
    for batch in batches:
        assert [view.shape for view in batch.unpaired] == [(2, 3, 10, 10)] * 2, "the strong views"
        assert len(batch) == len(batch.keys) == len(batch.texts[0]) == 8


def test_pictures_have_epochs_of_their_own_each_showing_each_once(data: DataConfig) -> None:
    plain = ImageAugmentConfig(weak=PLAIN, strong=(PLAIN, PLAIN))
    seen = levels(epochs(both(data, plain), 15))
    every = {10 * i for i in range(1, PICTURES + 1)}
    for start in range(0, 30, 10):  # an epoch of 5 steps, which leave out one picture
        assert len(set(seen[start : start + 10])) == 10
        assert set(seen[start : start + 10]) <= every
    assert set(seen) == every
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize("stop", [1, 2, 5, 7])  # within epochs, at the end of the pairs', and of the pictures'
def test_a_saved_place_goes_on_with_the_same_batches(data: DataConfig, stop: int) -> None:
    whole = epochs(both(data), 12)
    loader = both(data)
    batches = endless(loader)
    assert_all_same(list(islice(batches, stop)), whole[:stop])
    state = loader.state_dict()
    next(batches)
    for continued in (both(data), loader):  # another process's, and one that is elsewhere and has made pictures ahead
        continued.load_state_dict(state)
        assert_all_same(epochs(continued, 12 - stop), whole[stop:])


def test_ranks_share_each_steps_pictures(data: DataConfig) -> None:
    whole = epochs(both(data), 7)
    parts = [epochs(both(data, rank=rank, world_size=2), 7) for rank in range(2)]
    for batch, *own in zip(whole, *parts, strict=True):
        for view, views in enumerate(zip(*(part.unpaired for part in own), strict=True)):
            assert torch.equal(torch.cat(views), batch.unpaired[view])


def test_what_pictures_are_skipped_is_counted_apart(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "alone/1.png").write_bytes(b"no picture")
    loader = both(data)
    batches = epochs(loader, 10)
    assert loader.skipped == Counter({"unpaired: corrupt image": loader.skipped.total()})
    assert 1 <= loader.skipped.total() <= 2, "once an epoch, unless left out"
    assert all(batch.valid.all() for batch in batches)


def test_errors_say_what_is_wrong(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data.unpaired: got 'x', expected a tuple of patterns"):
        replace(data, unpaired="x")
    with pytest.raises(ValueError, match=r"data.unpaired_ratio: got 3, expected a divisor of data.batch_size = 8"):
        replace(data, unpaired_ratio=3)
    with pytest.raises(ValueError, match=r"data.unpaired_ratio: got 0, expected a number >= 1"):
        replace(data, unpaired_ratio=0)
    with pytest.raises(ValueError, match=r"data.unpaired_ratio: got 4, expected .* 4 processes equally many of 8 / 4"):
        both(data, rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"data.unpaired: got '11 pictures', expected at least 16, a step's"):
        both(replace(data, batch_size=16, unpaired_ratio=1))
    loader = both(replace(data, unpaired=()))
    state = loader.state_dict()
    loader.close()
    loader = both(data)
    with pytest.raises(ValueError, match=r"data.unpaired: got 'a saved place without', expected the saved run's"):
        loader.load_state_dict(state)
    loader.close()


def test_pictures_take_what_the_pairs_data_says_but_order_and_weights(data: DataConfig) -> None:
    given = replace(data, workers=9, shuffle=False, drop_last=False, weights=(2.0,), pixel_limit=99)
    made = unpaired_data(given, 1)
    assert (made.batch_size, made.workers, made.shuffle, made.drop_last, made.weights) == (2, 2, True, True, None)
    assert made.pixel_limit == 99
    assert unpaired_views(VIEWS).views == VIEWS.strong
