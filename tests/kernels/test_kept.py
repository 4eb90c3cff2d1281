"""Losses whose gradients are made with the value keep those for backward, and no input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rocket_fast import kernels

X, Y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
SCALE, BIAS = torch.tensor(3.0), torch.tensor(-2.0)
SWALIP = {"swalip": kernels.swalip_loss, "prototypes": kernels.swalip_prototypes_loss}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "siglip": lambda x, y, scale, bias: kernels.siglip_loss(x, y, scale, bias),
    "barlow": lambda x, y, scale, bias: kernels.barlow_loss(x, y),
    **{name: lambda x, y, scale, bias, f=f: f([x, x + 1], [y, y + 1], scale) for name, f in SWALIP.items()},
}
KEPT = {"siglip": 2 * 24 + 2, "barlow": 2 * 24, "swalip": 4 * 24 + 1, "prototypes": 4 * 24 + 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_only_gradients_are_kept_and_come_in_the_inputs_dtypes(name: str, dtype: torch.dtype) -> None:
    inputs = [each.detach().clone().requires_grad_() for each in (X.to(dtype), Y.to(dtype), SCALE, BIAS)]
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = LOSSES[name](*inputs)
    assert sum(kept) == KEPT[name]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert [each.dtype for each in gradients if each is not None] == [dtype, dtype, *[torch.float32] * 2][
        : len(gradients) - gradients.count(None)
    ]
