"""open_clip: one import changes. A tiny model trained with its loss and with ours gives equal losses. CPU, seconds."""

import open_clip
import torch

from rocket_fast.interop.open_clip import ClipLoss  # was: from open_clip import ClipLoss


def train(loss: torch.nn.Module, steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    model = open_clip.CLIP(16, vision, text, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, tokens = torch.randn(32, 3, 16, 16), torch.randint(1, 63, (32, 8))
    history = []
    for _ in range(steps):
        losses = loss(**model(images, tokens), output_dict=True)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    return history


if __name__ == "__main__":
    theirs, ours = train(open_clip.ClipLoss()), train(ClipLoss())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    print(f"loss {ours[0]:.4f} -> {ours[-1]:.4f}, open_clip's {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    assert ours[-1] < ours[0]
