"""The kinds of transformer block in use, each as a table role -> relative path.

One row per structure, not per model: ViT, AST and DeiT share a row, so do Llama, Mistral and Qwen.  Where queries,
keys and values are one matrix, all three names mean that matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from epitaxy.core.errors import SiteError, expect_one_of

_PLAIN_FIELDS = ("causal", "heads", "pattern", "token_obstacle")
_LATER_FIELDS = ("special_tokens", "final_norm")  # absent from files that were written before they existed
Norms = Literal["before", "after", "either"]


@dataclass(frozen=True)
class Part:
    """A role's place inside a block: where its output leaves and, if elsewhere, where its input enters."""

    exit: str
    entry: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one kind of block is built.

    ``roles`` maps role names to relative paths (``"attn.q"``), or to ``Part``s where entry and exit differ.  An
    attention layer whose softmax is computed by an inner module names it as ``attention.core``; that name is for us,
    not a role to sit at.  ``pattern`` is a regular expression for block paths, for models whose blocks are not in a
    ``ModuleList``.  ``special_tokens`` counts the tokens that lead the sequence before its content (a class token),
    where no parameter of a known name shows them; ``final_norm`` is the full path of a norm after the last block.
    ``norms`` says whether the norms ``norm.<role>`` stand before their sub-layers or after the residual sum, or
    "either", where models of both kinds share the structure and the block's class decides.
    """

    name: str
    roles: Mapping[str, Part | str]
    optional: frozenset[str] = frozenset()
    causal: bool = False
    heads: int | None = None
    pattern: str | None = None
    token_obstacle: str | None = None
    special_tokens: int | None = None
    final_norm: str | None = None
    norms: Norms = "before"
    parts: Mapping[str, Part] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = {role: part if isinstance(part, Part) else Part(part) for role, part in self.roles.items()}
        object.__setattr__(self, "parts", parts)
        expect_one_of(f"norms of layout {self.name!r}", self.norms, get_args(Norms))
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            message = f"the pattern {self.pattern!r} of layout {self.name!r} is no regular expression ({error})"
            raise SiteError(message) from None

    def required(self) -> set[str]:
        """Relative paths a module must have to be a block of this layout."""
        needed = {role: part for role, part in self.parts.items() if role not in self.optional}
        return {part.exit for part in needed.values()} | {part.entry for part in needed.values() if part.entry}

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for files."""
        roles = {role: [part.exit, part.entry] if part.entry else part.exit for role, part in self.parts.items()}
        rest = {key: getattr(self, key) for key in (*_PLAIN_FIELDS, *_LATER_FIELDS)}
        return {"name": self.name, "roles": roles, "optional": sorted(self.optional), "norms": self.norms, **rest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """The inverse of ``to_dict``; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        roles = {role: part if isinstance(part, str) else Part(*part) for role, part in data["roles"].items()}
        rest = {key: data[key] for key in _PLAIN_FIELDS} | {key: data.get(key) for key in _LATER_FIELDS}
        return cls(data["name"], roles, frozenset(data["optional"]), norms=data.get("norms", "before"), **rest)


def _layout(
    name: str,
    roles: Mapping[str, str | Part],
    optional: str = "",
    causal: bool = False,
    token_obstacle: str | None = None,
    special_tokens: int | None = None,
    norms: Norms = "before",
) -> Layout:
    return Layout(
        name,
        roles,
        frozenset(optional.split()),
        causal,
        token_obstacle=token_obstacle,
        special_tokens=special_tokens,
        norms=norms,
    )


def _projections(module: str, names: str, prefix: str = "attention") -> dict[str, str]:
    roles = ("q", "k", "v", "output")
    return {f"{prefix}.{role}": f"{module}.{name}" for role, name in zip(roles, names.split(), strict=True)}


def _fused(module: str, qkv: str, output: str) -> dict[str, str]:
    return {
        **{f"attention.{role}": f"{module}.{qkv}" for role in ("q", "k", "v", "qkv")},
        "attention.output": f"{module}.{output}",
    }


def _joined(module: str, names: str) -> dict[str, str | Part]:
    return {"attention": module, **_projections(module, names)}


_BERT_PARTS: dict[str, str | Part] = {
    "attention.core": "attention.self",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.output": "attention.output.dense",
    "mlp": Part("output.dense", entry="intermediate"),
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}

BLOCK_LAYOUTS: tuple[Layout, ...] = (
    _layout(  # ViT, AST, DeiT, Swin
        "vision transformer",
        {
            **_joined("attention", "q_proj k_proj v_proj o_proj"),
            "mlp": "mlp",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm.attention": "layernorm_before",
            "norm.mlp": "layernorm_after",
        },
    ),
    _layout(
        "dinov2",
        {
            **_joined("attention", "q_proj k_proj v_proj o_proj"),
            "mlp": "mlp",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm.attention": "norm1",
            "norm.mlp": "norm2",
        },
    ),
    _layout(  # DINOv2 giant, whose feed-forward is gated; DINOv3
        "dinov2 with other names",
        {
            **_joined("attention", "q_proj k_proj v_proj o_proj"),
            "mlp": "mlp",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
            "norm.attention": "norm1",
            "norm.mlp": "norm2",
        },
        optional="mlp.gate",
    ),
    _layout(
        "wav2vec2",
        {
            **_joined("attention", "q_proj k_proj v_proj out_proj"),
            "mlp": "feed_forward",
            "mlp.up": "feed_forward.intermediate_dense",
            "mlp.down": "feed_forward.output_dense",
            "norm.attention": "layer_norm",
            "norm.mlp": "final_layer_norm",
        },
        norms="either",
    ),
    _layout(  # Whisper, BART
        "encoder-decoder layer",
        {
            **_joined("self_attn", "q_proj k_proj v_proj out_proj"),
            "cross_attention": "encoder_attn",
            **_projections("encoder_attn", "q_proj k_proj v_proj out_proj", "cross_attention"),
            "mlp": Part("fc2", entry="fc1"),
            "mlp.up": "fc1",
            "mlp.down": "fc2",
            "norm.attention": "self_attn_layer_norm",
            "norm.cross_attention": "encoder_attn_layer_norm",
            "norm.mlp": "final_layer_norm",
        },
        optional="cross_attention cross_attention.q cross_attention.k cross_attention.v cross_attention.output "
        "norm.cross_attention",
        norms="either",
    ),
    _layout(
        "clip",
        {
            **_joined("self_attn", "q_proj k_proj v_proj out_proj"),
            "mlp": "mlp",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm.attention": "layer_norm1",
            "norm.mlp": "layer_norm2",
        },
    ),
    _layout(
        "bert",
        {
            "attention": Part("attention.output.dense", entry="attention"),
            **_BERT_PARTS,
            "norm.attention": "attention.output.LayerNorm",
            "norm.mlp": "output.LayerNorm",
        },
        special_tokens=1,  # its tokenizers put a class token first
        norms="after",
    ),
    _layout(  # the audio encoder of CLAP, Swin v2
        "swin in the parts of bert",
        {
            "attention": "attention",
            **_BERT_PARTS,
            "norm.attention": "layernorm_before",
            "norm.mlp": "layernorm_after",
        },
        norms="either",
    ),
    _layout(  # Wav2Vec2-Conformer, Wav2Vec2-BERT: a feed-forward on either side of attention and convolution
        "conformer",
        {
            **_joined("self_attn", "linear_q linear_k linear_v linear_out"),
            "mlp": "ffn2",
            "mlp.up": "ffn2.intermediate_dense",
            "mlp.down": "ffn2.output_dense",
            "mlp_first": "ffn1",
            "mlp_first.up": "ffn1.intermediate_dense",
            "mlp_first.down": "ffn1.output_dense",
            "convolution": "conv_module",
            "norm.attention": "self_attn_layer_norm",
            "norm.mlp": "ffn2_layer_norm",
            "norm.mlp_first": "ffn1_layer_norm",
            "norm.block": "final_layer_norm",
        },
        token_obstacle="its blocks convolve neighbouring frames, among which a token has no place",
    ),
    _layout(
        "t5 decoder",
        {
            **_joined("layer.0.SelfAttention", "q k v o"),
            "cross_attention": "layer.1.EncDecAttention",
            **_projections("layer.1.EncDecAttention", "q k v o", "cross_attention"),
            "mlp": "layer.2.DenseReluDense",
            "mlp.down": "layer.2.DenseReluDense.wo",
            "norm.attention": "layer.0.layer_norm",
            "norm.cross_attention": "layer.1.layer_norm",
            "norm.mlp": "layer.2.layer_norm",
        },
    ),
    _layout(
        "t5 encoder",
        {
            **_joined("layer.0.SelfAttention", "q k v o"),
            "mlp": "layer.1.DenseReluDense",
            "mlp.down": "layer.1.DenseReluDense.wo",
            "norm.attention": "layer.0.layer_norm",
            "norm.mlp": "layer.1.layer_norm",
        },
    ),
    _layout(  # Llama, Mistral, Qwen, SmolLM
        "llama",
        {
            **_joined("self_attn", "q_proj k_proj v_proj o_proj"),
            "mlp": "mlp",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
            "norm.attention": "input_layernorm",
            "norm.mlp": "post_attention_layernorm",
        },
        causal=True,
    ),
    _layout(
        "gpt2",
        {
            "attention": "attn",
            **_fused("attn", "c_attn", "c_proj"),
            "mlp": "mlp",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "norm.attention": "ln_1",
            "norm.mlp": "ln_2",
        },
        causal=True,
    ),
    _layout(  # UNets and diffusion transformers of diffusers
        "diffusers block",
        {
            **_joined("attn1", "to_q to_k to_v to_out.0"),
            "cross_attention": "attn2",
            **_projections("attn2", "to_q to_k to_v to_out.0", "cross_attention"),
            "mlp": "ff",
            "mlp.up": "ff.net.0.proj",
            "mlp.down": "ff.net.2",
            "norm.attention": "norm1",
            "norm.cross_attention": "norm2",
            "norm.mlp": "norm3",
        },
        token_obstacle="its sequences are pictures, and every token must come back to its place",
    ),
    _layout(
        "timm",
        {
            "attention": "attn",
            **_fused("attn", "qkv", "proj"),
            "mlp": "mlp",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm.attention": "norm1",
            "norm.mlp": "norm2",
        },
    ),
)

OUTER_ROLES: dict[str, tuple[str, ...]] = {
    "resnet.norm": (r"(.*\.)?resnets\.\d+\.norm[12]",),
    "resnet.conv": (r"(.*\.)?resnets\.\d+\.conv[12]",),
    "resnet.shortcut": (r"(.*\.)?resnets\.\d+\.conv_shortcut",),
    "sampler.conv": (r"(.*\.)?(down|up)samplers\.\d+\.conv",),
    "transformer.norm": (r"(.*\.)?attentions\.\d+\.norm",),
    "transformer.proj_in": (r"(.*\.)?attentions\.\d+\.proj_in",),
    "transformer.proj_out": (r"(.*\.)?attentions\.\d+\.proj_out",),
    "patch": (
        r"(.*\.)?patch_embeddings\.projection",
        r"(.*\.)?patch_embed\.proj",
        r"(.*\.)?embeddings\.patch_embedding",
    ),
    "frames": (r"(.*\.)?feature_extractor\.conv_layers\.\d+\.conv", r"(.*\.)?encoder\.conv2", r"conv2"),
    "embed": (r"(.*\.)?(embed_tokens|wte|word_embeddings)",),
    "norm.final": (  # not those of patches, of pooling heads, and between the stages of a pyramid
        r"(?!.*\b(embeddings|head|downsample|patch_embed)\b)(.*\.)?(layernorm|ln_f|norm)",
        r"(encoder|.*\.encoder|decoder|.*\.decoder)\.(layer_norm|norm)",
        r"(.*\.)?post_layernorm",
        r"conv_norm_out",
    ),
}

HEAD_PATHS = (
    "classifier",
    "classifier.out_proj",
    "classifier.dense",
    "score",
    "lm_head",
    "proj_out",
    "head",
    "head.fc",
    "timm_model.head",
    "timm_model.head.fc",
    "fc",
)

LANGUAGE_HEADS = ("lm_head", "proj_out")  # they predict a token at every position

UNREAD: dict[str, tuple[str, ...]] = {  # parts of a tower that a classifier on top of it never calls
    "CLIPForImageClassification": ("vision_model.post_layernorm",),
    "SiglipForImageClassification": ("vision_model.head",),
}

SPECIAL_TOKENS = (  # parameters that lead a sequence, in its order
    ("cls_token", "class_token", "class_embedding"),
    ("distillation_token", "dist_token"),
    ("register_tokens", "reg_token"),
)

__all__ = [
    "BLOCK_LAYOUTS",
    "HEAD_PATHS",
    "LANGUAGE_HEADS",
    "Layout",
    "OUTER_ROLES",
    "Part",
    "SPECIAL_TOKENS",
    "UNREAD",
]
