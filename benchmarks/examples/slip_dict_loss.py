"""SLIP and its descendants: a loss module from a dict of outputs to a dict of losses. CPU, seconds."""

import torch
from torch import Tensor, nn

from rocket_fast.distributed import gather
from rocket_fast.kernels import clip_terms


class CLIPLoss(nn.Module):
    """Raw embeddings in, ``loss``, ``clip_loss`` and ``clip_acc`` (percent) out; under torchrun, over all ranks."""

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = gather(outputs["image_embed"]), gather(outputs["text_embed"])
        terms = clip_terms(image, text, outputs["logit_scale"], normalize=True)
        return {"loss": terms.loss, "clip_loss": terms.loss, "clip_acc": terms.accuracy_image}


if __name__ == "__main__":
    torch.manual_seed(0)
    images, texts = torch.randn(2, 64, 32)
    towers, criterion = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16)]), CLIPLoss()
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), log_scale], lr=1e-2)
    history = []
    for _ in range(50):
        embeds = {"image_embed": towers[0](images), "text_embed": towers[1](texts), "logit_scale": log_scale.exp()}
        losses = criterion(embeds)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    print(f"{history[0]} -> {history[-1]}")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["clip_acc"] > history[0]["clip_acc"]
