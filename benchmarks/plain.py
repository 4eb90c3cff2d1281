"""The model as it is usually written, to time ours against: captions padded to 77 tokens, views one by one, dense loss.

With the weights of ours, so that outputs and gradients can be compared, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_fast.batch import PackedText
from rocket_fast.kernels import reference
from rocket_fast.models.attention import TransformerBlock
from rocket_fast.models.clip import DualEncoder
from rocket_fast.models.text import TextTower
from rocket_fast.models.vision import ViT


def padded(text: PackedText, context_length: int) -> Tensor:
    """Zero-padded ids (B, context length)."""
    rows_BL = text.padded()
    return F.pad(rows_BL, (0, context_length - rows_BL.shape[1]))


class PlainBlock(nn.Module):
    """Pre-norm block around torch's multi-head attention."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        width = block.qkv.in_features
        self.attn = nn.MultiheadAttention(width, block.heads, batch_first=True)
        self.norm1, self.norm2, self.fc1, self.fc2 = block.norm1, block.norm2, block.fc1, block.fc2
        self.attn.in_proj_weight, self.attn.in_proj_bias = block.qkv.weight, block.qkv.bias
        self.attn.out_proj.weight, self.attn.out_proj.bias = block.proj.weight, block.proj.bias
        self.activation = block.activation

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        """(B, L, D) to the same."""
        h_BLD = self.norm1(x_BLD)
        x_BLD = x_BLD + self.attn(h_BLD, h_BLD, h_BLD, need_weights=False, attn_mask=mask_LL)[0]
        return x_BLD + self.fc2(self.activation(self.fc1(self.norm2(x_BLD))))


class PlainText(nn.Module):
    """CLIP's text tower on padded rows, sharing the weights of ours."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = tower.token_embedding, tower.positional_embedding
        self.blocks = nn.ModuleList(PlainBlock(block) for block in tower.blocks)
        self.norm = tower.norm
        length = tower.config.context_length
        self.register_buffer("mask_LL", torch.full((length, length), -torch.inf).triu_(1))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Zero-padded ids (B, context length) to features (B, W); end-of-text has the largest id."""
        x_BLD = self.token_embedding(tokens_BL) + self.positional_embedding
        for block in self.blocks:
            x_BLD = block(x_BLD, self.mask_LL)
        return self.norm(x_BLD)[torch.arange(len(tokens_BL)), tokens_BL.argmax(1)]


class PlainViT(nn.Module):
    """A vision transformer sharing the weights of ours."""

    def __init__(self, tower: ViT) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = tower.patch_embed, tower.cls_token, tower.pos_embed
        self.blocks = nn.ModuleList(PlainBlock(block) for block in tower.blocks)
        self.norm = tower.norm

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to features (B, D)."""
        patch_BLD = self.patch_embed(image_BCHW).flatten(2).transpose(1, 2)
        x_BLD = torch.cat([self.cls_token.expand(len(image_BCHW), -1, -1), patch_BLD], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)[:, 0]


class PlainCLIP(nn.Module):
    """CL2L of a ViT: a view at a time through each tower, one dense loss for each pair."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        assert isinstance(model.visual, ViT)
        self.visual, self.text = PlainViT(model.visual), PlainText(model.text)
        self.image_z, self.text_z, self.image_h, self.text_h = model.image_z, model.text_z, model.image_h, model.text_h
        self.logit_scale, self.h_logit_scale = model.logit_scale, model.h_logit_scale

    def loss(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...], label_smoothing: float) -> Tensor:
        """The loss of 1 + K views: pictures (B, 3, H, W) and padded ids (B, context length)."""
        image_weak, *image_strong = (self.visual(image) for image in images)
        text_weak, *text_strong = (self.text(text) for text in texts)
        return reference.multiview_clip_loss(
            self.image_z(image_weak),
            self.text_z(text_weak),
            self.logit_scale.exp(),
            [self.image_h(features) for features in image_strong],
            [self.text_h(features) for features in text_strong],
            self.h_logit_scale.exp(),
            label_smoothing=label_smoothing,
            normalize=True,
        )
