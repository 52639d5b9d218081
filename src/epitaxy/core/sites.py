"""Sites: the places of one model where a method asked to sit, found by role or by module-path pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from epitaxy.core.anatomy import TYPE_ROLES, Anatomy, Spot, base_modules
from epitaxy.core.errors import SiteError, UnsupportedError, nearest
from epitaxy.core.kinds import is_bypassed, is_linear, is_norm, linear_sizes, weight_of


@dataclass(frozen=True)
class Site:
    """One place for an edit.

    ``key`` addresses the site by role and number (``attention.q.3``), independent of module paths, so that files
    survive a renaming; ``index`` and ``count`` are its position among the sites the method asked for;
    ``hidden_width`` is the width of the model's last hidden states, ``patch`` the number of positions in a patch,
    ``stream`` the module that receives the residual stream on its way here, ``stream_eps`` the eps of it where it is a
    layer norm.
    """

    key: str
    role: str
    path: str
    module: nn.Module = field(repr=False)
    layer: int | None
    index: int
    count: int
    width_in: int | None
    width: int | None
    heads: int | None
    entry: str | None
    parts: Mapping[str, nn.Module] = field(repr=False)
    part_paths: Mapping[str, str] = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    last_path: str = ""
    hidden_width: int | None = None
    patch: int | None = None
    causal: bool = False
    stream: str | None = None
    stream_eps: float | None = None

    def require_width(self) -> int:
        """Width of the features at this site; raises ``SiteError`` where it cannot be told from the weights."""
        if self.width is None:
            raise SiteError(f"cannot tell the feature width of {self.path!r} ({type(self.module).__name__})")
        return self.width

    def require_stream(self) -> str:
        """Path of the module that receives the residual stream on its way to this sub-layer, such as its norm.

        Raises ``UnsupportedError`` where none is known.
        """
        if self.stream is None:
            raise UnsupportedError(
                f"reads: at {self.path!r} no norm is known that receives the residual stream, expected a sub-layer "
                "whose norm the layout names and that sees the tokens in the order of the stream; use reads='sublayer'"
            )
        return self.stream

    def reduced(self, rate: float) -> int:
        """Hidden width ``round(width / rate)``, halves to even as Python rounds; raises ``SiteError`` where it is 0."""
        width = self.require_width()
        if not rate > 0 or round(width / rate) < 1:
            raise SiteError(
                f"reduction: a width of {width} divided by {rate:g} leaves no hidden unit at {self.path!r}; "
                f"expected a rate between 0 and {2 * width}"
            )
        return round(width / rate)

    def refuse_causal(self) -> None:
        """Raise ``UnsupportedError`` where mixing neighbouring tokens would let a token see later ones."""
        if self.causal:
            raise UnsupportedError(
                f"a convolution over tokens cannot sit at {self.path!r}: it would let tokens of this causal block "
                "see later ones"
            )


def select(
    model: nn.Module, anatomy: Anatomy, at: str | Sequence[str], layers: Sequence[int] | None = None
) -> list[Site]:
    """Return the sites of ``model`` that ``at`` names, in network order, each module once.

    ``at`` is a role, a pattern of roles (``attention.*``), a module path, its ending, or a pattern of paths, or a
    list of these; ``=path`` is that one module, even where a role or another module's ending has the same name.
    ``layers`` keeps only some blocks (negative numbers count from the last).  Every entry must match: otherwise
    ``SiteError`` names the nearest roles and paths.
    """
    wanted = (at,) if isinstance(at, str) else tuple(at)
    if not wanted:
        raise SiteError("`at` is empty: name at least one role or module path")
    modules = base_modules(model)
    found: dict[str, tuple[str, Spot]] = {}
    for entry in wanted:
        for role, spot in _matches(entry, anatomy, modules):
            found.setdefault(spot.path, (role, spot))
    chosen = _keep_layers(list(found.values()), anatomy, layers)
    order = {path: position for position, path in enumerate(modules)}
    chosen.sort(key=lambda pair: order[pair[1].path])
    _refuse_bypassed(chosen, modules)
    last = chosen[-1][1].path
    return [_site(role, spot, index, len(chosen), last, anatomy, modules) for index, (role, spot) in enumerate(chosen)]


def _matches(entry: str, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> list[tuple[str, Spot]]:
    if entry in anatomy.roles:
        return [(entry, spot) for spot in anatomy.roles[entry]]
    if any(symbol in entry for symbol in "*?["):
        roles = [role for role in anatomy.roles if fnmatchcase(role, entry)]
        if roles:
            return [(role, spot) for role in roles for spot in anatomy.roles[role]]
        paths = [path for path in modules if path and fnmatchcase(path, entry)]
    elif entry.startswith("="):
        paths = [path for path in modules if path and path == entry[1:]]
    else:
        paths = [path for path in modules if path == entry or path.endswith("." + entry)]
    if not paths and entry in TYPE_ROLES:
        raise SiteError(f"{anatomy.family} has no module of the kind {entry!r}")
    if not paths:
        endings = {path.rpartition(".")[2] for path in modules}
        names = [*anatomy.roles, *(name for name in endings if not name.isdigit()), *modules]
        hint = nearest(entry, [name for name in names if name])
        if hint.startswith("; known"):
            hint = f"; its roles are {', '.join(sorted(anatomy.roles))}"
        raise SiteError(f"{entry!r} matches no role and no module of {anatomy.family}{hint}")
    known = {spot.path: spot for spots in anatomy.roles.values() for spot in spots}
    return [("path", known.get(path, Spot(path))) for path in paths]


def _keep_layers(
    pairs: list[tuple[str, Spot]], anatomy: Anatomy, layers: Sequence[int] | None
) -> list[tuple[str, Spot]]:
    if layers is None:
        return pairs
    total = len(anatomy.roles.get("block", ()))
    wrong = [layer for layer in layers if not -total <= layer < total]
    if wrong or not layers:
        raise SiteError(f"layers {list(layers)} do not exist: {anatomy.family} has {total} blocks, 0 to {total - 1}")
    keep = {layer % total for layer in layers}
    pairs = [(role, spot) for role, spot in pairs if spot.layer in keep]
    if not pairs:
        raise SiteError(f"no site lies in layers {sorted(keep)}: the chosen role is outside the blocks")
    return pairs


def _refuse_bypassed(pairs: list[tuple[str, Spot]], modules: Mapping[str, nn.Module]) -> None:
    for role, spot in pairs:
        owner, _, name = spot.path.rpartition(".")
        parent = modules.get(owner)
        if is_bypassed(parent, name):
            kind = (
                "torch's nn.MultiheadAttention" if isinstance(parent, nn.MultiheadAttention) else type(parent).__name__
            )
            raise SiteError(
                f"{spot.path!r} is inside {kind}, which reads its weights without calling the "
                "module, so nothing placed there would ever run; choose the attention module itself"
            )
        if role == "head" and f"{spot.path}_dist" in modules:
            raise SiteError(
                f"the outputs of {spot.path!r} and '{spot.path}_dist' are averaged, and a head would replace only one "
                "of them; use the model without a distillation head"
            )


def _site(
    role: str,
    spot: Spot,
    index: int,
    count: int,
    last: str,
    anatomy: Anatomy,
    modules: Mapping[str, nn.Module],
) -> Site:
    module = modules[spot.path]
    sees = modules[spot.entry] if spot.entry else module
    parts = {name: modules[path] for name, path in spot.parts.items()}
    incoming = width_in(sees)
    outgoing = width_out(parts.get("output", module))  # an attention layer may hold other linear maps after it
    width = outgoing or incoming
    block = anatomy.block_of(spot.path)
    return Site(
        key=anatomy.keys.get(spot.path, spot.path),
        role=role,
        path=spot.path,
        module=module,
        layer=spot.layer,
        index=index,
        count=count,
        width_in=incoming or width,
        width=width,
        heads=spot.heads,
        entry=spot.entry,
        parts=parts,
        part_paths=spot.parts,
        anatomy=anatomy,
        last_path=last,
        hidden_width=None if anatomy.last is None else width_out(modules[anatomy.last]),
        patch=_patch_size(anatomy, modules),
        causal=block is not None and block.causal,
        stream=spot.stream,
        stream_eps=_eps(modules[spot.stream]) if spot.stream is not None else None,
    )


def _eps(module: nn.Module) -> float | None:
    return module.eps if isinstance(module, nn.LayerNorm) else None


def _patch_size(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> int | None:
    """Positions (pixels, time-frequency bins) of a patch, from the convolution that embeds patches."""
    for spot in anatomy.roles.get("patch", ()):
        kernel = getattr(modules[spot.path], "kernel_size", None)
        if isinstance(kernel, tuple):
            return math.prod(kernel)
    return None


def width_in(module: nn.Module) -> int | None:
    """Features a module takes in, told from its weights; None where it cannot be told."""
    if is_linear(module):
        return linear_sizes(module)[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels
    return _inner(module, first=True)


def width_out(module: nn.Module) -> int | None:
    """Features a module gives out, told from its weights; None where it cannot be told."""
    if is_linear(module):
        return linear_sizes(module)[1]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.out_channels
    return _inner(module, first=False)


def _inner(module: nn.Module, first: bool) -> int | None:
    """Width of a composite: a norm's own, else that of its first linear map's input (or its last one's output)."""
    if is_norm(module):
        return int(weight_of(module).shape[0])
    linears = [inner for name, inner in module.named_modules() if is_linear(inner) and "epitaxy" not in name.split(".")]
    if not linears:
        return None
    return width_in(linears[0]) if first else width_out(linears[-1])
