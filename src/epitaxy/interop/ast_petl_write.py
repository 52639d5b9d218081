"""State dicts for the code of PETL-AST, out: the whole model, as its classes load it."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.edits import Swap
from epitaxy.core.errors import FormatError, UnsupportedError
from epitaxy.core.files import whole_tensors
from epitaxy.core.host import require
from epitaxy.core.storage import write_atomically
from epitaxy.interop.ast_petl_base import base_names, base_tensors
from epitaxy.interop.ast_petl_names import COUNTER, ENTRIES, HEAD, PREFIXES, Style, links
from epitaxy.interop.ast_petl_state import FILE
from epitaxy.interop.peft_config import base_value
from epitaxy.interop.state_dicts import read_state


def write(model: nn.Module, target: Path, name: str) -> None:
    """Write the whole state dict that the published code loads, as ``ast_petl.pt`` in the directory ``target``."""
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target}: expected a directory to save into, found a file")
    adapter = require(model, name).adapters[name]
    tensors = official(model, adapter)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(target / FILE, buffer.getvalue())
    again = read_state(target / FILE)
    if again.keys() != tensors.keys() or any(not torch.equal(again[key], tensors[key]) for key in tensors):
        raise FormatError(f"{target / FILE}: what was written does not read back; the disk may be full or failing")


def official(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of the published model class with this adapter: base, adapter, head, under both prefixes.

    Raises ``UnsupportedError`` naming what that code has no equal of.  The LoRA scale is not part of it.
    """
    names = base_names(model)
    style = _style(adapter)
    trunk = {key: base_value(model, path, leaf) for key, (path, leaf) in base_tensors(model, names).items()}
    own, top = dict[str, Tensor](), dict[str, Tensor]()
    values = whole_tensors(adapter)
    for link in links(adapter, names, style):
        for key, part in zip(link.theirs, link.split(values[link.ours]), strict=True):
            (top if key.startswith(HEAD) or ENTRIES["prompt"].pattern.fullmatch(key) else own)[key] = part.contiguous()
    for piece in adapter.pieces:
        if isinstance(piece.module, Swap) and not piece.module.absolute and piece.path in names:
            merged = piece.module.merged(model.get_submodule(piece.path))
            own.update({f"{names[piece.path]}.{leaf}": value.detach().cpu() for leaf, value in merged.items()})
    if f"{HEAD}.weight" not in top:
        raise UnsupportedError(
            f"adapter {adapter.name!r} cannot be written for the code of PETL-AST: it has no head that pools; "
            "add Head(pool='all')"
        )
    counters = {
        key.replace("bnorm.weight", COUNTER): torch.tensor(style.batches) for key in own if "bnorm.weight" in key
    }
    trunk.update(own | counters)
    return {f"{prefix}{key}": value for prefix in style.aliases for key, value in trunk.items()} | top


def _style(adapter: Adapter) -> Style:
    """How to spell the keys: as in the file the adapter came from, else as the published main classes do."""
    given = adapter.provenance.get("official")
    if isinstance(given, dict) and given.keys() == asdict(Style()).keys():
        return Style(**{**given, "aliases": tuple(given["aliases"])})
    roles = {piece.role for piece in adapter.pieces if piece.part.startswith("lora")}
    mixed = {piece.role for piece in adapter.pieces if piece.part.startswith(("dense_moa", "soft_moa")) and piece.key}
    prompts = any(piece.part.startswith("prompt") for piece in adapter.pieces)
    return Style(
        upper=not roles <= {"attention.q", "attention.v"},
        single=len(mixed) == 1,
        aliases=("",) if prompts else PREFIXES,
    )


__all__ = ["official", "write"]
