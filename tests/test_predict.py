"""The cost model: counts by hand for tiny towers, what must hold for any size, and the command."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket_fast.__main__ import main
from rocket_fast.config import TrainConfig
from rocket_fast.devices import DEVICES, known_device
from rocket_fast.errors import InvalidArgument
from rocket_fast.losses import LossConfig
from rocket_fast.models.clip import CLIPConfig
from rocket_fast.models.heads import BarLIPConfig, BYOLIPConfig, CompanionConfig, MLPHeadConfig, SwALIPConfig
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import TimmConfig, ViTConfig
from rocket_fast.predict import (
    DDP_BUCKET_MIB,
    HOP_SECONDS,
    LINK,
    POLICIES,
    Efficiency,
    Machines,
    Prediction,
    Workload,
    activations,
    advice,
    fitting,
    largest_batch,
    memory,
    predict,
    sweep,
    usable,
)
from rocket_fast.presets import preset
from rocket_fast.volume import Blocks, Numbers, Style, volume

H100 = DEVICES["h100"]


def tiny(views: int = 3, companion: CompanionConfig | None = None, **loop: object) -> TrainConfig:
    """Pictures of 32 px in 4 patches, both towers of one block, fp32 unless ``loop`` says otherwise."""
    base = preset("demo")
    model = CLIPConfig(
        vision=ViTConfig(image_size=32, width=16, layers=1, heads=2),
        text=TextConfig(vocab_size=50, width=24, layers=1, heads=2),
        embed_dim=8,
        h_head=MLPHeadConfig(hidden=32) if views > 1 else None,
        companion=companion,
    )
    image = replace(base.image, strong=base.image.strong[:1] * (views - 1))
    options = {"precision": "fp32", "weight_average": None, **loop}
    data = replace(base.data, batch_size=4096)
    return replace(base, model=model, image=image, data=data, loop=replace(base.loop, **options))


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload.of(tiny(), tokens=10)


@pytest.fixture(scope="module")
def large() -> Workload:
    return Workload.of(preset("vits16-yfcc"))


# --- counts -----------------------------------------------------------------------------------------------------------

BLOCKS = Blocks(layers=3, width=4, mlp_width=16, tokens=10, weights=200, quick_gelu=False)
FUSED, SEPARATE = Style(), Style(fused=False, fused_attention=False, itemsize=4)


def test_what_a_block_keeps_by_hand():
    """Of 10 tokens of width 4: two norms' inputs; norms, q k v, attention; the hidden layer twice."""
    assert BLOCKS.kept("none", FUSED) == Numbers(10 * 8, 10 * (4 + 12 + 4 + 4 + 16 + 16))
    assert BLOCKS.kept("cheap", FUSED) == Numbers(10 * 4, 10 * (12 + 4 + 4 + 16 + 4))
    assert BLOCKS.kept("blocks", FUSED) == Numbers(10 * 4, 0)
    assert BLOCKS.kept("none", SEPARATE) == BLOCKS.kept("none", FUSED) + Numbers(0, 10 * 12 + 200)
    assert Numbers(2, 3).bytes(2) == 14


def test_what_a_block_moves_by_hand():
    """fp32, attention weights in memory, GELU: operation by operation."""
    norms = 2 * 10 * (4 + 4)
    additions = 2 * 10 * (4 + 4 + 4)
    gelu = 10 * (16 + 16)
    attention = 10 * 11 * 4 + 6 * 200
    forward = norms + additions + gelu + attention
    once = BLOCKS.moved("none", SEPARATE)
    assert BLOCKS.moved("none", SEPARATE, replays=1) - once == Numbers(10 * 8 * 4, forward - 10 * 8 * 4)
    assert (BLOCKS.moved("blocks", SEPARATE) - once).bytes(4) == 4 * forward
    assert (BLOCKS.moved("cheap", SEPARATE) - once).bytes(4) == 4 * (forward - attention)
    assert BLOCKS.moved("none", FUSED).bytes(2) < once.bytes(2)


