"""The smallest method with a generator: a linear map from a context to low-rank changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.edits import Delta, Edit
from epitaxy.core.registry import method
from epitaxy.core.sites import Site


class Generator(nn.Module):
    """Maps a context ``b 8`` to the factors of one change per site and row."""

    def __init__(self, width: int, sites: int) -> None:
        super().__init__()
        self.width, self.sites = width, sites
        self.project = nn.Linear(8, sites * 2 * width)

    def bind(self, adapter: Adapter, context: Tensor) -> None:
        """Give every edit its tensors."""
        factors = self.project(context).view(context.shape[0], self.sites, 2, self.width)
        for number, edit in enumerate(adapter.edits):
            assert isinstance(edit, Delta)
            edit.bind(factors[:, number, 0].unsqueeze(1), factors[:, number, 1].unsqueeze(2))


@method("generated_for_tests")
@dataclass(frozen=True)
class Generated:
    """Rank-one changes of the queries."""

    at: str = "attention.q"

    def edits(self, site: Site) -> Iterator[Edit]:
        yield Delta(site.module, 1)

    def generator(self, sites: list[Site]) -> nn.Module:
        """The network that makes the changes."""
        return Generator(sites[0].require_width(), len(sites))
