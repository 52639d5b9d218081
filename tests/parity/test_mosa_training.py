"""Six steps of MoSA with the published optimiser, against golden vectors, for both meanings of an idle gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from epitaxy.methods.partition import split_parameters
from epitaxy.train.lazy_adam import LazyAdamW
from tests.train.copies import InParts, SplitBranch, two_pass_loss

FILE = Path(__file__).parents[2].parent / "shared" / "golden" / "mosa" / "train_trajectory.safetensors"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there")


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    made.load_state_dict({"weight": weight, "bias": bias})
    return made


@pytest.mark.parametrize(("kind", "idle"), [("zero", "momentum"), ("none", "lazy")])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_trajectory(kind: str, idle: Any, dtype: torch.dtype, close: float) -> None:
    golden = {key: t.to(dtype) if t.is_floating_point() else t for key, t in load_file(FILE).items()}
    owners = golden["up.assign"]
    parts = int(owners.max()) + 1
    norm = nn.LayerNorm(owners.shape[0], eps=1e-6, dtype=dtype)
    norm.load_state_dict({"weight": golden["norm.weight0"], "bias": golden["norm.bias0"]})
    start = linear(torch.zeros(owners.shape, dtype=dtype), torch.zeros(owners.shape[0], dtype=dtype))
    model = SplitBranch(
        norm,
        linear(golden["down.weight0"], golden["down.bias0"]),
        InParts(start, owners, parts, biases=True),
        linear(golden["head.weight"], golden["head.bias"]),
    )
    decaying = {name: not name.endswith("bias") for name, _ in model.named_parameters()}
    optimizer = LazyAdamW(
        [
            {"params": [p for name, p in model.named_parameters() if decaying[name] is flag], "weight_decay": decay}
            for flag, decay in ((True, float(golden["weight_decay"])), (False, 0.0))
        ],
        split_parameters(model),
        lr=float(golden["lr"]),
        eps=1e-6,
        idle=idle,
        published=True,
    )
    losses = []
    for x, y, drawn in zip(golden["X"], golden["Y"], golden["experts"].tolist(), strict=True):
        loss = two_pass_loss(model, x, y, drawn)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), golden[f"{kind}.losses"], atol=close, rtol=close)
    up = model.up
    assert isinstance(up, InParts)
    found = {
        **{
            f"{name}.{key}": t
            for name in ("norm", "down", "head")
            for key, t in getattr(model, name).named_parameters()
        },
        **{f"up.{part}.weight": up.weight_of(part) for part in range(parts)},
        **{f"up.{part}.bias": up.bias[part] for part in range(parts)},
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.detach(), golden[f"{kind}.final.{name}"], atol=close, rtol=close, msg=name)
    merged = torch.stack([up.weight_of(part) for part in range(parts)]).mean(0)
    torch.testing.assert_close(merged.detach(), golden[f"{kind}.merged.up.weight"], atol=close, rtol=close)
    assert not torch.allclose(golden["zero.merged.up.weight"], golden["none.merged.up.weight"], atol=10 * close)
