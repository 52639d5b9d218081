"""Per-row routing: which adapter each row of a batch goes through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epitaxy.core.errors import StateError


class Route:
    """The adapter of every row of the next forward calls, as an index into the distinct names (-1: the bare base).

    Hosts may see more rows than the batch has, when a model folds something into its batch dimension: windows
    (Swin) and heads repeat each row in place (``expand="interleave"``), classifier-free guidance repeats the whole
    batch (``expand="tile"``).
    """

    def __init__(self, rows: Sequence[str | None], expand: str = "interleave") -> None:
        if not rows:
            raise StateError("route() got no rows: give one adapter name or None per row of the batch")
        if expand not in ("interleave", "tile"):
            raise StateError(f"expand must be 'interleave' or 'tile', got {expand!r}")
        self.rows = tuple(rows)
        self.names = tuple(dict.fromkeys(name for name in rows if name is not None))
        self.expand = expand
        self.numbers = tuple(-1 if name is None else self.names.index(name) for name in rows)
        self._expanded: dict[tuple[int, torch.device], Tensor] = {}
        self._members: dict[tuple[int, int, torch.device], Tensor] = {}
        self.stacks: dict[int, tuple[object, tuple[Tensor, Tensor]]] = {}

    def each(self, size: int) -> list[int]:
        """Number of the adapter of each of the ``size`` rows a host sees; raises when they do not fit the batch."""
        batch = len(self.numbers)
        if size % batch:
            raise StateError(
                f"route() was given {batch} rows, but a module received a batch of {size}; give one name per row"
            )
        repeat = size // batch
        if self.expand == "tile":
            return list(self.numbers) * repeat
        return [number for number in self.numbers for _ in range(repeat)]

    def expanded(self, size: int, device: torch.device) -> Tensor:
        """``each`` as a tensor."""
        key = (size, device)
        if key not in self._expanded:
            self._expanded[key] = torch.tensor(self.each(size), device=device)
        return self._expanded[key]

    def members(self, number: int, size: int, device: torch.device) -> Tensor:
        """Positions of the rows that go through adapter ``number``."""
        key = (number, size, device)
        if key not in self._members:
            rows = [row for row, other in enumerate(self.each(size)) if other == number]
            self._members[key] = torch.tensor(rows, device=device)
        return self._members[key]
