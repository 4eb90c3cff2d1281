"""Patterns, the epoch's order, and its division among processes."""

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rocket_fast.loaders.shards import Cursor, ShardSet, epoch_order, expand_braces, expand_patterns


def test_braces():
    assert expand_braces("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for pattern in ("{5..3}.tar", "{x}.tar"):
        with pytest.raises(ValueError, match=re.escape(pattern)):
            expand_braces(pattern)


def test_patterns_keep_their_order_and_name_what_is_missing(tmp_path):
    for name in ("b1", "b0", "a0", "c[1]"):
        (tmp_path / f"{name}.tar").touch()
    found = expand_patterns([f"{tmp_path}/b*.tar", f"{tmp_path}/a{{0..0}}.tar", f"{tmp_path}/c[1].tar"])
    assert [each.path.stem for each in found] == ["b0", "b1", "a0", "c[1]"]
    assert found[2].pattern == f"{tmp_path}/a{{0..0}}.tar"
    with pytest.raises(ValueError, match=r"b\{0\.\.2\}.*no file .*b2\.tar"):
        expand_patterns([f"{tmp_path}/b{{0..2}}.tar"])
    with pytest.raises(ValueError, match=r"nothing-\*.*\(for the demo: rocket-fast data emoji\)"):
        expand_patterns([f"{tmp_path}/nothing-*.tar"])
    with pytest.raises(ValueError, match="named again"):
        expand_patterns([f"{tmp_path}/b*.tar", f"{tmp_path}/b1.tar"])


def test_samples_are_numbered_through_all_shards(tmp_path, write_shard):
    write_shard(tmp_path / "s0.tar", 3, 0)
    write_shard(tmp_path / "s1.tar", 0, 0)
    write_shard(tmp_path / "s2.tar", 2, 0)
    shards = ShardSet([f"{tmp_path}/s*.tar"])
    keys = [shards.read(i).key for i in range(len(shards))]
    assert keys == ["s0/00000", "s0/00001", "s0/00002", "s2/00000", "s2/00001"]


def test_no_usable_sample_is_an_error(tmp_path, write_shard):
    write_shard(tmp_path / "empty.tar", 0, 0)
    with pytest.raises(ValueError, match=r"empty\.tar"):
        ShardSet([f"{tmp_path}/empty.tar"])


@pytest.mark.parametrize("weights", [(1, 1), (2, 0.25), (0.5, 3.4), (0.001, 1)])
def test_weights_show_whole_multiples_exactly_and_a_drawn_part_besides(tmp_path, write_shard, weights):
    for name, samples in (("a0", 20), ("a1", 30), ("b0", 40)):
        write_shard(tmp_path / f"{name}.tar", samples, 0)
    shards = ShardSet([f"{tmp_path}/a{{0,1}}.tar", f"{tmp_path}/b*.tar"], weights=weights)
    orders = [shards.epoch_order(7, epoch, shuffle=True) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert all(len(order) == shards.epoch_samples for order in orders)
    shown = [np.bincount(order % 90, minlength=90) for order in orders]
    for first, samples, weight in ((0, 50, weights[0]), (50, 40, weights[1])):
        for counts in shown:
            own = counts[first : first + samples]
            assert own.sum() == int(weight) * samples + round(weight % 1 * samples)
            assert set(own.tolist()) <= {int(weight), int(weight) + 1}
    if 0.5 in weights:
        assert not np.array_equal(shown[0], shown[2])
    keys = [shards.read(int(number)).key for number in orders[0]]
    assert len(set(keys)) == len(keys)
    assert {key.partition("#")[0] for key in keys} <= {shards.read(i).key for i in range(90)}
    plain = shards.epoch_order(7, 0, shuffle=False)
    assert sorted(plain.tolist()) == sorted(orders[0].tolist())


def test_weights_of_one_change_only_the_fingerprint(tmp_path, write_shard):
    write_shard(tmp_path / "a.tar", 20, 0)
    plain, weighted = ShardSet([f"{tmp_path}/a.tar"]), ShardSet([f"{tmp_path}/a.tar"], weights=[1.0])
    assert np.array_equal(plain.epoch_order(3, 4, shuffle=True), weighted.epoch_order(3, 4, shuffle=True))
    assert np.array_equal(plain.epoch_order(3, 4, shuffle=True), epoch_order(20, 3, 4, shuffle=True))
    assert plain.fingerprint == hashlib.blake2b(b"a 20", digest_size=8).hexdigest()
    assert weighted.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match=r"weights: got \[1, 2\], expected 1 numbers, one a pattern"):
        ShardSet([f"{tmp_path}/a.tar"], weights=[1, 2])


def test_sources_of_one_name_get_distinct_keys(tmp_path, write_shard):
    for name in ("x/00000", "y/00000", "y/00001"):
        write_shard(tmp_path / f"{name}.tar", 2, 0)
    shards = ShardSet([f"{tmp_path}/x/*.tar", f"{tmp_path}/y/*.tar"])
    keys = [shards.read(i).key for i in range(6)]
    assert keys == [f"{name}/0000{i}" for name in ("x/00000.tar", "y/00000.tar", "00001") for i in range(2)]


def test_epoch_order():
    order = epoch_order(1000, 3, 1, shuffle=True)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == epoch_order(1000, 3, 1, shuffle=True).tolist()
    for other in (epoch_order(1000, 3, 2, shuffle=True), epoch_order(1000, 4, 1, shuffle=True)):
        assert (order != other).mean() > 0.9
    assert epoch_order(5, 3, 1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@given(samples=st.integers(1, 200), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), keep=st.booleans())
def test_every_sample_once_over_all_processes(samples, batch_size, world_size, keep):
    together = batch_size * world_size
    if not keep and samples < together:
        with pytest.raises(ValueError, match="batch_size"):
            Cursor(samples, together, world_size=world_size)
        return
    cursors = [Cursor(samples, together, rank=r, world_size=world_size, drop_last=not keep) for r in range(world_size)]
    assert len({cursor.batches for cursor in cursors}) == 1
    taken = []
    for number in range(cursors[0].batches):
        shares = [cursor.places(number) for cursor in cursors]
        valid = np.array([own.sum() for _, own in shares])
        assert valid.max() - valid.min() <= 1
        taken += [place for places, own in shares for place in places[own].tolist()]
        assert all(len(places) == batch_size and places.max() < samples for places, _ in shares)
    whole = samples if keep else samples // together * together
    assert sorted(taken) == list(range(whole))


def test_global_batches_do_not_depend_on_the_split():
    whole = Cursor(100, 12)
    parts = [Cursor(100, 12, rank=rank, world_size=3) for rank in range(3)]
    for number in range(whole.batches):
        assert whole.places(number)[0].tolist() == [p for part in parts for p in part.places(number)[0].tolist()]


def test_a_saved_place_fits_any_split_of_the_global_batch_only():
    cursor = Cursor(100, 12)
    cursor.set_epoch(2)
    cursor.delivered = 3
    part = Cursor(100, 12, rank=2, world_size=3)
    part.load_state_dict(cursor.state_dict())
    assert (part.epoch, part.delivered) == (2, 3)
    with pytest.raises(ValueError, match="multiple of the global batch 10"):
        Cursor(100, 10).load_state_dict(cursor.state_dict())


def test_a_batch_that_cannot_be_divided_is_named():
    with pytest.raises(ValueError, match=r"data\.batch_size: got 10, expected a multiple of .* processes, 3"):
        Cursor(100, 10, world_size=3)


def test_set_epoch_restarts_only_when_it_changes():
    cursor = Cursor(100, 10)
    cursor.set_epoch(4)
    cursor.delivered = 3
    cursor.set_epoch(4)
    assert cursor.delivered == 3
    cursor.set_epoch(5)
    assert cursor.delivered == 0
