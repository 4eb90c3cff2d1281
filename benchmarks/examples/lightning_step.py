"""Lightning: the loss in ``training_step``; with several devices, over the batch of all of them. CPU, seconds."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rocket_fast.distributed import gather
from rocket_fast.kernels import clip_loss


class DualEncoder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.image_tower, self.text_tower = nn.Linear(32, 16), nn.Linear(32, 16)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.history: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        image, text = gather(self.image_tower(batch[0])), gather(self.text_tower(batch[1]))
        loss = clip_loss(image, text, self.log_scale.exp(), normalize=True)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = DualEncoder()
    loader = DataLoader(TensorDataset(*torch.randn(2, 64, 32)), batch_size=64)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=50, accelerator="cpu", devices=1, log_every_n_steps=1, **quiet).fit(model, loader)
    print(f"loss {model.history[0]:.4f} -> {model.history[-1]:.4f}")
    assert model.history[-1] < 0.5 * model.history[0]
