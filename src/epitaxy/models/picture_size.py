"""Vision transformers at another picture size than their own: the position table, interpolated once.

The rule is that of the models' own ``interpolate_pos_encoding`` (Dosovitskiy et al. 2021, 2010.11929, section 3.2, as
DINO made it usual): bicubic, corners not aligned, special tokens kept.  Doing it once when a model is opened gives the
same outputs as that switch and needs no switch afterwards.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError

LARGEST = 4096  # pixels; a larger side is a mistake, whose table would fill the memory


def interpolate_table(table: Tensor, special: int, side: int) -> Tensor:
    """``table`` (``1 special+n*n d``) for a square grid of ``side`` patches; the same grid gives the same tensor.

    Raises ``EpitaxyError`` when the table is not that of a square grid.
    """
    positions = table.shape[1] - special
    old = math.isqrt(max(positions, 0))
    if old < 1 or old * old != positions:
        raise EpitaxyError(f"a position table of {table.shape[1]} rows is not that of a square grid of patches")
    if old == side:
        return table
    grid = table[:, special:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()  # 1 d h w
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :special], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)


def resize_pictures(model: nn.Module, pixels: int, source: str) -> None:
    """Make a vision transformer of transformers read pictures of ``pixels`` by ``pixels``: its table and its config.

    Models that interpolate by themselves (DINOv2, BEiT), models of windows without a table (Swin) and convolutional
    networks are left as they are.  Raises ``EpitaxyError`` naming ``source`` for a side that the patches do not divide
    or the windows do not fit.
    """
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    if config.model_type == "timm_wrapper":
        raise EpitaxyError(f"{source}: a timm model is opened at its own picture size only")
    if getattr(config, "patch_size", None) is None:
        return  # a convolutional network reads every size
    patch = _number(config.patch_size)
    if not patch <= pixels <= LARGEST or pixels % patch:
        raise EpitaxyError(
            f"{source}: the side of its pictures is a multiple of its patches of {patch} pixels, up to {LARGEST}, "
            f"got {pixels}"
        )
    if pixels == _number(config.image_size):
        return
    owner, name, embeddings = _embeddings(model, source)
    window = getattr(config, "window_size", None)
    if isinstance(window, int):
        _require_windows(config, window, pixels, patch, source)
    table = _table(embeddings)
    if table is None or not _has_switch(embeddings):
        return
    config.image_size = pixels
    own: Any = getattr(embeddings, "config", None)
    if own is not None:
        own.image_size = pixels
    setattr(owner, name, _rebuilt(embeddings, config, table, pixels // patch))


def resized_processor(processor: Any, pixels: int) -> Any:
    """An image processor that makes pictures of ``pixels`` by ``pixels``; a margin that it crops keeps its share."""
    values = processor.to_dict()
    crop = values.get("crop_size") if values.get("do_center_crop") else None
    before = _number(crop or values.get("size") or pixels)
    for key in ("size", "crop_size"):
        if values.get(key):
            values[key] = {name: round(side * pixels / before) for name, side in _sides(values[key]).items()}
    return type(processor).from_dict(values)


def _sides(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {str(name): int(side) for name, side in dict(size).items() if side is not None}


def _number(size: Any) -> int:
    """One side of a size given as a number, a pair or a mapping."""
    if isinstance(size, int):
        return size
    return int(next(iter(size.values() if hasattr(size, "values") else size)))


def _embeddings(model: nn.Module, source: str) -> tuple[nn.Module, str, Any]:
    """The module that turns pixels into tokens, with its parent and its name there."""
    for path, module in model.named_modules():
        if hasattr(module, "patch_embeddings") or isinstance(getattr(module, "patch_embedding", None), nn.Conv2d):
            parent, _, name = path.rpartition(".")
            return model.get_submodule(parent), name, module
    raise EpitaxyError(f"{source}: cannot tell where {type(model).__name__} keeps the positions of its patches")


def _table(embeddings: Any) -> Tensor | None:
    """The position table as ``1 n d``."""
    found = getattr(embeddings, "position_embeddings", None)
    if found is None and isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding):
        found = embeddings.position_embedding.weight[None]
    return found.detach() if isinstance(found, Tensor) else None


def _has_switch(embeddings: Any) -> bool:
    """Whether its table fits one size unless told otherwise; others interpolate whenever they have to."""
    return "interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters


def _require_windows(config: Any, window: int, pixels: int, patch: int, source: str) -> None:
    smallest = window * patch * 2 ** (len(config.depths) - 1)
    if pixels < smallest:
        raise EpitaxyError(
            f"{source}: the last stage of {config.model_type} has windows of {window} x {window} patches, so its "
            f"pictures have at least {smallest} pixels on a side, got {pixels}"
        )


def _rebuilt(embeddings: Any, config: Any, table: Tensor, side: int) -> nn.Module:
    """The same embeddings, built for the new size and filled with the old weights and the new table."""
    state = dict(embeddings.state_dict())
    special = table.shape[1] - int(
        embeddings.patch_embeddings.num_patches if hasattr(embeddings, "patch_embeddings") else embeddings.num_patches
    )
    wide = interpolate_table(table, special, side)
    with torch.random.fork_rng(devices=[]):  # its first values are thrown away, and must not move other draws
        new: Any = type(embeddings)(config)
    key = "position_embeddings" if "position_embeddings" in state else "position_embedding.weight"
    state[key] = wide if key == "position_embeddings" else wide[0]
    old = next(iter(embeddings.parameters()))
    new.load_state_dict(state)
    return new.to(old.device, old.dtype).train(embeddings.training).requires_grad_(old.requires_grad)  # type: ignore[no-any-return]
