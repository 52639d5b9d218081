"""Small vision transformers with the module names and calling convention of timm, which needs torchvision.

Written from what timm's models are called and how they call each other, for tests: blocks in a ``Sequential``, one
matrix for queries, keys and values, layer scale and drop path between sub-layer and sum, pictures that stay
``b h w c`` in Swin, and attention that adds its own biases and never calls its matrix (BEiT).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return result


class Attention(nn.Module):
    """``own_biases`` adds biases of queries and values to the product of a weight that is never called."""

    def __init__(self, dim: int, num_heads: int, own_biases: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=not own_biases)
        self.q_norm = self.k_norm = nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if own_biases else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if own_biases else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = F.linear(x, self.qkv.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value, attn_mask)
        result: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return result


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, init_values: float | None, drop_path: float, own_biases: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads, own_biases)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 2 * dim)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        result: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return result


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch_size: int, flatten: bool = True) -> None:
        super().__init__()
        self.proj, self.flatten = nn.Conv2d(3, dim, patch_size, patch_size), flatten
        self.norm = nn.Identity() if flatten else nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
        result: Tensor = self.norm(x)
        return result


class VisionTransformer(nn.Module):
    """timm's ViT: called with pixels, gives logits."""

    def __init__(
        self,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 2,
        num_classes: int = 3,
        global_pool: str = "token",
        init_values: float | None = None,
        drop_path: float = 0.0,
        reg_tokens: int = 0,
        distilled: bool = False,
        own_biases: bool = False,
        image_size: int = 16,
    ) -> None:
        super().__init__()
        self.global_pool, self.grad_checkpointing = global_pool, False
        self.num_prefix_tokens = 1 + reg_tokens + distilled
        self.patch_embed = PatchEmbed(dim, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, dim)) if reg_tokens else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // 8) ** 2 + self.num_prefix_tokens, dim))
        self.pos_drop, self.patch_drop, self.norm_pre = nn.Dropout(0.0), nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, num_heads, init_values, drop_path, own_biases) for _ in range(depth)))
        averaged = global_pool == "avg"
        self.norm = nn.Identity() if averaged else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if averaged else nn.Identity()
        self.head_drop, self.head = nn.Dropout(0.0), nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)

    def gradient_checkpointing_enable(self) -> None:
        self.grad_checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        leading = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in leading), x], dim=1)
        x = self.norm_pre(self.patch_drop(self.pos_drop(x + self.pos_embed)))
        if self.grad_checkpointing and self.training:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        if self.dist_token is not None:
            averaged: Tensor = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
            return averaged
        x = x[:, self.num_prefix_tokens :].mean(1) if self.global_pool == "avg" else x[:, 0]
        result: Tensor = self.head(self.head_drop(self.fc_norm(x)))
        return result


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = (window_size, window_size), num_heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window_size - 1) ** 2, num_heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        places = torch.stack(torch.meshgrid(*(torch.arange(window_size),) * 2, indexing="ij")).flatten(1)
        steps = places[:, :, None] - places[:, None] + window_size - 1
        self.register_buffer("relative_position_index", steps[0] * (2 * window_size - 1) + steps[1], persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)
        result: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2))
        return result


class SwinTransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size = (window_size, window_size)
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window_size, num_heads)
        self.drop_path1 = self.drop_path2 = nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:  # b h w c
        batch, height, width, dim = x.shape
        side = self.window_size[0]
        windows = self.norm1(x).view(batch, height // side, side, width // side, side, dim).transpose(2, 3)
        mixed = self.attn(windows.reshape(-1, side * side, dim))
        mixed = mixed.view(batch, height // side, width // side, side, side, dim).transpose(2, 3)
        x = x + self.drop_path1(mixed.reshape(batch, height, width, dim))
        x = x.reshape(batch, -1, dim)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(batch, height, width, dim)


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        result: Tensor = self.reduction(self.norm(x))
        return result


class SwinTransformerStage(nn.Module):
    def __init__(self, dim: int, depth: int, num_heads: int, window_size: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else PatchMerging(dim // 2)
        self.blocks = nn.Sequential(*(SwinTransformerBlock(dim, num_heads, window_size) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.downsample(x))
        return result


class ClassifierHead(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x.mean((1, 2)))
        return result


class SwinTransformer(nn.Module):
    """timm's Swin: pictures stay ``b h w c``, a stage begins with what halves its sides."""

    def __init__(
        self, dim: int = 16, depths: tuple[int, ...] = (2, 1), window_size: int = 4, num_classes: int = 3
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, 4, flatten=False)
        widths = [dim * 2**stage for stage in range(len(depths))]
        self.layers = nn.Sequential(
            *(
                SwinTransformerStage(width, depth, 2, window_size, width == dim)
                for width, depth in zip(widths, depths, strict=True)
            )
        )
        self.norm, self.head = nn.LayerNorm(widths[-1]), ClassifierHead(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.layers(self.patch_embed(x))))
        return result
