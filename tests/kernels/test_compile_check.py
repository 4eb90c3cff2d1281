"""The Triton kernels as the assembler sees them: no configuration spills, 16-bit products run on tensor cores."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from rocket_fast.kernels import compile_check
from rocket_fast.kernels import triton_contrastive as kernels

if kernels.INTERPRETED:
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

EVERYDAY = [
    compile_check.Case(80, "fp16", 512, smoothing=0.1),
    compile_check.Case(90, "bf16", 512, normalize=True, smoothing=0.1),
    compile_check.Case(90, "fp32", 512),
    compile_check.Case(100, "bf16", 768),
]


def check(rows: list[compile_check.Row]) -> None:
    assert {row.kernel for row in rows} >= set(compile_check.PRODUCT_KERNELS)
    assert not [row for row in rows if row.stack], "spills: choose another configuration"
    for row in rows:
        pinned = "default" not in row.size  # tiles for unknown devices are too small for the newest instruction
        if row.kernel in compile_check.PRODUCT_KERNELS and row.dtype != "fp32" and pinned:
            assert row.instruction == compile_check.TENSOR_CORES[row.arch], row


@pytest.mark.parametrize("case", EVERYDAY, ids=lambda case: f"sm_{case.arch}-{case.dtype}")
def test_no_spills_and_tensor_cores(case: compile_check.Case) -> None:
    check(list(compile_check.rows([case])))


@pytest.mark.slow
def test_every_configuration_with_every_option() -> None:
    check(list(compile_check.rows(compile_check.all_cases())))


def test_a_spill_is_seen() -> None:
    """A tile too large for the registers of its warps."""
    config = kernels.Config(64, 64, 32, slabs=1, warps=1, stages=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.CONFIGS, (80, 2, "large"), kernels.Configs(config, config, config, config))
        rows = list(compile_check.rows([compile_check.Case(80, "bf16", 256)]))
    assert any(row.stack for row in rows if row.kernel in compile_check.PRODUCT_KERNELS)
