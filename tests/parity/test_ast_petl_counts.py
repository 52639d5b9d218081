"""Trained parameters of AST (d = 768, 12 layers) against the published counts of 2312.03694, Table 1."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import epitaxy
from epitaxy import BitFit, Bottleneck, Conformer, Head, NormTuning
from epitaxy.core.registry import methods_in
from epitaxy.train.recipe_files import load_recipe

FEED_FORWARD, BOTH = "mlp", ("attention", "mlp")
ONE_NORM, TWO_NORMS = NormTuning(at="norm.mlp"), NormTuning(at=("norm.attention", "norm.mlp"))
FINAL_NORM = NormTuning(at="norm.final")


@cache
def base(kind: str) -> nn.Module:
    with torch.device("meta"):
        if kind == "ast":
            return transformers.ASTModel(transformers.ASTConfig())
        return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())


def size(method: Any, kind: str = "ast") -> int:
    """Parameters of ``method`` on a full-sized model without memory."""
    adapter = epitaxy.attach(base(kind), method, name="counted")
    try:
        return adapter.size()
    finally:
        epitaxy.detach(base(kind), "counted")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (BitFit(at=("linear", "norm")), 102_144),
        (Bottleneck(at=FEED_FORWARD, reduction=64) + ONE_NORM, 248_976),
        (Bottleneck(at=BOTH, reduction=64) + TWO_NORMS, 497_952),
        (Conformer(at=FEED_FORWARD, reduction=96, kernel=31) + ONE_NORM, 270_720),
        (Conformer(at=FEED_FORWARD, reduction=96, kernel=8) + ONE_NORM, 268_512),
        (Conformer(at=BOTH, reduction=96, kernel=31) + TWO_NORMS, 541_440),
        (FINAL_NORM, 1_536),
    ],
    ids=["bitfit", "bottleneck pfeiffer", "bottleneck houlsby", "conformer k31", "conformer k8", "houlsby k31", "norm"],
)
def test_counts_of_ast(method: Any, expected: int) -> None:
    assert size(method) == expected


@pytest.mark.parametrize(
    ("method", "printed"),
    [(Bottleneck(reduction=64), 250), (Conformer(reduction=96, kernel=31), 272)],
    ids=["bottleneck", "conformer"],
)
def test_counts_of_wav2vec2(method: Any, printed: int) -> None:
    """Table 3, in thousands: the adapters with one norm a layer and one more, the twelve layers' dead norm aside."""
    one_norm = 2 * 768
    assert (size(method, "wav2vec2") + 12 * one_norm + one_norm) // 1000 == printed


@pytest.mark.parametrize(
    ("recipe", "expected", "printed"),
    [("bottleneck-895k", 894_528, 895_000), ("conformer-927k", 926_208, 927_000)],
)
def test_the_wider_adapters_of_wav2vec2(recipe: str, expected: int, printed: int) -> None:
    """Table 3's second counts: adapters alone, 12 (d r + r + r d + d) and its like; the norms stay frozen."""
    method = load_recipe(f"ast_petl/wav2vec2/{recipe}").adapter_method()
    adapters, head = methods_in(method)
    assert isinstance(head, Head)
    assert size(adapters, "wav2vec2") == expected
    assert abs(expected - printed) < 1000


@pytest.mark.parametrize(("rank", "kernel"), [(8, 31), (5, 8), (1, 1)])
def test_the_formula_of_the_conformer_adapter(rank: int, kernel: int) -> None:
    """A norm, the gated map, the depthwise convolution, the batch norm, the map back."""
    one = 2 * 768 + 2 * rank * (768 + 1) + rank * kernel + rank + 2 * rank + 768 * (rank + 1)
    assert size(Conformer(bottleneck=rank, kernel=kernel)) == 12 * one
    assert size(Conformer(bottleneck=rank, kernel=kernel, norm="none")) == 12 * (one - 2 * 768)
