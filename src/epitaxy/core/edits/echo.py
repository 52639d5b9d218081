"""Echo: a branch whose result enters its block twice, a second time after a later sub-layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from epitaxy.core.edits.branch import Branch
from epitaxy.core.edits.edit import Edit
from epitaxy.core.edits.tap import Memo
from epitaxy.core.errors import SiteError, UnsupportedError

if TYPE_CHECKING:
    from epitaxy.core.sites import Site


class EchoingBranch(Branch):
    """A parallel branch; what it added is added once more to the output of the role ``again`` of the same block."""

    def __init__(self, module: nn.Module, again: str = "mlp") -> None:
        super().__init__(module, reads="input")
        self.again, self.said = again, Memo()

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        yield from super().placements(site)
        spots = [spot for spot in site.anatomy.roles.get(self.again, ()) if spot.layer == site.layer]
        if site.layer is None or not spots:
            raise SiteError(f"{site.path!r} has no {self.again!r} in the same block to add its result to once more")
        yield spots[0].path, Echo(self.said)

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = super().after(host, x, torch.zeros_like(y))
        self.said.value = change
        return y + change


class Echo(Edit):
    """Adds what its branch added earlier in the forward pass."""

    def __init__(self, said: Memo) -> None:
        super().__init__()
        self.said = said

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = self.said.take()
        if change.shape != y.shape:
            raise UnsupportedError(
                f"the attention of this model works on {tuple(change.shape)} and its feed-forward on "
                f"{tuple(y.shape)}, so that one result cannot be added to both"
            )
        return y + change.to(y.dtype)
