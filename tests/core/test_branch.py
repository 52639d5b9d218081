"""Branches against the same sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epitaxy.core.edits import Branch
from epitaxy.core.errors import SiteError
from epitaxy.core.slot import Slot, State, input_hook, output_hook


def hosted(branch: Branch) -> nn.Linear:
    """A linear map carrying one active branch."""
    torch.manual_seed(0)
    host, state = nn.Linear(4, 4), State()
    state.active = ("a",)
    slot = Slot(state)
    slot.add("a", "branch", branch)
    host._modules["epitaxy"] = slot
    host.register_forward_pre_hook(input_hook, with_kwargs=True)
    host.register_forward_hook(output_hook, with_kwargs=True)
    return host


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("reads", "writes", "keep"),
    [
        ("input", "output", True),
        ("output", "output", True),
        ("input", "output", False),
        ("output", "output", False),
        ("input", "input", True),
        ("input", "input", False),
        ("input", "both", True),
        ("input", "both", False),
    ],
)
def test_branch_is_the_sum_it_says(reads: str, writes: str, keep: bool, scale: float, residual: bool) -> None:
    torch.manual_seed(1)
    module = nn.Linear(4, 4)
    host = hosted(Branch(module, reads=reads, writes=writes, keep=keep, scale=scale, residual=residual))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4)
    plain = nn.functional.linear(x, host.weight, host.bias)
    source = x if reads == "input" else plain
    result = scale * module(source) + (source if residual else 0)
    if writes == "output":
        expected = result + (plain if keep else 0)
    else:
        expected = nn.functional.linear(result + (x if keep else 0), host.weight, host.bias)
        expected = expected + (result if writes == "both" else 0)
    torch.testing.assert_close(host(x), expected)


def test_a_branch_cannot_read_what_it_precedes() -> None:
    with pytest.raises(SiteError, match="cannot write into the input"):
        Branch(nn.Linear(4, 4), reads="output", writes="input")