def test_volume_of_a_tiny_configuration_by_hand():
    found = volume(tiny(), tokens=10)
    assert found.pixels == 3 * 3 * 32 * 32
    assert (found.image.blocks.tokens, found.image.blocks.weights) == (3 * 5, 3 * 2 * 25)
    assert (found.text.blocks.tokens, found.text.blocks.weights) == (3 * 10, 3 * 2 * 100)
    assert found.text.blocks.quick_gelu
    assert not found.image.blocks.quick_gelu
    assert found.heads.batch_norms == 2 * 2 * 2  # two in each of two heads, on two strong views
    # Kept of each h: both norms' inputs, of 32 each; of z and h the features, 16 and 24, three views, kept once.
    inputs = 2 * 2 * (32 + 32)
    batch_statistics = 2 * 2 * 2 * (32 + 64) / 2  # mean and squares, deviation; of two samples
    assert found.heads.kept == Numbers(0, 3 * (16 + 24) + inputs + batch_statistics)
    assert found.heads.moved == Numbers(0, 2 * 2 * 2 * 10 * 32)  # ten passes over 32 each


def test_unpaired_pictures_add_their_share():
    for vision in (tiny().model.vision, TimmConfig(name="convnext_tiny")):
        base = tiny()
        base = replace(base, model=replace(base.model, vision=vision, companion=BarLIPConfig(hidden=10, out=14)))
        beside = replace(base, data=replace(base.data, unpaired=("pictures",), unpaired_ratio=4))
        alone, found = volume(base, tokens=10), volume(beside, tokens=10)
        more = 1 + 2 / 3 / 4  # two strong views beside three
        assert found.pixels == pytest.approx(more * alone.pixels)
        assert found.image.moved.bytes(2) == pytest.approx(more * alone.image.moved.bytes(2), rel=0.02)
        assert found.image.kept.bytes(2) == pytest.approx(more * alone.image.kept.bytes(2), rel=0.02)
        assert found.heads.kept.bytes(2) > alone.heads.kept.bytes(2)
        if found.image.blocks is not None:
            assert found.image.blocks.tokens == pytest.approx(more * alone.image.blocks.tokens)
        assert Workload.of(beside).preparing > 1.15 * Workload.of(base).preparing


def test_kept_patches_and_convolutions_are_counted():
    config = tiny(1)
    half = replace(config, model=replace(config.model, vision=replace(config.model.vision, patch_keep=0.5)))
    assert volume(half, tokens=10).image.blocks.tokens == 3
    convolutional = replace(config, model=replace(config.model, vision=TimmConfig(name="resnet50")))
    found = volume(convolutional, tokens=10).image
    assert found.blocks is None
    assert found.batch_norms == 53
    assert found.kept.computed > 0
    assert found.moved.computed > found.kept.computed
    assert found.working == Numbers(0, 2 * 64 * 16**2)  # the first convolution's result


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_a_tiny_configuration_by_hand(workload: Workload):
    figures, machines = workload.cost, Machines(device=H100)
    found = memory(workload, machines, 6)
    assert found.weights == 4 * figures.parameters
    assert found.gradients == 4 * figures.parameters
    assert found.optimizer == 8 * figures.parameters
    assert found.pictures == 6 * 3 * 3 * 32 * 32 * (2 * 1 + 4 + 4)
    embeddings = 6 * (2 * 3 * 8) * (4 + 4 + 4)
    assert found.loss == 64 * 2**20 + embeddings + 6 * 5 * 24
    image, text = 15 * 16 * (2 + 6 + 8) * 4, 30 * 24 * (2 + 6 + 8) * 4
    working = 30 * 24 * (2 + 8) * 4
    heads = 4 * workload.volume.heads.kept.computed
    assert found.activations == 6 * (image + text + heads + working)
    assert found.total == sum(getattr(found, field.name) for field in dataclasses.fields(found))


def test_casts_and_averages_of_the_weights_take_memory(workload: Workload):
    machines, count = Machines(device=H100), workload.cost.parameters
    averaged = Workload.of(tiny(precision="auto", weight_average=0.99), tokens=10)
    assert memory(averaged, machines, 6).weights == (4 + 4 + 2) * count


@given(rows=st.integers(1, 500), more=st.integers(1, 500), parts=st.integers(1, 8), gpus=st.sampled_from([1, 2, 8, 64]))
@settings(max_examples=50, deadline=None)
def test_memory_grows_with_the_batch_and_falls_with_micro_batches(
    workload: Workload, rows: int, more: int, parts: int, gpus: int
):
    machines = Machines(device=H100, count=gpus)
    here = memory(workload, machines, rows).total
    assert memory(workload, machines, rows + more).total > here
    assert memory(workload, machines, rows, min(parts, rows)).total <= here


