"""State dicts under timm's names, loaded strictly into a transformer built as timm builds its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import epitaxy
from epitaxy import Bottleneck, EpitaxyError, Head, LoRA
from epitaxy.core.wider import Width, smallest_ratio
from epitaxy.interop.timm import save_timm, timm_arguments, timm_state


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: float, qkv_bias: bool, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp = Attention(dim, heads, qkv_bias), Mlp(dim, int(dim * ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, size)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x).flatten(2).mT
        return patches


class VisionTransformer(nn.Module):
    """The arguments and module names of timm's class of this name."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        global_pool: str,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        assert global_pool == "token"
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, layer_norm_eps) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def vit(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(image_size=16, patch_size=4, intermediate_size=96, num_labels=4, **sizes, **fields)
    model = transformers.ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("fields", [{}, {"layer_norm_eps": 1e-6, "qkv_bias": False}])
@torch.no_grad()
def test_a_folded_vit_loads_strictly(fields: dict[str, Any], tmp_path: Path) -> None:
    model, x = vit(**fields), torch.randn(2, 3, 16, 16)
    method = Bottleneck.adaptformer(7, scale="learned") + LoRA(rank=2) + Head(labels=5)
    for parameter in epitaxy.attach(model, method).parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    folded = epitaxy.fold(model)
    save_timm(folded, tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / "timm.json").read_text())
    assert ("layer_norm_eps" in arguments) is ("layer_norm_eps" not in fields)
    timm = VisionTransformer(**arguments)
    assert timm.blocks[0].mlp.fc1.out_features == 103  # type: ignore[union-attr]
    timm.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    torch.testing.assert_close(timm(x), model(x).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_trunk_alone() -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, intermediate_size=40
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    timm = VisionTransformer(**timm_arguments(model))
    timm.load_state_dict(timm_state(model), strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(timm(x), model(x).last_hidden_state[:, 0])


def test_the_ratio_gives_the_width_back() -> None:
    """``int(dim * ratio)`` rounds down, and many quotients of floats lie below the number they stand for."""
    for dim in (1, 3, 24, 192, 384, 768, 1000, 1280):
        for hidden in range(4 * dim, 4 * dim + 130):
            assert int(dim * smallest_ratio([Width("", "", dim, hidden, hidden)])) == hidden


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vit(hidden_act="gelu_new"), "has the activation 'gelu', found 'gelu_new'"),
        (lambda: transformers.ViTModel(vit().config), "has no place for 'pooler.dense.weight'"),
        (lambda: nn.Linear(2, 2), r"only a ViT of transformers is written in timm's names, found Linear \(no config\)"),
    ],
)
def test_refusals(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(EpitaxyError, match=says):
        save_timm(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_folded_first() -> None:
    model = vit()
    epitaxy.attach(model, LoRA(rank=2))
    with pytest.raises(EpitaxyError, match="fold or merge them first"):
        timm_state(model)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("here")
    with pytest.raises(EpitaxyError, match="not overwritten"):
        save_timm(vit(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
