"""Grid: which tokens of a sequence are patches, in how many rows and columns, told while the model runs.

A tap on the convolution that makes the patches reads the shape of its output, so any input size works: spectrogram
patches are frequency x time (AST), picture patches rows x columns, the frames of a waveform 1 x time.  What the
sequence has more than patches are special tokens (class, distillation, registers, prompts); they stand before the
patches.  Only two integers are kept, so that recomputed blocks (gradient checkpointing) find them too; their backward
pass belongs before the next forward pass of another input size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epitaxy.core.edits.edit import Arguments, Edit, output_tensor
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.core.route import Route

if TYPE_CHECKING:
    from epitaxy.core.sites import Site

SOURCES = ("patch", "frames")  # roles of the convolutions that make the tokens


class Grid:
    """Rows and columns of the patches; ``size`` is None until the model has run, unless the user gave it.

    ``dimensions`` is 1 where there is only ever one row.
    """

    def __init__(self, size: tuple[int, int] | None = None, dimensions: int = 2) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise EpitaxyError(f"grid: expected two numbers, rows and columns, of at least 1, found {size}")
        self.size = size
        self.dimensions = 1 if size is not None and size[0] == 1 else dimensions

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``b t r`` -> special tokens ``b s r`` and patches ``b r rows columns``.

        Raises ``UnsupportedError`` when the sequence has fewer tokens than the grid.
        """
        if x.dim() != 3:
            raise UnsupportedError(f"expected tokens in rows, batch x tokens x width, found shape {tuple(x.shape)}")
        if self.size is None:
            raise UnsupportedError("the patch grid is not known: the convolution that makes the patches did not run")
        rows, columns = self.size
        special = x.shape[1] - rows * columns
        if special < 0:
            raise UnsupportedError(
                f"a sequence of {x.shape[1]} tokens does not hold the patch grid of {rows} x {columns}"
            )
        patches = x[:, special:].transpose(1, 2)
        return x[:, :special].contiguous(), patches.reshape(*patches.shape[:2], rows, columns)

    @staticmethod
    def join(special: Tensor, plane: Tensor) -> Tensor:
        """The inverse of ``split``."""
        return torch.cat([special, plane.flatten(2).transpose(1, 2)], dim=1)


class GridTap(Edit):
    """On the convolution that makes the patches: keeps the shape of its output; changes nothing."""

    rowwise = False

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        shape = tuple(output_tensor(output).shape[2:])
        if len(shape) not in (1, 2):
            raise UnsupportedError(f"a patch grid has one or two dimensions, found {len(shape)}")
        for tap in group.values():
            assert isinstance(tap, GridTap)
            tap.grid.size = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        return output


def grid_at(site: Site, size: tuple[int, int] | None = None) -> tuple[Grid, list[tuple[str, Edit]]]:
    """The grid of the sequences at ``site``, and the tap that reads it: (module path, edit); none for a given ``size``.

    Raises ``UnsupportedError`` where the grid cannot be told.
    """
    if size is not None:
        return Grid(size), []
    role, path = _source(site)
    grid = Grid(dimensions=1 if role == "frames" else 2)
    return grid, [(path, GridTap(grid))]


def _source(site: Site) -> tuple[str, str]:
    """(role, path) of the convolution that makes the tokens of this site's block.

    Where a model has several stacks of blocks, a convolution serves the stack with which it shares the longest path.
    """
    anatomy = site.anatomy
    hint = "give the rows and columns as grid=(F, T)"
    if anatomy.grid_obstacle is not None:
        raise UnsupportedError(f"the patch grid of {anatomy.family} cannot be told: {anatomy.grid_obstacle}")
    block = anatomy.block_of(site.path)
    if block is None:
        raise UnsupportedError(f"the patch grid at {site.path!r}, outside the blocks, cannot be told; {hint}")
    stacks = list(dict.fromkeys(spot.path.rpartition(".")[0] for spot in anatomy.spots("block")))
    own = block.path.rpartition(".")[0]
    found: dict[str, str] = {}
    for role in SOURCES:
        for spot in anatomy.roles.get(role, ()):
            shared = {stack: _shared(stack, spot.path) for stack in stacks}
            if shared[own] == max(shared.values()):
                found[role] = spot.path  # the last: earlier ones feed it
    if not found:
        raise UnsupportedError(
            f"the patch grid of {anatomy.family} cannot be told: it has no convolution known to make its tokens; {hint}"
        )
    return next(iter(found.items()))


def _shared(path: str, other: str) -> int:
    """How many leading parts two module paths share."""
    count = 0
    for ours, theirs in zip(path.split("."), other.split("."), strict=False):
        if ours != theirs:
            break
        count += 1
    return count
