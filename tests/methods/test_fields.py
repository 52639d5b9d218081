"""Fields that many methods share are checked when the method is made, not when it first trains."""

from __future__ import annotations

from typing import Any

import pytest

import epitaxy


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize(
    "method", [epitaxy.LoRA, epitaxy.Bottleneck, epitaxy.Conformer, epitaxy.Convpass, epitaxy.GridConv]
)
def test_rates_of_dropout(method: Any, rate: float) -> None:
    with pytest.raises(epitaxy.EpitaxyError, match="dropout must be from 0 to below 1, got"):
        method(dropout=rate)
