"""Low-rank changes against the dense change of the weight they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import epitaxy
from epitaxy.core.edits import Delta
from epitaxy.core.errors import SiteError, UnsupportedError

HOSTS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear without bias, two dimensions": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "transposed": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 8)),
    "conv2d reflecting": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
}


class Box(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def adapted(kind: str, rank: int = 2) -> tuple[Box, Tensor, Delta]:
    """A model whose one layer carries a trained change, an input, and the change."""
    torch.manual_seed(0)
    make, shape = HOSTS[kind]
    model = Box(make())
    adapter = epitaxy.attach(model, epitaxy.LoRA(at="layer", rank=rank, alpha=3.0), name="a")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    edit = adapter.edits[0]
    assert isinstance(edit, Delta)
    return model, torch.randn(shape), edit


@pytest.mark.parametrize("kind", HOSTS)
def test_a_change_acts_like_its_dense_weight(kind: str) -> None:
    model, x, edit = adapted(kind)
    changed = model(x)
    epitaxy.activate(model, None)
    weight = model.layer.weight
    dense = torch.einsum("or,r...->o...", edit.up, edit.down) * 1.5
    with torch.no_grad():
        weight += dense.t() if kind == "transposed" else dense
    torch.testing.assert_close(model(x), changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_rows_may_each_have_another_change(kind: str) -> None:
    model, x, edit = adapted(kind)
    batch = x.shape[0]
    down = torch.randn(batch, *edit.down.shape, requires_grad=True)
    up = torch.randn(batch, *edit.up.shape, requires_grad=True)
    edit.bind(down, up)
    together = model(x)
    together.sum().backward()
    assert down.grad is not None
    assert up.grad is not None
    rows = []
    for row in range(batch):
        edit.bind(down[row], up[row])
        rows.append(model(x[row : row + 1]))
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-5, atol=1e-5)
    edit.bind(None)
    assert edit.factors()[0] is edit.down


def test_rank_stabilised_scale() -> None:
    assert epitaxy.LoRA(rank=16, alpha=8).scale == 0.5
    assert epitaxy.LoRA(rank=16, alpha=8, rank_stabilised=True).scale == 2.0
    assert epitaxy.LoRA(rank=16).scale == 1.0


def test_dropout_acts_on_the_change_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    model = Box(nn.Linear(64, 4))
    adapter = epitaxy.attach(model, epitaxy.LoRA(at="layer", rank=2, dropout=0.5), name="a")
    x = torch.randn(8, 64)
    base = model(x)  # the change is still zero
    nn.init.normal_(adapter.edits[0].up)  # type: ignore[arg-type]
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not torch.allclose(model(x), base)


def test_what_has_no_low_rank_change_is_refused() -> None:
    with pytest.raises(SiteError, match="2 groups"):
        Delta(nn.Conv1d(4, 4, 3, groups=2), 2)
    with pytest.raises(SiteError, match="found LayerNorm"):
        Delta(nn.LayerNorm(4), 2)
    with pytest.raises(SiteError, match="at least 1"):
        Delta(nn.Linear(4, 4), 0)


def test_a_change_per_row_has_no_merged_form() -> None:
    model, _, edit = adapted("linear")
    edit.bind(torch.randn(2, *edit.down.shape), torch.randn(2, *edit.up.shape))
    before = model.layer.weight.clone()
    with pytest.raises(UnsupportedError, match="row to row"):
        epitaxy.merge(model)
    assert torch.equal(model.layer.weight, before)


def test_a_packed_weight_takes_an_adapter_but_no_merge() -> None:
    class Packed(nn.Linear):
        """Stands for a quantised layer: eight-bit weights, unpacked in its own forward."""

        def __init__(self) -> None:
            super().__init__(8, 4)
            self.weight = nn.Parameter(torch.randint(-9, 9, (16, 1), dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :4] * 0.5

    model = Box(Packed())
    adapter = epitaxy.attach(model, epitaxy.LoRA(at="layer", rank=2), name="a")
    x = torch.randn(3, 8)
    assert torch.equal(model(x), x[:, :4] * 0.5)
    nn.init.normal_(adapter.edits[0].up)  # type: ignore[arg-type]
    assert not torch.equal(model(x), x[:, :4] * 0.5)
    with pytest.raises(UnsupportedError, match="dequantise the base first"):
        epitaxy.merge(model)