def test_checkpointing_saves_in_its_order(large: Workload):
    machines = Machines(device=H100)
    sizes = [activations(large.with_checkpointing(policy), machines) for policy in POLICIES]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] / sizes[0] == pytest.approx(0.7, abs=0.1)
    assert sizes[2] / sizes[0] == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_largest_batch_fits_and_one_more_does_not(large: Workload, policy: str):
    changed = large.with_checkpointing(policy)
    machines = Machines(device=DEVICES["a100-40"], count=8)
    most = largest_batch(changed, machines)
    assert memory(changed, machines, most).total <= usable(machines.device.memory)
    assert memory(changed, machines, most + 1).total > usable(machines.device.memory)
    assert largest_batch(changed, machines, memory_bytes=1e9) == 0


# --- time -------------------------------------------------------------------------------------------------------------


def seconds(prediction: Prediction, *names: str) -> float:
    return sum(part.seconds for part in prediction.parts if part.name in names)


def test_a_step_by_hand(workload: Workload):
    """One device, everything at its peak: FLOPs and bytes over what the device does of them."""
    device = replace(H100, kernel_seconds=0.0)
    machines = Machines(device=device, efficiency=Efficiency(1.0, 1.0))
    found = predict(workload, machines, 64)
    figures = workload.cost
    flops = {part.name: part.flops for part in found.parts}
    assert flops["image tower"] == 64 * 3 * figures.image_flops
    assert flops["text tower"] == 64 * 3 * figures.text_flops
    assert flops["heads"] == 64 * 3 * figures.head_flops
    assert flops["contrastive loss"] == 5 * 4 * 2 * 64 * 64 * 8
    (optimizer,) = (part for part in found.parts if part.name == "optimizer")
    assert optimizer.moved == 32 * figures.parameters
    for part in found.parts:
        assert part.seconds == pytest.approx(part.flops / device.fp32_flops + part.moved / device.bandwidth)
    assert found.images_per_second == pytest.approx(64 / found.seconds)
    assert found.mfu == pytest.approx(64 * figures.training_flops / found.seconds / device.fp32_flops)
    assert found.hours(3600) == pytest.approx(3600 / found.images_per_second / 3600)


def test_checkpointing_and_micro_batches_compute_again(workload: Workload):
    machines, forward = Machines(device=H100), 64 * workload.cost.image_flops

    def image(policy: str, parts: int = 1) -> float:
        found = predict(workload.with_checkpointing(policy), machines, 64, accumulation=parts)
        return next(part.flops for part in found.parts if part.name == "image tower")

    assert [image("none"), image("cheap"), image("blocks")] == [3 * forward, 3 * forward, 4 * forward]
    assert [image("none", 4), image("blocks", 4)] == [4 * forward, 5 * forward]


@given(power=st.integers(0, 11), policy=st.sampled_from(POLICIES))
@settings(max_examples=30, deadline=None)
def test_more_devices_never_compute_longer_on_the_same_batch(workload: Workload, power: int, policy: str):
    changed = workload.with_checkpointing(policy)
    few, many = (predict(changed, Machines(device=H100, count=2**p), 4096) for p in (power, power + 1))
    names = ("image tower", "text tower", "heads", "optimizer")
    assert seconds(many, *names) <= seconds(few, *names)
    assert many.memory.total <= few.memory.total


@given(factor=st.floats(1.1, 10))
@settings(max_examples=20, deadline=None)
def test_a_better_device_is_never_slower(workload: Workload, factor: float):
    machines = Machines(device=H100, count=16)
    step = predict(workload, machines, 4096).seconds
    for name in ("fp32_flops", "bandwidth", "node_link", "network_link"):
        better = replace(machines, device=replace(H100, **{name: factor * getattr(H100, name)}))
        assert predict(workload, better, 4096).seconds <= step


@pytest.mark.parametrize(("exchange", "rows"), [("all_gather", 256), ("one_sided", 64)])
def test_the_loss_over_devices_is_as_the_exchange_has_it(exchange: str, rows: int):
    config = replace(tiny(), loss=LossConfig(exchange=exchange))
    found = predict(Workload.of(config, tokens=10), Machines(device=H100, count=4), 256)
    (loss,) = (part for part in found.parts if part.name == "contrastive loss")
    assert found.one_sided == (exchange == "one_sided")
    assert loss.flops == 5 * 4 * 2 * rows * 256 * 8
    side = 3 * 8 * 4
    assert loss.sent == 2 * 3 * 64 * (side + 8 * 5 if exchange == "one_sided" else 2 * side)


