"""The families of models of the contract: tiny, random, deterministic, without dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import epitaxy

Inputs = dict[str, Any]
LABELS, VOCABULARY = 3, 50
HF_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": LABELS,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """One family: how to build a model and its inputs.

    ``like`` names the family whose model this one shares when only the inputs differ (padded batches).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    layout: epitaxy.Layout | None = None
    like: str | None = None

    @property
    def kind(self) -> str:
        """The family proper, whatever the inputs."""
        return self.like or self.name

    def model(self) -> nn.Module:
        """A fresh model in eval mode; always the same weights."""
        return copy.deepcopy(_pristine(self.build))

    def run(self, model: nn.Module, batch: int = 3) -> Tensor:
        """The outputs of ``model`` on the family's inputs."""
        return output(model(**self.inputs(batch)))


def output(result: Any) -> Tensor:
    """The tensor of a model's result."""
    if isinstance(result, Tensor):
        return result
    tensor: Tensor = result.sample if hasattr(result, "sample") else result.logits
    return tensor


@cache
def _pristine(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero, norms at one, weights tiny: mistakes would hide
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.add_(torch.randn_like(parameter) * fan_in**-0.5)
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """Switch gradient checkpointing on in the model's own way."""
    switch: Any = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
    switch()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Reproducible normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(batch: int, length: int = 7, seed: int = 1) -> Tensor:
    """Reproducible token ids."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(batch: int, length: int, left: bool) -> Tensor:
    """An attention mask whose row i has i padding positions (at most three)."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        padding = min(row, 3)
        mask[row, slice(0, padding) if left else slice(length - padding, length)] = 0
    return mask


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **HF_SIZES, **NO_DROPOUT))


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {key: value for key, value in HF_SIZES.items() if key != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(image_size=16, patch_size=8, **sizes, **NO_DROPOUT))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        image_size=32,
        patch_size=4,
        drop_path_rate=0.0,
        num_labels=LABELS,
        **NO_DROPOUT,
    )
    return SwinForImageClassification(config)


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPForImageClassification

    sizes = {key: value for key, value in HF_SIZES.items() if key != "num_labels"}
    text = {**sizes, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}, text_config=text, num_labels=LABELS)
    return CLIPForImageClassification(config)


def timm() -> nn.Module:
    from tests.models.timm_like import VisionTransformer

    return VisionTransformer(num_classes=LABELS, init_values=0.5)


def ast() -> nn.Module:
    from transformers import ASTConfig, ASTForAudioClassification

    return ASTForAudioClassification(ASTConfig(max_length=32, num_mel_bins=32, **HF_SIZES, **NO_DROPOUT))


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        **HF_SIZES,
    )
    return Wav2Vec2ForSequenceClassification(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
        num_labels=LABELS,
        classifier_proj_size=16,
        dropout=0.0,
    )
    return WhisperForAudioClassification(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **HF_SIZES, **NO_DROPOUT)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**HF_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, pad_token_id=0, **sizes))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {**HF_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return MistralForCausalLM(MistralConfig(max_position_embeddings=64, sliding_window=5, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        norm_num_groups=4,
    )


def unet_inputs(batch: int, xl: bool = False) -> Inputs:
    inputs: Inputs = {
        "sample": noise(batch, 4, 8, 8),
        "timestep": torch.arange(batch),
        "encoder_hidden_states": noise(batch, 5, 24, seed=2),
    }
    if xl:
        conditions = {"text_embeds": noise(batch, 16, seed=3), "time_ids": noise(batch, 6, seed=4)}
        inputs["added_cond_kwargs"] = conditions
    return inputs


class PlainAttention(nn.Module):
    """Self-attention as a user would write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # b t d
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed: Tensor = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_mix, self.before_ff = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = PlainAttention(width, heads)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before_mix(x))
        mixed: Tensor = x + self.ff(self.before_ff(x))
        return mixed


class PlainTransformer(nn.Module):
    """A classifier of sequences from no library."""

    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, LABELS)
        self.checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:  # b t 12 -> b labels
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


PLAIN_LAYOUT = epitaxy.Layout(
    "plain transformer",
    {
        "attention": "mix",
        "attention.core": "mix",
        "attention.q": "mix.query",
        "attention.k": "mix.key",
        "attention.v": "mix.value",
        "attention.output": "mix.out",
        "mlp": "ff",
        "mlp.up": "ff.0",
        "mlp.down": "ff.2",
        "norm.attention": "before_mix",
        "norm.mlp": "before_ff",
    },
    heads=4,
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("vit", vit, lambda batch: {"pixel_values": noise(batch, 3, 16, 16)}),
        Family("dinov2", dinov2, lambda batch: {"pixel_values": noise(batch, 3, 16, 16)}),
        Family("swin", swin, lambda batch: {"pixel_values": noise(batch, 3, 32, 32)}),
        Family("clip", clip, lambda batch: {"pixel_values": noise(batch, 3, 16, 16)}),
        Family("timm", timm, lambda batch: {"x": noise(batch, 3, 16, 16)}),
        Family("ast", ast, lambda batch: {"input_values": noise(batch, 32, 32)}),
        Family("wav2vec2", wav2vec2, lambda batch: {"input_values": noise(batch, 400)}),
        Family("whisper", whisper, lambda batch: {"input_features": noise(batch, 16, 40)}),
        Family("bert", bert, lambda batch: {"input_ids": words(batch)}),
        Family("llama", llama, lambda batch: {"input_ids": words(batch)}),
        Family("mistral", mistral, lambda batch: {"input_ids": words(batch)}),
        Family("gpt2", gpt2, lambda batch: {"input_ids": words(batch)}),
        Family("sd15", sd15, unet_inputs),
        Family("sdxl", sdxl, lambda batch: unet_inputs(batch, xl=True)),
        Family("plain", PlainTransformer, lambda batch: {"x": noise(batch, 6, 12)}, PLAIN_LAYOUT),
    )
}


def _padded(name: str, inputs: Callable[[int], Inputs]) -> Family:
    return replace(FAMILIES[name], name=f"{name} padded", like=name, inputs=inputs)


PADDED: dict[str, Family] = {
    family.name: family
    for family in (
        _padded("bert", lambda batch: {"input_ids": words(batch), "attention_mask": ragged(batch, 7, left=False)}),
        _padded("llama", lambda batch: {"input_ids": words(batch), "attention_mask": ragged(batch, 7, left=True)}),
        _padded(
            "wav2vec2",
            lambda batch: {
                "input_values": noise(batch, 400),
                "attention_mask": ragged(batch, 4, left=False).repeat_interleave(100, dim=1),
            },
        ),
    )
}
