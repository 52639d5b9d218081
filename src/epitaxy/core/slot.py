"""The slot: a child module of a host that holds the edits of every adapter there, and the hooks that apply them.

The hooks are plain functions that read ``host.epitaxy``; they capture nothing, so models can be deep-copied, pickled
and compiled.  A slot computes nothing when it is called itself, so that it may stand inside ``nn.Sequential`` hosts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.edits.delta import Delta, route_deltas
from epitaxy.core.edits.edit import Edit, first_tensor, output_tensor, with_first, with_output
from epitaxy.core.errors import UnsupportedError
from epitaxy.core.route import Route


class State:
    """What is switched on in one model; all its slots share this object."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.route: Route | None = None
        self.interface: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that take part in the next forward call, numbered as in the route."""
        if self.route is not None:
            return self.route.names
        return self.active


class Slot(nn.Module):
    """Edits by adapter name; ``slot.<adapter>`` is an ``nn.ModuleDict`` of them."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Any = None) -> Any:
        return x

    def add(self, adapter: str, key: str, edit: nn.Module) -> None:
        """Put ``edit`` under ``adapter``; names of modules and attributes of the class cannot collide with it."""
        if adapter not in self._modules:
            self._modules[adapter] = nn.ModuleDict()
        edits = self._modules[adapter]
        assert isinstance(edits, nn.ModuleDict)
        assert key not in edits
        edits[key] = edit

    def edits(self, adapter: str) -> list[Edit]:
        """Edits of one adapter at this host, in the order they were added."""
        found = self._modules.get(adapter)
        return [] if found is None else [edit for edit in found._modules.values() if isinstance(edit, Edit)]

    def live(self) -> list[tuple[int, Edit]]:
        """(adapter number, edit) for everything that takes part in the next call."""
        return [(number, edit) for number, name in enumerate(self.state.names) for edit in self.edits(name)]

    def whole(self, kind: type[Edit]) -> list[dict[int, Edit]]:
        """The live edits of one kind, by adapter number; a further group where an adapter has several here."""
        return _groups(self.live(), kind)


def input_hook(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every host."""
    slot = host._modules["epitaxy"]
    assert isinstance(slot, Slot)
    if not slot.state.names:
        return None
    live = [(number, edit) for number, edit in slot.live() if edit.acts_before]
    if not live:
        return None
    route, call = slot.state.route, (args, kwargs)
    for kind in dict.fromkeys(type(edit) for _, edit in live if not edit.rowwise):
        for group in _groups(live, kind):
            call = kind.rewrite_input(group, route, host, call)
    for number, edit in live:
        if not edit.rowwise:
            continue
        x = first_tensor(call)
        if route is None:
            call = with_first(call, edit.before(host, x))
            continue
        members = route.members(number, x.shape[0], x.device)
        edit.rows(members)
        call = with_first(call, _put(x, members, edit.before(host, x[members])))
    return call


def output_hook(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of every host."""
    slot = host._modules["epitaxy"]
    assert isinstance(slot, Slot)
    if not slot.state.names:
        return None
    live = [(number, edit) for number, edit in slot.live() if edit.acts_after]
    if not live:
        return None
    route, call = slot.state.route, (args, kwargs)
    rowwise = [(number, edit) for number, edit in live if edit.rowwise]
    if rowwise:
        x, y = first_tensor(call), output_tensor(output)
        y = _apply(rowwise, host, x, y) if route is None else _apply_routed(rowwise, route, host, x, y)
        output = with_output(output, y)
    kinds = dict.fromkeys(type(edit) for _, edit in live if not edit.rowwise)
    for kind in (*(kind for kind in kinds if not kind.late), *(kind for kind in kinds if kind.late)):
        for group in _groups(live, kind):
            output = kind.rewrite_output(group, route, host, call, output)
    return output


def _groups(live: list[tuple[int, Edit]], kind: type[Edit]) -> list[dict[int, Edit]]:
    groups: list[dict[int, Edit]] = []
    for number, edit in live:
        if type(edit) is not kind:
            continue
        for group in groups:
            if number not in group:
                group[number] = edit
                break
        else:
            groups.append({number: edit})
    return groups


def _apply(live: list[tuple[int, Edit]], host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    for _, edit in live:
        y = edit.after(host, x, y)
    return y


def _apply_routed(live: list[tuple[int, Edit]], route: Route, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    deltas = {number: edit for number, edit in live if isinstance(edit, Delta) and _stackable(edit)}
    if len(deltas) == len(live):
        return route_deltas(deltas, route, host, x, y)
    size = y.shape[0]
    parts: list[tuple[Tensor, Tensor]] = []
    for number in dict.fromkeys(number for number, _ in live):
        members = route.members(number, size, y.device)
        rows = y[members]
        for other, edit in live:
            if other == number and edit.needs_batch(host):
                rows = edit.after(host, x, _put(y, members, rows))[members]
            elif other == number:
                edit.rows(members)
                rows = edit.after(host, x[members], rows)
        parts.append((members, rows))
    if all(rows.shape[1:] == y.shape[1:] for _, rows in parts):
        for members, rows in parts:
            y = _put(y, members, rows)
        return y
    return _assemble(parts, y)


def _assemble(parts: list[tuple[Tensor, Tensor]], y: Tensor) -> Tensor:
    """Outputs of another size than the base's (task heads): every row must have one, and of one size."""
    order = torch.cat([members for members, _ in parts])
    sizes = {tuple(rows.shape[1:]) for _, rows in parts}
    if order.numel() < y.shape[0]:
        sizes.add(tuple(y.shape[1:]))
    if len(sizes) > 1:
        raise UnsupportedError(
            f"the rows of this batch give outputs of different sizes {sorted(sizes)}: "
            "adapters routed in one batch need heads of one size"
        )
    return torch.cat([rows for _, rows in parts])[order.argsort()]


def _stackable(edit: Delta) -> bool:
    return edit.own and not (edit.dropout and edit.training)


def _put(x: Tensor, members: Tensor, rows: Tensor) -> Tensor:
    return x.index_copy(0, members, rows.to(x.dtype))


__all__ = ["Slot", "State", "input_hook", "output_hook"]