def test_gradients_hide_behind_the_backward_pass(large: Workload):
    machines = Machines(device=H100, count=16)
    sent = 2 * 15 / 16 * 4 * large.cost.parameters
    buckets = -(-sent / 2 // (DDP_BUCKET_MIB * 2**20))
    whole = sent / (LINK * 8 * H100.network_link) + buckets * HOP_SECONDS * 4
    hidden, exposed = (predict(large, machines, batch) for batch in (4096, 16))
    assert seconds(hidden, "gradients' all-reduce") < whole / 10
    wide = replace(large, config=replace(large.config, loop=replace(large.config.loop, bucket_mib=100)))
    last = seconds(predict(wide, machines, 4096), "gradients' all-reduce")
    assert 3 < last / seconds(hidden, "gradients' all-reduce") < 4  # fewer waits
    backward = 2 / 3 * seconds(exposed, "image tower", "text tower", "heads")
    assert seconds(exposed, "gradients' all-reduce") == pytest.approx(whole - backward)
    assert not seconds(predict(large, Machines(device=H100), 16), "gradients' all-reduce", "batch norms' sums")


def test_batch_norms_are_summed_in_every_pass(workload: Workload):
    """Forward and backward; micro-batches go forward twice."""
    machines = Machines(device=H100, count=4)
    one, parts = (
        seconds(predict(workload, machines, 256, accumulation=count), "batch norms' sums") for count in (1, 4)
    )
    assert one > 0
    assert parts == pytest.approx(4 * 3 / 2 * one)


def test_fsdp_holds_parts_and_gathers_blocks(workload: Workload):
    """By hand: both towers' one block has 12 widths squared; the rest of the model is whole on every device."""
    sharded = replace(workload, config=replace(workload.config, loop=replace(workload.config.loop, parallel="fsdp")))
    machines, parameters = Machines(device=H100, count=4), workload.cost.parameters
    blocks = [12 * 16**2, 12 * 24**2]
    rest = parameters - sum(blocks)
    whole, parts = (memory(each, machines, 64) for each in (workload, sharded))
    assert parts.weights == parameters + 2 * 4 * max(blocks) + 4 * rest  # 4 bytes on 4 devices
    assert parts.gradients == parameters + 2 * 4 * max(blocks) + 4 * rest
    assert parts.optimizer == whole.optimizer / 4
    assert (parts.activations, parts.pictures, parts.loss) == (whole.activations, whole.pictures, whole.loss)
    assert memory(sharded, Machines(device=H100), 64) == memory(workload, Machines(device=H100), 64)
    for accumulation, passes in ((1, 2), (2, 6)):
        prediction = predict(sharded, machines, 256, accumulation=accumulation)
        (traffic,) = (part for part in prediction.parts if part.name == "parameters and gradients")
        assert traffic.sent == pytest.approx(3 / 4 * 4 * (passes + 1) * parameters)


def test_small_steps_wait_for_kernels_and_few_cores_for_pictures(large: Workload):
    machines = Machines(device=replace(H100, kernel_seconds=1e-3))
    assert seconds(predict(large, machines, 1), "starting kernels") > 0.5
    free = predict(large, Machines(device=H100), 512)
    assert not seconds(free, "waiting for pictures")
    starved = predict(large, Machines(device=H100), 512, cores=free.cores / 4)
    assert starved.images_per_second == pytest.approx(free.images_per_second / 4)


@pytest.mark.parametrize("companion", [BYOLIPConfig(), BarLIPConfig(hidden=10, out=14), SwALIPConfig()])
def test_companions_cost_time_and_memory(workload: Workload, companion: CompanionConfig):
    machines = Machines(device=replace(H100, kernel_seconds=0.0), count=2)
    plain, found = (
        predict(each, machines, 512) for each in (workload, Workload.of(tiny(companion=companion), tokens=10))
    )
    assert found.seconds > plain.seconds
    assert found.memory.total > plain.memory.total
    names = {part.name for part in found.parts} - {part.name for part in plain.parts}
    assert names == {"averaged encoder" if isinstance(companion, BYOLIPConfig) else "companion's loss"}


# --- what fits --------------------------------------------------------------------------------------------------------


def test_the_fastest_way_that_fits(large: Workload):
    small = Machines(device=replace(H100, memory=20e9))
    found = fitting(large, small, 1024)
    assert found is not None
    assert found.fits
    assert not predict(large, small, 1024).fits
    assert fitting(large, Machines(device=replace(H100, memory=1e9)), 1024) is None
    ample = fitting(large, Machines(device=H100, count=64), 1024)
    assert ample is not None
    assert (ample.checkpointing, ample.accumulation) == ("none", 1)


def test_advice_fits():
    config = replace(preset("vits16-yfcc"), data=replace(preset("vits16-yfcc").data, batch_size=4096))
    found = advice(config, 40e9, 8, device=DEVICES["a100-40"])
    machines, workload = Machines(device=DEVICES["a100-40"], count=8), Workload.of(config)
    assert found.needed > found.available == usable(40e9)
    assert found.batch % 8 == 0
    assert 0 < found.batch < 4096
    assert memory(workload, machines, found.batch // 8).total <= found.available
    assert found.checkpointing is not None
    assert memory(workload.with_checkpointing(found.checkpointing), machines, 512).total <= found.available
    assert found.accumulation is not None
    assert memory(workload, machines, 512, found.accumulation).total <= found.available
    for word in (str(found.batch), found.checkpointing, f"loop.accumulation {found.accumulation}"):
        assert word in str(found)
    hopeless = advice(config, 1e9, 8, device=DEVICES["a100-40"])
    assert (hopeless.batch, hopeless.checkpointing, hopeless.accumulation) == (0, None, None)
    assert "nothing" in str(hopeless)


def test_a_sweep_uses_what_divides_the_batch(workload: Workload):
    rows = sweep(workload, Machines(device=H100), 48)
    assert [each.machines.count for each in rows] == [1, 2, 4, 8, 16]
    assert [each.machines.count for each in sweep(workload, Machines(device=H100), 4096, most=4)] == [1, 2, 4]


def test_wrong_requests_are_told_what_is_right(workload: Workload):
    with pytest.raises(InvalidArgument, match=r"gpu: got 'h1000', expected one of a100-40, a100-80, h100"):
        known_device("h1000")
    with pytest.raises(InvalidArgument, match=r"data.batch_size: got 100, expected a multiple of gpus = 8"):
        predict(workload, Machines(device=H100, count=8), 100)
    with pytest.raises(InvalidArgument, match="accumulation: got 9, expected 1 to 8"):
        predict(workload, Machines(device=H100, count=8), 64, accumulation=9)
    with pytest.raises(InvalidArgument, match="gpus: got 0"):
        Machines(device=H100, count=0)
    with pytest.raises(InvalidArgument, match=r"matmul_efficiency: got 1\.5"):
        Efficiency(1.5, 0.5)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_80_columns_and_writes_figures(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    picture, figures = tmp_path / "plan.svg", tmp_path / "plan.json"
    arguments = ["--gpu", "a100-40", "--gpus", "8", "--model.text.layers", "6", "--picture", str(picture)]
    assert main(["plan", "--preset", "vits16-yfcc", *arguments, "--json", str(figures)]) == 0
    text = capsys.readouterr().out
    tables = [line for line in text.splitlines() if not line.startswith("picture:")]
    assert max(map(len, tables)) <= 80
    for word in ("8 x a100-40", "samples per second", "MFU", "32 epochs", "largest batch a GPU", "4096", "hours"):
        assert word in text
    assert picture.read_text().startswith("<?xml")
    written = json.loads(figures.read_text())
    assert [row["machines"]["count"] for row in written["sweep"]] == [2**power for power in range(13)]
    assert written["prediction"]["batch"] == 4096
    assert written["prediction"]["fits"]


def test_the_command_refuses_what_it_cannot_do(capsys, monkeypatch, tmp_path: Path):
    assert main(["plan", "--preset", "demo", "--gpu", "tpu"]) == 2
    assert "a100-40" in capsys.readouterr().err
    assert main(["plan", "--preset", "demo", "--picture", str(tmp_path / "plan.pdf")]) == 2
    assert ".png or .svg" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--preset", "demo", "--picture", str(tmp_path / "plan.png")]) == 2
    assert "rocket-fast[report]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_hours_need_to_know_the_data(capsys):
    assert main(["plan", "--preset", "demo", "--gpus", "1"]) == 0
    assert "a million samples" in capsys.readouterr().out
    assert main(["plan", "--preset", "demo", "--gpus", "1", "--samples", "1000000"]) == 0
    assert "23 epochs" in capsys.readouterr().out
