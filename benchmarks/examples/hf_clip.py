"""Hugging Face CLIPModel: our loss on its embeddings equals its own, in value and gradients. CPU, seconds."""

import torch
from transformers import CLIPConfig, CLIPModel

from rocket_fast.kernels import clip_loss

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

if __name__ == "__main__":
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 62, "eos_token_id": 63}
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    batch = {"pixel_values": torch.randn(32, 3, 16, 16), "input_ids": torch.randint(0, 62, (32, 8))}
    batch["input_ids"][:, -1] = 63

    expected = model(**batch, return_loss=True).loss
    expected.backward()
    expected_grads = [parameter.grad.clone() for parameter in model.parameters()]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(20):
        outputs = model(**batch)
        loss = clip_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close([p.grad for p in model.parameters()], expected_grads, rtol=1e-4, atol=1e-6)
        optimizer.step()
        history.append(loss.item())
    print(f"loss {history[0]:.4f} (Hugging Face's {expected.item():.4f}) -> {history[-1]:.4f}")
    assert history[-1] < history[0]
