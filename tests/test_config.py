"""Configuration trees: JSON there and back, damage named by its place, differences told leaf by leaf."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rocket_fast.config import (
    EvalConfig,
    EvalSet,
    LoopConfig,
    TrainConfig,
    differences,
    from_plain,
    load_config,
    provenance,
    to_plain,
)
from rocket_fast.models.heads import SwALIPConfig
from rocket_fast.presets import preset


def test_types_come_back_as_they_were():
    config = replace(preset("demo"), out=Path("elsewhere"), seed=3)
    back = from_plain(to_plain(config))
    assert back == config
    assert isinstance(back.out, Path)
    assert isinstance(back.data.train, tuple)
    assert type(back.model.vision) is type(config.model.vision)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=replace(c.model, h_head=None)), "model.h_head: got None"),
        (lambda c: replace(c, image=replace(c.image, strong=())), "image.strong: got"),
        (lambda c: replace(c, model=replace(c.model, companion=SwALIPConfig())), "image.strong: got '1 strong views'"),
        (
            lambda c: replace(c, image=replace(c.image, weak=replace(c.image.weak, size=64))),
            "image.weak.size: got 64, expected model.vision.image_size = 32",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        change(preset("demo"))


def test_unknown_and_wrong_fields_are_named_by_their_place():
    plain = to_plain(preset("demo"))
    wrong = copy.deepcopy(plain)
    wrong["optim"]["learning_rate"] = 1
    with pytest.raises(ValueError, match=r"config.optim: got \['learning_rate'\], expected only fields of OptimConfig"):
        from_plain(wrong)
    wrong = copy.deepcopy(plain)
    wrong["model"]["vision"]["class"] = "SwinConfig"
    with pytest.raises(ValueError, match=r"config.model.vision.class: got 'SwinConfig', expected one of"):
        from_plain(wrong)
    wrong = copy.deepcopy(plain)
    wrong["optim"]["lr"] = -1
    with pytest.raises(ValueError, match=r"optim.lr: got -1, expected a positive number"):
        from_plain(wrong)


def test_differences_name_each_leaf_once():
    old = preset("demo")
    new = replace(old, optim=replace(old.optim, lr=1e-4), loop=replace(old.loop, threads=1))
    assert differences(old, new) == [f"optim.lr: {old.optim.lr} -> 0.0001", f"loop.threads: {old.loop.threads} -> 1"]
    assert differences(old, old) == []


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"run: got .*expected a run's folder"):
        load_config(tmp_path)


def test_provenance_says_what_ran():
    record = provenance()
    assert record["versions"]["torch"]
    assert record["command"]
    assert record["rocket_fast"]


def with_unpaired(name: str) -> TrainConfig:
    base = preset(name)
    return replace(base, data=replace(base.data, unpaired=("pictures",)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoopConfig(epochs=0), "loop.epochs: got 0"),
        (lambda: LoopConfig(weight_average=1.0), "loop.weight_average: got 1.0"),
        (lambda: LoopConfig(precision="int8"), "loop.precision: got 'int8'"),
        (lambda: LoopConfig(device="tpu"), "loop.device: got 'tpu'"),
        (lambda: EvalConfig(z_weight=0.25), "eval.z_weight: got 0.25"),
        (lambda: LoopConfig(keep_checkpoints=0), "loop.keep_checkpoints: got 0"),
        (lambda: EvalSet(name="x", shards=()), "shards of evaluation set x: got"),
        (lambda: EvalSet(name="x", shards=("a",), templates=("a photo",)), "template of x: got 'a photo'"),
        (lambda: EvalConfig(z_weight=2), "eval.z_weight: got 2"),
        (lambda: EvalConfig(sets=(EvalSet(name="x", shards=("a",)),) * 2), "eval.sets: got"),
        (lambda: replace(preset("demo"), name="a/b"), "name: got 'a/b'"),
        (lambda: with_unpaired("rn50-cc3m"), "model.companion: got None, expected a companion to learn from"),
        (
            lambda: with_unpaired("rn50-cc3m-swalip-prototypes"),
            "image.strong: got '0 strong views', expected 2 or more",
        ),
    ],
)
def test_bad_values_are_named(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()
