"""The Triton kernels compiled ahead of time at every pinned configuration: registers, stack, memory, tensor cores.

Needs triton, but no GPU. What is compiled is what would be launched: the launchers run on tensors without data (device
"meta"), their launches are recorded, and each kernel is compiled for an architecture with the specialisations (pointers
and sizes divisible by 16) that the launch would have.

    python -m rocket_fast.kernels.compile_check [--markdown]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rocket_fast.errors import optional_import
from rocket_fast.kernels import triton_augment as augment
from rocket_fast.kernels import triton_contrastive as contrastive
from rocket_fast.kernels import triton_cosine as cosine
from rocket_fast.kernels import triton_projector as projector
from rocket_fast.kernels import triton_sinkhorn as sinkhorn

triton: Any = optional_import("triton", "gpu")

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES: tuple[contrastive.Size, ...] = ("large", "small")
# What ptx calls the instruction that feeds the tensor cores; float32 is multiplied without them.
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCT_KERNELS = ("_forward_kernel", "_diagonal_kernel", "_gradient_kernel", "_sweep_kernel", "_labels_kernel")


@dataclass(frozen=True)
class Case:
    """One problem of the losses: the operations of which architecture's table, on what inputs, with which options."""

    arch: int
    dtype: str
    D: int
    size: contrastive.Size = "large"
    normalize: bool = False
    smoothing: float = 0.0
    table: int | None = None  # the architecture whose pinned configurations are taken; its own if None

    @property
    def options(self) -> str:
        return "+".join(
            name for name, on in (("normalize", self.normalize), ("smoothing", self.smoothing > 0)) if on
        ) or "-"  # fmt: skip

    def run(self) -> None:
        """Every operation once, forward and backward, on tensors that hold nothing."""
        samples = 4096 if self.size == "large" else 64
        x = torch.empty(1, samples, self.D, dtype=DTYPES[self.dtype], device="meta")
        one, weight = x.new_empty(1, 1, dtype=torch.float32), x.new_empty(1, 1, samples, dtype=torch.float32)
        lse = weight.double()
        shared: dict[str, Any] = {"row_offset": 0, "normalize": self.normalize, "workspace": 2**26}
        softmax: dict[str, Any] = {"smoothing": [self.smoothing], "diagonal": True, **shared}
        needed: dict[str, Any] = {"need_image": True, "need_text": True}
        contrastive.contrastive_forward(x, x, one, **softmax)
        contrastive.contrastive_backward(x, x, one, lse, lse, weight, weight, **needed, **softmax)
        if not self.smoothing:
            softmax["diagonal"] = False
            contrastive.contrastive_forward(x, x, one, **softmax)
            contrastive.contrastive_backward(x, x, one, lse, lse, weight, weight, **needed, **softmax)
            for need_grad in (True, False):
                contrastive.sigmoid_forward_backward(x[0], x[0], one, one, need_grad=need_grad, **shared)


@dataclass(frozen=True)
class ViewsCase:
    """Views to augment: square, of side ``D``, to ``dtype``, with which architecture's table."""

    arch: int
    dtype: str
    D: int
    table: int | None = None
    size: str = "views"
    options: str = "-"

    def run(self) -> None:
        """The one launch, on tensors that hold nothing."""
        images = torch.empty(64, 3, self.D, self.D, dtype=torch.uint8, device="meta")
        params = images.new_empty(64, augment.FIELDS.value, dtype=torch.float32)
        out = torch.empty_like(images, dtype=DTYPES[self.dtype])
        augment.render(images, params, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), out)


@dataclass(frozen=True)
class CosineCase:
    """Predictions and targets of ``D`` features, three views a side, which every device takes alike."""

    arch: int
    dtype: str
    D: int
    table: int | None = None
    size: str = "cosine"
    options: str = "-"

    def run(self) -> None:
        """Both launches, on tensors that hold nothing."""
        x = torch.empty(2, 3, 4096, self.D, dtype=DTYPES[self.dtype], device="meta")
        loss, *norms = cosine.cosine_forward(x, x)
        cosine.cosine_backward(loss, x, x, *norms)


