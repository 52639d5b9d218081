"""The method variants of the contract.  A registered method without a line here joins with its default fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import epitaxy
from epitaxy import (
    BitFit,
    Bottleneck,
    Conformer,
    Convpass,
    DenseMoA,
    GridConv,
    Head,
    LoRA,
    MoSA,
    MoSALoRA,
    NormTuning,
    Prefix,
    Prompt,
    SoftMoA,
)
from epitaxy.core.registry import methods_in

CONVOLUTIONS = {"wav2vec2": "*conv_layers.*.conv"}  # its positional convolution is grouped, which LoRA refuses
GRIDS = {"plain": (2, 3)}  # models that do not tell their patch grid

PATCHED = ("vit", "dinov2", "ast")  # without a patch embedding the published start of prompts is not defined


@dataclass(frozen=True)
class Variant:
    """One method with its fields; ``make(family)`` builds it, ``title`` is for people."""

    name: str
    title: str
    make: Callable[[str], Any]

    @property
    def cannot(self) -> dict[str, str]:
        """What the methods in it declare themselves unable to do."""
        return {
            ability: f"{part.method_name}: {reason}"
            for part in methods_in(self.make("vit"))
            for ability, reason in part.cannot.items()
        }


WRITTEN = (
    Variant("lora", "LoRA", lambda family: LoRA(rank=4)),
    Variant(
        "lora_linear",
        "LoRA, rank-stabilised, every linear map",
        lambda family: LoRA(at="linear", rank=2, alpha=4, rank_stabilised=True),
    ),
    Variant("lora_conv", "LoRA, convolutions", lambda family: LoRA(at=CONVOLUTIONS.get(family, "conv"), rank=2)),
    Variant("bottleneck_parallel", "Bottleneck, parallel", lambda family: Bottleneck.parallel(12)),
    Variant("bottleneck_houlsby", "Bottleneck, Houlsby", lambda family: Bottleneck.houlsby(12)),
    Variant("bottleneck_pfeiffer", "Bottleneck, Pfeiffer", lambda family: Bottleneck.pfeiffer(12)),
    Variant(
        "bottleneck_adaptformer",
        "Bottleneck, AdaptFormer, learned scale",
        lambda family: Bottleneck.adaptformer(12, scale="learned", dropout=0.0),
    ),
    Variant("dense_moa", "Dense-MoA", lambda family: DenseMoA(experts=3, bottleneck=4)),
    Variant(
        "dense_moa_convpass",
        "Dense-MoA, Convpass experts",
        lambda family: DenseMoA(at="mlp", experts=2, bottleneck=3, expert="convpass"),
    ),
    Variant(
        "dense_moa_legacy", "Dense-MoA, as published", lambda family: DenseMoA(experts=2, bottleneck=3, legacy=True)
    ),
    Variant("soft_moa", "Soft-MoA", lambda family: SoftMoA(experts=3, bottleneck=4)),
    Variant(
        "soft_moa_normalised",
        "Soft-MoA, normalised, 2 slots, Convpass experts",
        lambda family: SoftMoA(at="mlp", experts=2, slots=2, bottleneck=3, expert="convpass", normalise=True),
    ),
    Variant(
        "bottleneck_before",
        "Bottleneck, before",
        lambda family: Bottleneck(bottleneck=12, order="before", residual=True, activation="gelu"),
    ),
    Variant(
        "bottleneck_replacing",
        "Bottleneck, in place of the output",
        lambda family: Bottleneck(at=("attention", "mlp"), reduction=3, order="sequential", residual=False),
    ),
    Variant("mosa", "MoSA", lambda family: MoSA(bottleneck=12, dropout=0.0)),
    Variant("mosa_pfeiffer", "MoSA, Pfeiffer", lambda family: MoSA.pfeiffer(12)),
    Variant(
        "mosa_slices",
        "MoSA, output slices, drawn by row",
        lambda family: MoSA(bottleneck=6, dropout=0.0, parts=3, partition="out_slice", draw="row"),
    ),
    Variant(
        "mosa_ranks",
        "MoSA, rank slices, several active, with coefficients",
        lambda family: MoSA(
            at=("attention", "mlp"),
            bottleneck=6,
            dropout=0.0,
            parts=6,
            partition="rank_slice",
            active="bernoulli",
            coefficients=True,
        ),
    ),
    Variant(
        "mosa_both",
        "MoSA, both projections, biases of parts, drawn by row",
        lambda family: MoSA(bottleneck=6, dropout=0.0, split="both", bias="parts", draw="row"),
    ),
    Variant(
        "mosa_stored",
        "MoSA, owners from data, coefficients, own norm",
        lambda family: MoSA(bottleneck=6, parts=3, dropout=0.0, balance="saliency", coefficients=True, norm="layer"),
    ),
    Variant("mosa_lora", "MoSA on LoRA", lambda family: MoSALoRA(rank=4)),
    Variant(
        "mosa_lora_both",
        "MoSA on LoRA, both factors, every linear map, drawn by row",
        lambda family: MoSALoRA(at="linear", rank=4, parts=2, split="both", draw="row"),
    ),
    Variant(
        "mosa_lora_ranks",
        "MoSA on LoRA, rank-one experts",
        lambda family: MoSALoRA(
            rank=4, partition="rank_slice", active="bernoulli", keep=0.7, coefficients=True, dropout=0.0
        ),
    ),
    Variant("conformer", "Conformer", lambda family: Conformer(bottleneck=4, kernel=4)),
    Variant(
        "conformer_sequential",
        "Conformer, sequential, layer norm inside",
        lambda family: Conformer(
            at=("attention", "mlp"), bottleneck=4, kernel=31, order="sequential", norm="none", inner_norm="layer"
        ),
    ),
    Variant("convpass", "Convpass", lambda family: Convpass(bottleneck=4, dropout=0.0, grid=GRIDS.get(family))),
    Variant(
        "convpass_1d",
        "Convpass, along the sequence",
        lambda family: Convpass(bottleneck=4, dropout=0.0, dimensions=1),
    ),
    Variant("grid_conv", "Grid convolution", lambda family: GridConv(bottleneck=6, kernel=4, grid=GRIDS.get(family))),
    Variant("prompt", "Prompt, shallow", lambda family: Prompt(tokens=3)),
    Variant("prompt_deep", "Prompt, deep", lambda family: Prompt(tokens=3, deep=True)),
    Variant("prefix", "Prefix, joint", lambda family: Prefix(tokens=3)),
    Variant("prefix_gated", "Prefix, gated", lambda family: Prefix(tokens=3, gated=True)),
    Variant("bitfit", "BitFit", lambda family: BitFit()),
    Variant("norm_tuning", "NormTuning", lambda family: NormTuning()),
    Variant("norm_tuning_legacy", "NormTuning, legacy", lambda family: NormTuning(legacy=True)),
    Variant("head", "Head, a copy of the base's", lambda family: Head()),
    Variant("head_labels", "Head, 5 labels", lambda family: Head(labels=5)),
    Variant("head_pooled", "Head on the mean of all tokens", lambda family: Head(pool="all")),
    Variant(
        "prompt_pooled",
        "Prompt as published for AST + Head on prompts and patches",
        lambda family: (
            Prompt(
                tokens=3,
                deep=True,
                init="vpt" if family in PATCHED else "normal",
                drop_distillation=family == "ast",
            )
            + Head(pool="prompts+patches")
        ),
    ),
    Variant("lora_bitfit_head", "LoRA + BitFit + Head", lambda family: LoRA(rank=2) + BitFit() + Head()),
    Variant("lora_prefix", "LoRA + joint Prefix", lambda family: LoRA(rank=2) + Prefix(tokens=2)),
    Variant(
        "bottleneck_norm_prefix",
        "Bottleneck + NormTuning + gated Prefix",
        lambda family: Bottleneck(bottleneck=12) + NormTuning() + Prefix(tokens=2, gated=True),
    ),
)


@cache
def variants() -> dict[str, Variant]:
    """Every variant by name: those above, and every other known method of this package as it comes."""
    covered = {part.method_name for variant in WRITTEN for part in methods_in(variant.make("vit"))}
    found = {variant.name: variant for variant in WRITTEN}
    for name, cls in epitaxy.methods().items():
        if name not in covered and cls.__module__.startswith("epitaxy.methods."):
            found[name] = Variant(name, cls.__name__, lambda family, cls=cls: cls())
    return found
