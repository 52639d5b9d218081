"""An adapter: a named bundle of edits to one model, an optional generator, and the config that made them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from epitaxy.core.edits import Edit
from epitaxy.core.errors import SiteError
from epitaxy.core.registry import methods_in, to_config
from epitaxy.core.sites import Site


@dataclass
class Piece:
    """One module of an adapter and where it stands.

    ``key`` names it in files; pieces without parameters (taps, strips) have none and are rebuilt from the config.
    """

    path: str
    slot_key: str
    module: nn.Module
    key: str | None
    part: str
    role: str = ""


@dataclass(eq=False)
class Adapter:
    """What ``attach`` and ``load`` return.

    ``name`` and ``method`` as given; ``pieces`` in network order.  Set ``trainable`` to freeze or unfreeze it.
    """

    name: str
    method: Any
    pieces: list[Piece] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    _trainable: bool = True

    @property
    def trainable(self) -> bool:
        """Whether its parameters ask for gradients: the only thing that decides it."""
        return self._trainable

    @trainable.setter
    def trainable(self, flag: bool) -> None:
        self._trainable = bool(flag)
        for parameter in self.parameters():
            parameter.requires_grad_(self._trainable)

    @property
    def edits(self) -> list[Edit]:
        """The edits that hold parameters."""
        return [piece.module for piece in self.pieces if piece.key is not None and isinstance(piece.module, Edit)]

    @property
    def config(self) -> list[dict[str, Any]]:
        """The methods and their fields as plain data."""
        return to_config(self.method)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key in files, parameter), such as ``lora.attention.q.3.down``."""
        for piece in self.pieces:
            if piece.key is not None:
                for name, parameter in piece.module.named_parameters():
                    yield f"{piece.key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Everything a file stores: parameters and buffers by key, detached, as they lie in memory."""
        return {
            f"{piece.key}.{name}": tensor.detach()
            for piece in self.pieces
            if piece.key is not None
            for name, tensor in piece.module.state_dict(keep_vars=True).items()
        }

    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        parts = " + ".join(part.method_name for part in methods_in(self.method))
        return f"Adapter({self.name!r}, {parts}, {self.size():,} parameters, {len(self.edits)} edits)"


def build(method: Any, sites_of: Any) -> list[Piece]:
    """Make every piece of ``method`` without touching a model; ``sites_of(part)`` returns the sites of one method.

    What ``shared(sites)`` of a method returns, where it has one, its ``edits`` receive beside the site.
    """
    pieces: list[Piece] = []
    counts: dict[str, int] = {}
    for part in methods_in(method):
        counts[part.method_name] = counts.get(part.method_name, 0) + 1
        number = counts[part.method_name]
        name = part.method_name if number == 1 else f"{part.method_name}_{number}"
        sites: list[Site] = sites_of(part)
        shared = (part.shared(sites),) if callable(getattr(part, "shared", None)) else ()
        before = len(pieces)
        for site in sites:
            try:
                for position, edit in enumerate(part.edits(site, *shared)):
                    pieces.extend(_pieces_of(edit, site, name, position))
            except SiteError as error:
                if repr(site.path) in str(error):
                    raise
                where = repr(site.path) if site.path else "the model itself"
                raise SiteError(f"{where}: {error}") from None
        if callable(getattr(part, "generator", None)):
            pieces.append(Piece("", f"{name}_generator", part.generator(sites), f"{name}.generator", name))
        if len(pieces) == before:
            raise SiteError(f"method {part.method_name!r} placed nothing at {part.at!r}")
    return pieces


def _pieces_of(edit: Edit, site: Site, part: str, position: int) -> list[Piece]:
    key = f"{part}.{site.key}" + (f".{position}" if position else "")
    slot_key = key.replace(".", "_")
    pieces = []
    for number, (path, module) in enumerate(edit.placements(site)):
        owned = key if module is edit else None
        pieces.append(
            Piece(path, slot_key if module is edit else f"{slot_key}_{number}", module, owned, part, site.role)
        )
    if not any(piece.module is edit for piece in pieces):
        pieces.insert(0, Piece(site.path, slot_key, edit, key, part, site.role))
    return pieces