@dataclass(frozen=True)
class ProjectorCase:
    """Batch norm of ``D`` features in ``dtype``, float32 parameters; ``options`` names what there is of them."""

    arch: int
    dtype: str
    D: int
    options: str = "relu+affine"
    size: str = "projector"
    table: int | None = None

    def run(self) -> None:
        """Every pass once, on tensors that hold nothing."""
        x = torch.empty(4096, self.D, dtype=DTYPES[self.dtype], device="meta")
        vector = x.new_empty(self.D, dtype=torch.float32)
        given = vector if "affine" in self.options else None
        known = vector, vector, given, given, "relu" in self.options
        projector.moments(x)
        projector.normalize(x, *known, torch.empty_like(x))
        projector.sums(x, x, *known)
        projector.input_gradient(x, x, *known, vector.new_empty(2, self.D), torch.empty_like(x))


@dataclass(frozen=True)
class SinkhornCase:
    """SwALIP of two views a side, of width ``D``, to be normalised or not, with which architecture's table."""

    arch: int
    dtype: str
    D: int
    size: contrastive.Size = "large"
    options: str = "normalize"
    table: int | None = None

    def run(self) -> None:
        """The loss with and without gradients, on tensors that hold nothing; Case has the contrastive kernels."""
        samples = 4096 if self.size == "large" else 64
        x = torch.empty(2, samples, self.D, dtype=DTYPES[self.dtype], device="meta")
        options: dict[str, Any] = {"epsilon": 0.05, "iterations": 1, "normalize": self.options == "normalize"}
        one = x.new_empty((), dtype=torch.float32)
        with mock.patch.object(contrastive, "_launch"):
            for need_grad in (True, False):
                sinkhorn.swalip_of_rows(
                    x, x, one, samples=samples, need_grad=need_grad, workspace=2**26, **options
                )  # fmt: skip


AnyCase = Case | ViewsCase | CosineCase | ProjectorCase | SinkhornCase


@dataclass(frozen=True)
class Launch:
    """All that one kernel's compilation depends on, but for the architecture."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    limit: int | None  # registers a thread

    @property
    def tile(self) -> str:
        named = {self.kernel.arg_names[index]: value for index, value in self.constants}
        sizes = [str(named[name]) for name in ("TILE", "ROWS", "SLABS", "COLUMNS", "WIDTH", "BLOCK") if name in named]
        return "x".join(sizes) + f" w{self.warps} s{self.stages}" + (f" r{self.limit}" if self.limit else "")


@dataclass(frozen=True)
class Resources:
    """A compiled kernel: registers a thread, bytes of stack a thread and of shared memory a program, tensor cores."""

    registers: int
    stack: int
    shared: int
    instruction: str


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    arch: int
    dtype: str
    D: int
    size: str
    options: str
    config: str
    registers: int
    stack: int
    shared: int
    instruction: str


# --- what would be launched -------------------------------------------------------------------------------------------


def launches(case: AnyCase) -> list[Launch]:
    """The kernels that the operations of ``case`` launch, each once."""
    recorded: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch = _describe(kernel, args, options)
        if launch not in recorded:
            recorded.append(launch)

    table = case.arch if case.table is None else case.table
    with contextlib.ExitStack() as patches:
        for module in (contrastive, augment, projector, cosine, sinkhorn):
            patches.enter_context(mock.patch.object(module, "_launch", record))
        for module in (contrastive, augment, sinkhorn):
            patches.enter_context(mock.patch.object(module, "_architecture", return_value=table))
        case.run()
    return recorded


def _describe(kernel: Any, args: Sequence[Any], options: dict[str, int]) -> Launch:
    """The arguments of a launch as the compiler sees them."""
    signature, constants, aligned = [], [], []
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        kind, fixed, even = _specialisation(parameter, value)
        signature.append((parameter.name, kind))
        if fixed:
            constants.append((index, value))
        if even:
            aligned.append(index)
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), options["num_warps"], options.get("num_stages", 3),
        options.get("maxnreg"),
    )  # fmt: skip


def _specialisation(parameter: Any, value: Any) -> tuple[str, bool, bool]:
    """Type, whether the value is compiled in, whether it is known to be divisible by 16."""
    if parameter.is_constexpr:
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        names = {
            torch.float64: "fp64",
            torch.int8: "i8",
            torch.uint8: "u8",
            **{dtype: name for name, dtype in DTYPES.items()},
        }
        return f"*{names[value.dtype]}", False, True
    if isinstance(value, float):
        return "fp32", False, False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", True, False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, False, value % 16 == 0 and not parameter.do_not_specialize


# --- compilation ------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(launch: Launch, arch: int) -> Resources:
    """Compile, and read the assembler's report."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs={(index,): value for index, value in launch.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.limit}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resource_usage(binary.asm["cubin"])
    instruction = TENSOR_CORES[arch] if TENSOR_CORES[arch] in binary.asm["ptx"] else ""
    return Resources(registers, stack, binary.metadata.shared, instruction)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as cuobjdump (it comes with triton) reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def rows(cases: Iterable[AnyCase]) -> Iterator[Row]:
    """One row for every kernel of every case; one at a time: Python 3.11 cannot parse in several threads."""
    for case in cases:
        for launch in launches(case):
            resources = compiled(launch, case.arch)
            size = case.size + ("" if case.table is None else " (default)")
            yield Row(
                launch.kernel.__name__, case.arch, case.dtype, case.D, size, case.options, launch.tile,
                *astuple(resources),
            )  # fmt: skip


