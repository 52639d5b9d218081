"""State dicts of the released code of Adapter+: on the stream after the feed-forward, its scales worked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import epitaxy
from epitaxy.core.errors import FormatError
from epitaxy.interop import adapter_plus
from epitaxy.interop.adapter_plus import Published
from tests.interop.bases import photograph
from tests.interop.vision_files import BLOCKS, RANK, TIMM, WIDTH, State, draw, fused, renamed, run_blocks, vit, write
from tests.models.vision import pictures


def adapters(
    scaling: int = WIDTH, norm: bool = False, bias: bool = True, names: tuple[str, ...] = ("adapter",)
) -> State:
    found: State = {}
    for number in range(BLOCKS):
        for position, name in enumerate(names):
            place, seed = f"blocks.{number}.{name}", 100 * number + 10 * position
            found[f"{place}.bottleneck.1.weight"] = draw(RANK, WIDTH, seed=seed)
            found[f"{place}.bottleneck.4.weight"] = draw(WIDTH, RANK, seed=seed + 1)
            if bias:
                found[f"{place}.bottleneck.1.bias"] = draw(RANK, seed=seed + 2)
                found[f"{place}.bottleneck.4.bias"] = draw(WIDTH, seed=seed + 3)
            if scaling:
                found[f"{place}.scaling"] = draw(scaling, seed=seed + 4)
            if norm:
                found[f"{place}.norm_a.weight"] = 1 + draw(WIDTH, seed=seed + 5)
                found[f"{place}.norm_a.bias"] = draw(WIDTH, seed=seed + 6)
    return found


def head() -> State:
    return {"head.weight": draw(4, WIDTH, seed=8), "head.bias": draw(4, seed=9)}


def expected(state: State, placement: str) -> Tensor:
    model = vit()

    def adapter(number: int, x: Tensor, name: str = "adapter") -> Tensor:
        place = f"blocks.{number}.{name}"
        if f"{place}.norm_a.weight" in state:
            x = F.layer_norm(x, (WIDTH,), state[f"{place}.norm_a.weight"], state[f"{place}.norm_a.bias"], 1e-6)
        low = F.gelu(F.linear(x, state[f"{place}.bottleneck.1.weight"], state.get(f"{place}.bottleneck.1.bias")))
        high = F.linear(low, state[f"{place}.bottleneck.4.weight"], state.get(f"{place}.bottleneck.4.bias"))
        return high * state.get(f"{place}.scaling", torch.ones(1))

    def block(number: int, module: Any, x: Tensor) -> Tensor:
        y = module.attention(module.layernorm_before(x))[0]
        h = x + y + (adapter(number, y, "adapter_attn") if placement == "houlsby" else 0)
        y = module.mlp(module.layernorm_after(h))
        return h + y + adapter(number, h + y if placement == "post" else y)

    with torch.no_grad():
        features = run_blocks(model, pictures(), block)
        return F.linear(features, state["head.weight"], state["head.bias"])


@pytest.mark.parametrize(
    ("own", "placement"),
    [
        (adapters(), "post"),
        (adapters(scaling=1, norm=True), "post"),
        (adapters(scaling=0, bias=False), "post"),
        (adapters(), "intermediate"),
        (adapters(names=("adapter", "adapter_attn")), "houlsby"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_outputs_are_those_of_the_published_network(own: State, placement: str, prefix: str, tmp_path: Path) -> None:
    state = {**fused(renamed(vit(), TIMM)), **own, **head()}
    assert "blocks.1.attn.qkv.weight" in state
    file = write(tmp_path / "best.ckpt.pt", {f"{prefix}{key}": value for key, value in state.items()})
    assert epitaxy.inspect(file).format == "adapter_plus"
    model = vit()
    options = Published(placement="intermediate") if placement == "intermediate" else None
    adapter_plus.load(model, file, options=options)
    assert torch.allclose(model(pixel_values=pictures()).logits, expected(state, placement), atol=5e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blocks.0.adapter.scaling": torch.ones(3)}, r"has shape \(3,\), expected 1 or 32 numbers|expected \(3,\)"),
        ({"blocks.1.adapter.bottleneck.4.weight": None}, "but not the module.up.weight that belongs to it"),
        ({"blocks.1.attn.qkv.weight": torch.zeros(3 * WIDTH, WIDTH)}, "made for another base, or the whole model"),
        ({"blocks.0.attn.adapters.q.scaling": torch.ones(1)}, "is no name that this format knows"),
        ({"blocks.0.prompt": torch.ones(2, WIDTH)}, "'blocks.0.prompt' is no name that this format knows"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    state = {**fused(renamed(vit(), TIMM)), **adapters(), **head(), **changes}
    model = vit()
    same = photograph(model)
    with pytest.raises(FormatError, match=says):
        epitaxy.load(
            model, write(tmp_path / "x.pth", {key: value for key, value in state.items() if value is not None}), "a"
        )
    same()
