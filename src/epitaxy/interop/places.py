"""From module paths back to roles: how a user would have said where an imported adapter sits."""

from __future__ import annotations

from torch import nn

from epitaxy.core.anatomy import Anatomy
from epitaxy.core.sites import select


def where(model: nn.Module, anatomy: Anatomy, paths: list[str]) -> tuple[str | tuple[str, ...], tuple[int, ...] | None]:
    """``at`` and ``layers`` that name exactly ``paths``: by role where roles fit, else path by path."""
    wanted = set(paths)
    at, rest = _roles(anatomy, wanted, None)
    layers = None
    if rest:
        numbers = {spot.path: spot.layer for spots in anatomy.roles.values() for spot in spots}
        present = {number for path in wanted if (number := numbers.get(path)) is not None}
        narrow, left = _roles(anatomy, wanted, present)
        if narrow and not left:
            at, rest, layers = narrow, left, tuple(sorted(present))
    for path in sorted(rest):
        matches = {site.path for site in select(model, anatomy, path)}
        at.append(path if matches == {path} else f"={path}")
    return at[0] if len(at) == 1 else tuple(at), layers


def _roles(anatomy: Anatomy, wanted: set[str], layers: set[int] | None) -> tuple[list[str], set[str]]:
    """Roles whose places, in these layers, all lie in ``wanted``; and what they leave over."""
    chosen, rest = [], set(wanted)
    ordered = sorted(anatomy.roles.items(), key=lambda item: (-len(item[1]), -len(item[0]), item[0]))
    for role, spots in ordered:
        places = {spot.path for spot in spots if layers is None or spot.layer in layers}
        if places and places <= wanted and places & rest:
            chosen.append(role)
            rest -= places
    return chosen, rest
