"""The Triton kernels as the assembler sees them: no configuration spills, 16-bit products run on tensor cores."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from rocket_fast.kernels import compile_check, triton_augment
from rocket_fast.kernels import triton_contrastive as kernels

if kernels.INTERPRETED:
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

EVERYDAY = [
    compile_check.Case(80, "fp16", 512, smoothing=0.1),
    compile_check.Case(90, "bf16", 512, normalize=True, smoothing=0.1),
    compile_check.Case(90, "fp32", 512),
    compile_check.Case(100, "bf16", 768),
]
VIEWS = [
    compile_check.ViewsCase(80, "fp32", 225),
    compile_check.ViewsCase(90, "bf16", 224),
    compile_check.ViewsCase(100, "fp16", 225),
]

PROJECTOR = [
    compile_check.ProjectorCase(80, "fp16", 3001),
    compile_check.ProjectorCase(90, "bf16", 4096),
    compile_check.ProjectorCase(100, "fp32", 3001, "-"),
]
SINKHORN = [
    compile_check.SinkhornCase(80, "fp16", 512),
    compile_check.SinkhornCase(90, "bf16", 512),
    compile_check.SinkhornCase(100, "bf16", 512, "small"),
]
PASSES = {"_moments_kernel", "_common_moments_kernel", "_normalize_kernel", "_sums_kernel", "_total_kernel"}


CONTRASTIVE = {"_forward_kernel", "_diagonal_kernel", "_gradient_kernel"}
LABELS = {"_sweep_kernel", "_scalings_kernel", "_labels_kernel"}


def check(rows: list[compile_check.Row], expected: set[str] = CONTRASTIVE) -> None:
    assert {row.kernel for row in rows} >= expected
    assert not [row for row in rows if row.stack], "spills: choose another configuration"
    for row in rows:
        pinned = "default" not in row.size  # tiles for unknown devices are too small for the newest instruction
        if row.kernel in compile_check.PRODUCT_KERNELS and row.dtype != "fp32" and pinned:
            assert row.instruction == compile_check.TENSOR_CORES[row.arch], row


@pytest.mark.parametrize("case", EVERYDAY, ids=lambda case: f"sm_{case.arch}-{case.dtype}")
def test_no_spills_and_tensor_cores(case: compile_check.Case) -> None:
    check(list(compile_check.rows([case])))


@pytest.mark.parametrize("case", SINKHORN, ids=lambda case: f"sm_{case.arch}-{case.dtype}")
def test_labels_do_not_spill_and_run_on_tensor_cores(case: compile_check.SinkhornCase) -> None:
    check(list(compile_check.rows([case])), LABELS)


@pytest.mark.slow
def test_every_configuration_of_labels() -> None:
    check(list(compile_check.rows(compile_check.sinkhorn_cases())), LABELS)


@pytest.mark.parametrize("case", VIEWS, ids=lambda case: f"sm_{case.arch}-{case.dtype}")
def test_views_do_not_spill_and_share_a_multiprocessor(case: compile_check.ViewsCase) -> None:
    check_views(list(compile_check.rows([case])))


def check_views(rows: list[compile_check.Row]) -> None:
    """Blurs run on tensor cores of any generation; two programs have registers and shared memory beside each other."""
    assert {row.kernel for row in rows} == {"_augment_kernel"}
    assert not [row for row in rows if row.stack], "spills: choose another configuration"
    for row in rows:
        assert row.instruction == compile_check.TENSOR_CORES[row.arch], row
        warps = triton_augment.CONFIGS[row.arch].warps
        assert "default" in row.size or 2 * 32 * warps * row.registers <= 65_536, row
        assert 2 * row.shared <= 160 * 1024, row


@pytest.mark.parametrize("arch", compile_check.ARCHITECTURES)
def test_cosines_do_not_spill(arch: int) -> None:
    check_cosines([compile_check.CosineCase(arch, "bf16", 128), compile_check.CosineCase(arch, "fp32", 100)])


@pytest.mark.slow
def test_every_width_and_type_of_cosines() -> None:
    check_cosines(compile_check.cosine_cases())


def check_cosines(cases: list[compile_check.CosineCase]) -> None:
    rows = list(compile_check.rows(cases))
    assert {row.kernel for row in rows} == {"_cosine_forward_kernel", "_cosine_backward_kernel"}
    assert not [row for row in rows if row.stack]


@pytest.mark.parametrize("case", PROJECTOR, ids=lambda case: f"sm_{case.arch}-{case.dtype}")
def test_batch_norm_does_not_spill(case: compile_check.ProjectorCase) -> None:
    check_projector(list(compile_check.rows([case])))


def check_projector(rows: list[compile_check.Row]) -> None:
    assert {row.kernel for row in rows} == PASSES | {"_input_kernel"}
    assert not [row for row in rows if row.stack], "spills: choose another configuration"


@pytest.mark.slow
def test_every_width_and_type_of_batch_norm() -> None:
    check_projector(list(compile_check.rows(compile_check.projector_cases())))


@pytest.mark.slow
def test_every_size_and_type_of_views() -> None:
    check_views(list(compile_check.rows(compile_check.views_cases())))


@pytest.mark.slow
def test_every_configuration_with_every_option() -> None:
    losses = [case for case in compile_check.all_cases() if isinstance(case, compile_check.Case)]
    check(list(compile_check.rows(losses)))


def test_a_spill_of_views_is_seen() -> None:
    """Too few registers."""
    config = triton_augment.Config(64, 32, 64, 4096, warps=8, stages=1, registers=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(triton_augment.CONFIGS, 90, config)
        (row,) = compile_check.rows([compile_check.ViewsCase(90, "bf16", 224)])
    assert row.stack
    assert row.registers <= 64


def test_a_spill_is_seen() -> None:
    """A tile too large for the registers of its warps."""
    config = kernels.Config(64, 64, 32, slabs=1, warps=1, stages=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.CONFIGS, (80, 2, "large"), kernels.Configs(config, config, config, config))
        rows = list(compile_check.rows([compile_check.Case(80, "bf16", 256)]))
    assert any(row.stack for row in rows if row.kernel in compile_check.PRODUCT_KERNELS)
