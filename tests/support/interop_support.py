"""What the tests of other projects' models share: captions, weights that hide nothing, equal embeddings."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def ids(rows: int = 3, length: int = 10, vocab: int = 50) -> Tensor:
    """Captions of different lengths, zero-padded, each with the largest id at its end."""
    token_BL = torch.randint(1, vocab - 2, (rows, length), generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        token_BL[row, 0], token_BL[row, length - 1 - row :] = vocab - 2, 0
        token_BL[row, length - 1 - row] = vocab - 1
    return token_BL


def shaken(model: Model) -> Model:
    """Every parameter moved, so that no zero, one or equal pair hides a wrong name."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.add_(0.1 * noise if "var" in name or "scale" in name else 0.2 * (noise - 0.5))
    return model.eval()


def assert_equal(own_BD: Tensor, expected_BD: Tensor) -> None:
    """To 1e-6 of the vectors' lengths."""
    length_B1 = expected_BD.norm(dim=1, keepdim=True)
    torch.testing.assert_close(own_BD / length_B1, expected_BD / length_B1, atol=1e-6, rtol=0)
