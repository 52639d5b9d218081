"""State dicts of the released code of AdaptFormer: the adapter beside norm and feed-forward, and its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import epitaxy
from epitaxy.core.errors import FormatError
from epitaxy.interop import adaptformer
from epitaxy.interop.adaptformer import Published
from tests.interop.bases import photograph
from tests.interop.vision_files import BLOCKS, RANK, TIMM, WIDTH, State, draw, renamed, run_blocks, vit, write
from tests.models.vision import pictures


def base() -> State:
    """That code keeps the feed-forward's maps on the block itself."""
    return {key.replace(".mlp.fc", ".fc"): value for key, value in renamed(vit(), TIMM).items()}


def adapters() -> State:
    found: State = {}
    for number in range(BLOCKS):
        name = f"blocks.{number}.adaptmlp"
        found |= {
            f"{name}.down_proj.weight": draw(RANK, WIDTH, seed=number),
            f"{name}.down_proj.bias": draw(RANK, seed=10),
        }
        found |= {
            f"{name}.up_proj.weight": draw(WIDTH, RANK, seed=20 + number),
            f"{name}.up_proj.bias": draw(WIDTH, seed=30),
        }
    return found


def plain_head() -> State:
    return {"head.weight": draw(4, WIDTH, seed=8), "head.bias": draw(4, seed=9)}


def normed_head() -> State:
    found = {f"head.1.{leaf}": value for leaf, value in zip(("weight", "bias"), plain_head().values(), strict=True)}
    statistics = {"head.0.running_mean": draw(WIDTH, seed=40), "head.0.running_var": draw(WIDTH, seed=41).abs() + 0.1}
    return found | statistics | {"head.0.num_batches_tracked": torch.tensor(12)}


def expected(state: State, order: str = "parallel", scale: float = 0.1) -> Tensor:
    model = vit()

    def adapter(number: int, x: Tensor) -> Tensor:
        name = f"blocks.{number}.adaptmlp"
        low = F.relu(F.linear(x, state[f"{name}.down_proj.weight"], state[f"{name}.down_proj.bias"]))
        return scale * F.linear(low, state[f"{name}.up_proj.weight"], state[f"{name}.up_proj.bias"])

    def block(number: int, module: Any, x: Tensor) -> Tensor:
        h = x + module.attention(module.layernorm_before(x))[0]
        y = module.mlp(module.layernorm_after(h))
        return h + y + adapter(number, h if order == "parallel" else y)

    with torch.no_grad():
        features = run_blocks(model, pictures(), block)
        if "head.1.weight" in state:
            norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6).eval()
            norm.load_state_dict(
                {key.removeprefix("head.0."): state[key] for key in state if key.startswith("head.0.")}
            )
            return F.linear(norm(features), state["head.1.weight"], state["head.1.bias"])
        return F.linear(features, state["head.weight"], state["head.bias"])


@pytest.mark.parametrize("head", [plain_head, normed_head])
@pytest.mark.parametrize("whole", [True, False])
def test_outputs_are_those_of_the_published_network(head: Any, whole: bool, tmp_path: Path) -> None:
    state = {**(base() if whole else {}), **adapters(), **head()}
    file = write(tmp_path / "checkpoint-99.pth", {"model": state, "epoch": 99})
    assert epitaxy.inspect(file).format == "adaptformer"
    model = vit()
    adapter = epitaxy.load(model, file)
    assert torch.allclose(model(pixel_values=pictures()).logits, expected(state), atol=2e-5)
    assert adapter.provenance["imported from"] == "adaptformer"


def test_a_sequential_adapter(tmp_path: Path) -> None:
    state = {**adapters(), **plain_head()}
    model = vit()
    adaptformer.load(model, write(tmp_path / "x.pth", state), options=Published(order="sequential"))
    assert torch.allclose(model(pixel_values=pictures()).logits, expected(state, "sequential"), atol=2e-5)


def test_a_learned_scale(tmp_path: Path) -> None:
    scales = {f"blocks.{number}.adaptmlp.scale": torch.tensor([0.7]) for number in range(BLOCKS)}
    state = {**adapters(), **plain_head(), **scales}
    model = vit()
    epitaxy.load(model, write(tmp_path / "x.pth", state))
    assert torch.allclose(model(pixel_values=pictures()).logits, expected(state, scale=0.7), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fc_norm.weight": torch.ones(WIDTH)}, "its head reads the mean of the patches through a norm of its own"),
        ({"blocks.0.adaptmlp.adapter_layer_norm_before.weight": torch.ones(WIDTH)}, "before or after the adapter"),
        ({"blocks.1.adaptmlp.up_proj.bias": None}, "but not the module.up.bias that belongs to it"),
        ({"blocks.1.fc2.weight": torch.zeros(WIDTH, 48)}, "made for another base, or the whole model was trained"),
        ({"embeddings.0": torch.zeros(1, 2, WIDTH)}, "'embeddings.0' is no name that this format knows"),
        ({"head.0.running_mean": torch.zeros(WIDTH)}, "'head.0.running_mean' is there, but no 'head.1.weight'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    state = {**base(), **adapters(), **plain_head(), **changes}
    model = vit()
    same = photograph(model)
    with pytest.raises(FormatError, match=says):
        epitaxy.load(
            model, write(tmp_path / "x.pth", {key: value for key, value in state.items() if value is not None}), "a"
        )
    same()
