"""The position table of an audio spectrogram transformer, adapted to clips of another length or height.

The rule of AST (Gong 2021, 2104.01778): a shorter table is the middle of the learned one, a longer one is interpolated.
Loading with another length and letting sizes mismatch does neither: it leaves zeros, which then stay frozen.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, nearest

How = Literal["crop", "start", "interpolate"]
Grid = tuple[int, int]


def adapt_positions(table: Tensor, old: Grid, new: Grid, how: How = "crop") -> Tensor:
    """``table`` (``1 s+f*t d``, frequency major, ``s`` special tokens in front) from grid ``old`` to ``new``.

    A larger side is interpolated (bilinear, corners not aligned), time before frequency.  A smaller one is the middle
    of the old ("crop"), its beginning ("start"), or interpolated too.  Special tokens are kept.  The same grid gives
    the same tensor.  Raises ``EpitaxyError`` when the table is not of grid ``old``.
    """
    if how not in get_args(How):
        raise EpitaxyError(
            f"positions is one of {', '.join(get_args(How))}, got {how!r}{nearest(str(how), get_args(How))}"
        )
    special = table.shape[1] - old[0] * old[1]
    if special < 0 or min(new) < 1:
        raise EpitaxyError(f"a position table of {table.shape[1]} rows cannot go from the grid {old} to {new}")
    if old == new:
        return table
    grid = table[:, special:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # 1 d f t
    for axis in (3, 2):
        grid = _resized(grid, axis, new[axis - 2], how)
    return _joined(table[:, :special], grid)


def _resized(grid: Tensor, axis: int, wanted: int, how: How) -> Tensor:
    there = grid.shape[axis]
    if wanted == there:
        return grid
    if wanted < there and how != "interpolate":
        return grid.narrow(axis, 0 if how == "start" else there // 2 - wanted // 2, wanted)
    size = list(grid.shape[2:])
    size[axis - 2] = wanted
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)


def _joined(special: Tensor, grid: Tensor) -> Tensor:
    return torch.cat([special, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def resize_input(
    model: nn.Module, frames: int, mels: int, how: How = "crop", legacy: Literal["zeroed"] | None = None
) -> None:
    """Make an AST of transformers read ``frames`` by ``mels`` spectrograms: its position table and its config.

    ``legacy="zeroed"`` puts zeros in the place of an adapted table, special tokens included, and warns.  A model that
    has that size already is left as it is.  Raises ``EpitaxyError`` for inputs smaller than a patch.
    """
    embeddings = _embeddings(model)
    config: Any = model.config
    if (frames, mels) == (config.max_length, config.num_mel_bins):
        return
    smallest = config.patch_size
    if min(frames, mels) < smallest:
        raise EpitaxyError(f"this model's patches are {smallest} wide; got {frames} frames and {mels} mel bins")
    old: Grid = embeddings.get_shape(config)
    config.max_length, config.num_mel_bins = frames, mels
    new: Grid = embeddings.get_shape(config)
    table: nn.Parameter = embeddings.position_embeddings
    adapted = adapt_positions(table.detach().float(), old, new, how).to(table.dtype).clone()
    if legacy == "zeroed" and old != new:
        adapted.zero_()
        warnings.warn(
            f"legacy='zeroed': the model runs without positions, its table of {new[0]} x {new[1]} is all zeros",
            stacklevel=2,
        )
    embeddings.position_embeddings = nn.Parameter(adapted, requires_grad=table.requires_grad)
    embeddings.config = config


def _embeddings(model: nn.Module) -> Any:
    for module in model.modules():
        if (
            hasattr(module, "position_embeddings")
            and hasattr(module, "patch_embeddings")
            and hasattr(module, "get_shape")
        ):
            return module
    raise EpitaxyError(f"{type(model).__name__} has no position table over frequency and time that could be adapted")