def views_cases() -> list[ViewsCase]:
    """Every output type; sizes that are a multiple of 16 and that are not, of which Triton makes separate code."""
    sides = (224, 225)
    cases = [ViewsCase(arch, dtype, D) for arch, dtype, D in itertools.product(ARCHITECTURES, DTYPES, sides)]
    default = itertools.product((80, 100), DTYPES, sides)
    return cases + [ViewsCase(arch, dtype, D, table=0) for arch, dtype, D in default]


def cosine_cases() -> list[CosineCase]:
    """Every input type; few features and the most; a width that is a multiple of 16 and one that is not."""
    widths = (100, 128, 2048, cosine.MOST)
    return [CosineCase(arch, dtype, D) for arch, dtype, D in itertools.product(ARCHITECTURES, DTYPES, widths)]


def sinkhorn_cases() -> list[SinkhornCase]:
    """Every pinned configuration, normalising and not; the default one on the oldest and the newest architecture."""
    pinned = itertools.product(ARCHITECTURES, DTYPES, (512,), SIZES, ("normalize", "-"))
    default = itertools.product((80, 100), DTYPES, SIZES)
    return [
        *(SinkhornCase(*each) for each in pinned),
        *(SinkhornCase(arch, dtype, 512, size, table=0) for arch, dtype, size in default),
    ]


def projector_cases() -> list[ProjectorCase]:
    """Every type; widths that are a multiple of 16 and that are not; with and without ReLU and affine part."""
    what = itertools.product(ARCHITECTURES, DTYPES, (4096, 3001), ("relu+affine", "relu", "affine", "-"))
    return [ProjectorCase(*each) for each in what]


def all_cases() -> list[AnyCase]:
    """Every pinned configuration with every option; the default one on the oldest and the newest architecture."""
    inputs = [("bf16", width) for width in (256, 512, 768, 1024)] + [("fp16", 512), ("fp32", 512)]
    cases: list[AnyCase] = [
        Case(arch, dtype, D, size, normalize, smoothing)
        for arch, (dtype, D), size, normalize, smoothing in itertools.product(
            ARCHITECTURES, inputs, SIZES, (False, True), (0.0, 0.1)
        )
    ]
    default = itertools.product((80, 100), DTYPES, SIZES, (False, True))
    cases += [Case(arch, dtype, 512, size, normalize, 0.1, table=0) for arch, dtype, size, normalize in default]
    return [*cases, *views_cases(), *cosine_cases(), *projector_cases(), *sinkhorn_cases()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; fail where a kernel uses the stack."""
    parser = argparse.ArgumentParser(description="Registers, stack and shared memory of the Triton kernels.")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args(arguments).markdown
    separator = " | " if markdown else "\t"
    names = [field.name for field in fields(Row)]
    print(separator.join(names))
    if markdown:
        print(separator.join("---" for _ in names))
    spilled = 0
    for row in dict.fromkeys(rows(all_cases())):
        print(separator.join(str(value) for value in astuple(row)), flush=True)
        spilled += row.stack > 0
    if spilled:
        raise SystemExit(f"{spilled} kernels use the stack")


if __name__ == "__main__":
    main()
