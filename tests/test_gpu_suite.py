"""The GPU suite's whole way through at tiny sizes on the CPU, its float64 figures, and that it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--device", "cpu", "--small"]
CUDA_ONLY = ("launches", "views")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="only the source tree has the benchmarks")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = torch.get_float32_matmul_precision()
    import gpu_suite

    yield gpu_suite
    torch.set_float32_matmul_precision(before)


def results(folder: Path) -> list[dict[str, Any]]:
    (report,) = folder.glob("*.json")
    assert report.name.startswith("cpu-small-")
    return json.loads(report.read_text())["results"]


def test_every_row_runs(suite: ModuleType, tmp_path: Path) -> None:
    assert suite.main([*SMALL, "--output", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert {r["kind"] for r in found} == {
        "ceiling",
        "check",
        "repeatable",
        "launches",
        "views",
        "projector",
        "swalip",
        "time",
    }
    assert all(r["status"] == ("skipped" if r["kind"] in CUDA_ONLY else "ok") for r in found), found
    assert all("CUDA only" in r["note"] for r in found if r["kind"] in CUDA_ONLY)
    (report,) = tmp_path.glob("*.md")
    text = report.read_text()
    assert all(r["name"] in text for r in found)
    assert "% of the fastest product above" in text


@pytest.mark.parametrize(("only", "count"), [("as on the CPU", 3), pytest.param("views", 7, marks=pytest.mark.slow)])
def test_views_run_in_the_interpreter(only: str, count: int, tmp_path: Path) -> None:
    """Checked against the CPU's kernel, and timed against the copy."""
    pytest.importorskip("triton")
    pytest.importorskip("numba")
    command = [sys.executable, str(FOLDER / "gpu_suite.py"), *SMALL, "--output", str(tmp_path), "--only"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, only], env=environment, capture_output=True, check=True)
    found = results(tmp_path)
    assert len(found) == count
    assert all(r["status"] == "ok" for r in found), found
    checked = [r["figures"] for r in found if r["name"].startswith("as on the CPU")]
    assert len(checked) == 2
    assert all(figures["levels apart, at most"] < 1.001 for figures in checked)
    (loader,) = [r["figures"] for r in found if r["name"].startswith("loader cpu+gpu")]
    assert loader["weak, levels apart"] < 0.001 < loader["strong, levels apart"] < 3


def test_views_are_a_share_of_the_copy(suite: ModuleType) -> None:
    copy = suite.Result("ceiling", "copy", figures={"GB/s": 2000.0})
    views = suite.Result("views", "strong", figures={"ms": 0.3, "GB/s": 1500.0})
    check = suite.Result("views", "as on the CPU", figures={"share apart": 0.01})
    suite.add_shares([copy, views, check])
    assert views.figures["of the copy"] == 0.75
    assert "of the copy" not in check.figures


def test_wrong_views_fail(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel two grey levels off."""

    class Wrong:
        @staticmethod
        def augment_batch(images: torch.Tensor, params: Any, **options: Any) -> torch.Tensor:
            from rocket_fast.image_augment import normalize

            return normalize((images + 2).clamp(2, 250))

    augment = pytest.importorskip("rocket_fast.kernels.augment")
    monkeypatch.setattr(suite, "view_kernels", lambda machine: (augment, Wrong))
    result = suite.run_views_check(suite.weak_view(16), suite.Machine("cpu", small=True))
    assert result.status == "FAILED"


def test_wrong_gradients_and_exceptions_fail(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = suite.clip_loss

    def wrong(image: torch.Tensor, text: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if image.dtype == torch.float16:
            raise RuntimeError("no such kernel")
        return right(image, 0.95 * text + 0.05 * text.detach(), *args, **options)

    monkeypatch.setattr(suite, "clip_loss", wrong)
    assert suite.main([*SMALL, "--output", str(tmp_path), "--only", "check clip"]) == 1
    for result in results(tmp_path):
        if "image to text" in result["name"]:  # made by clip_terms
            continue
        assert result["status"] == "FAILED"
        if "float16" in result["name"] and "bfloat16" not in result["name"]:
            assert result["note"] == "RuntimeError: no such kernel"
        else:
            assert result["figures"]["ours"]["d text"] > 0.03 > result["figures"]["ours"]["value"]


def test_without_time_rows_say_so(suite: ModuleType, tmp_path: Path) -> None:
    assert suite.main([*SMALL, "--output", str(tmp_path), "--budget", "1"]) == 0
    assert all(r["status"] == "skipped" and "s are left" in r["note"] for r in results(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_in_a_line(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_float64_figures_are_autograds(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several positives, smoothing, offset; rows in several blocks."""
    monkeypatch.setattr(suite, "blocks", lambda rows, _: [slice(i, min(i + 4, rows)) for i in range(0, rows, 4)])
    machine = suite.Machine("cpu", small=True)
    options = {"width": 7, "dtype": torch.float64}
    checks = [
        suite.Check("clip", 9, 9, smoothing=0.1, captions=3, normalize=True, **options),
        suite.Check("clip", 5, 11, smoothing=0.2, row_offset=4, **options),
        suite.Check("log_sum_exp", 5, 9, **options),
        suite.Check("siglip", 6, 6, normalize=True, **options),
    ]
    for check in checks:
        blocked, plain = suite.exact(check, machine), suite.eager(check, machine)
        for name, value in plain.named().items():
            rtol = 1e-6 if value.dtype == torch.float32 else 1e-10  # a float32 scale has a float32 gradient
            torch.testing.assert_close(
                blocked.named()[name],
                value.double(),
                rtol=rtol,
                atol=1e-12,
                msg=lambda m, what=(check, name): f"{what} {m}",
            )
    views = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (14.0, 10.0)]
    grads = [
        torch.autograd.grad(loss(*views, *scales), [*views, *scales])
        for loss in (suite.exact_multiview, suite.peers.dense_multiview)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
