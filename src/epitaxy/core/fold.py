"""Fold: an adapter becomes part of its model's own feed-forwards, and nothing of it is left beside them.

A parallel bottleneck with the activation of the feed-forward is r more hidden units of it.  With ``W1, b1, W2, b2``
the feed-forward, ``D, b, U, c`` the adapter and ``s`` its factor, ``[W2, s U] g([W1; D] n + [b1; b]) + b2 + s c`` is
the sum of both.  An adapter that reads the residual stream through a norm of its own needs the affine parts of both
norms moved into the matrices: with weight and bias ``g2, h2`` of the model's norm and ``ga, ha`` of the adapter's,
``W1 g2``, ``W1 h2 + b1``, ``D ga``, ``D ha + b``, after which the model's norm keeps weight one and bias zero; both
norms must have one eps.  What merges (LoRA, BitFit, norms, heads) is merged into the same model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.anatomy import Anatomy
from epitaxy.core.edits import Branch, Edit, Replace
from epitaxy.core.errors import StateError, UnsupportedError
from epitaxy.core.feed_forward import FeedForward, feed_forwards, random_stream
from epitaxy.core.hidden_units import ACTIVATIONS, HiddenUnits, OffersHiddenUnits
from epitaxy.core.host import activate, detach, require, require_one, unwrap
from epitaxy.core.merge import TOLERANCES, refuse_tied, write
from epitaxy.core.registry import methods_in
from epitaxy.core.wider import Width, widened


@dataclass(frozen=True)
class Extra:
    """Units of one branch for one feed-forward; ``factor`` is the branch's scale, ``stream`` says what it reads."""

    units: HiddenUnits
    factor: float
    stream: bool


@torch.no_grad()
def fold(model: nn.Module, name: str | None = None) -> nn.Module:
    """A copy of ``model`` in its own class in which the adapter ``name`` is part of the weights; no adapter is left.

    Bottlenecks beside a feed-forward become hidden units of it, in all feed-forwards of one width (blocks without an
    adapter get units of zero weight), and the copy's config says so; the rest of the adapter is merged.  Adapters
    merged into the model before stay merged; the others are dropped.  The model itself does not change.  Every folded
    feed-forward is compared with the adapted one on random inputs.  Raises ``UnsupportedError`` naming the part that
    neither merges nor folds.
    """
    model = unwrap(model)
    record, name = require_one(model, name, "fold")
    if name in record.state.merged:
        raise StateError(f"adapter {name!r} is merged already; unmerge it to fold it")
    for key, tensor in record.adapters[name].tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"adapter {name!r} is not folded: {key} holds NaN or infinite values")
    twin = copy.deepcopy(model)
    try:
        _fold(twin, name)
    except UnsupportedError as error:
        raise UnsupportedError(f"adapter {name!r} cannot be folded: {error}") from None
    return twin


def fold_obstacle(method: Any) -> str | None:
    """Why a method or composition folds into no model; None where it depends on the model.

    A method says it by an attribute ``fold_obstacle``; one without it folds if it merges.
    """
    for part in methods_in(method):
        reason = part.cannot.get("merge")
        if reason is not None:
            reason = getattr(part, "fold_obstacle", reason)
        if reason is not None:
            return f"{part.method_name}: {reason}"
    return None


def _fold(twin: nn.Module, name: str) -> None:
    record = require(twin)
    anatomy, feeds = record.anatomy, list(feed_forwards(record.anatomy))
    extras, merges = _sorted(twin, record.adapters[name], feeds)
    touched = [feed for feed in feeds if feed.path in extras]
    training = {module: module.training for module in twin.modules()}
    twin.eval()
    record.state.route = None
    activate(twin, name)
    before = [_result(twin, feed) for feed in touched]
    for path, edit in merges:
        host = twin.get_submodule(path)
        for key, value in edit.merged(host).items():
            write(host, key, value)
        if isinstance(edit, Replace):
            _count_labels(twin, host)
    record.state.merged = ()
    record.stash.clear()
    detach(twin)
    if touched:
        _grow(twin, anatomy, feeds, extras)
    for feed, expected in zip(touched, before, strict=True):
        _compare(twin, feed, expected)
    for module in twin.modules():
        module.training = training.get(module, False)


def _sorted(
    twin: nn.Module, adapter: Adapter, feeds: Sequence[FeedForward]
) -> tuple[dict[str, list[Extra]], list[tuple[str, Edit]]]:
    """The units for each feed-forward, by its path, and the (path, edit) pairs that merge."""
    places = {feed.path: feed for feed in feeds}
    reasons = {part.method_name: part.cannot.get("merge") for part in methods_in(adapter.method)}
    extras: dict[str, list[Extra]] = {}
    merges: list[tuple[str, Edit]] = []
    for piece in adapter.pieces:
        if piece.key is None:  # a tap, which goes with its edit
            continue
        edit, where = piece.module, f"{piece.part} at {piece.path!r}" if piece.path else piece.part
        if not isinstance(edit, Edit):
            raise UnsupportedError(f"{where} neither merges nor folds: what a generator adds needs a context")
        units = edit.module if isinstance(edit, Branch) and isinstance(edit.module, OffersHiddenUnits) else None
        try:
            if isinstance(edit, Branch) and units is not None:
                extra = _extra(twin, edit, units.hidden_units(), places.get(piece.path))
                extras.setdefault(piece.path, []).append(extra)
                continue
            host = twin.get_submodule(piece.path)
            edit.mergeable_into(host)
            refuse_tied(twin, host, piece.path)
        except UnsupportedError as error:
            reason = None if units is not None else reasons.get(re.sub(r"_\d+$", "", piece.part))
            raise UnsupportedError(f"{where} neither merges nor folds: {reason or error}") from None
        merges.append((piece.path, edit))
    return extras, merges


def _extra(twin: nn.Module, edit: Branch, units: HiddenUnits, feed: FeedForward | None) -> Extra:
    """The units of one branch; raises where they are not hidden units of the feed-forward beside it."""
    if edit.reads == "output" or edit.writes != "output" or not edit.keep or edit.residual:
        raise UnsupportedError("only a parallel bottleneck without a residual is more hidden units of a feed-forward")
    if feed is None:
        raise UnsupportedError("it does not stand beside a feed-forward of two linear maps")
    stream = edit.reads == "stream" and feed.norm is not None
    if stream:
        _check_norms(twin, units, feed)
    elif units.norm is not None:
        raise UnsupportedError("it normalises what the feed-forward reads as it is")
    return Extra(units, float(edit.scale), stream)


def _check_norms(twin: nn.Module, units: HiddenUnits, feed: FeedForward) -> None:
    assert feed.norm is not None
    norm = twin.get_submodule(feed.norm)
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise UnsupportedError(f"{feed.norm!r} is no layer norm with weight and bias, found {type(norm).__name__}")
    refuse_tied(twin, norm, feed.norm)
    if units.norm is None:
        raise UnsupportedError("it reads the residual stream without a norm, and the feed-forward reads it with one")
    if units.norm.eps != norm.eps:
        raise UnsupportedError(
            f"its norm has the eps {units.norm.eps:g}, expected {norm.eps:g} as in {feed.norm!r}, which both share then"
        )


def _count_labels(twin: Any, head: Any) -> None:
    """A merged head of other labels changes their number in the config."""
    config: Any = getattr(twin, "config", None)
    if getattr(config, "num_labels", head.out_features) != head.out_features:
        config.num_labels = head.out_features
        if isinstance(getattr(twin, "num_labels", None), int):
            twin.num_labels = head.out_features


def _grow(
    twin: nn.Module, anatomy: Anatomy, feeds: Sequence[FeedForward], extras: Mapping[str, Sequence[Extra]]
) -> None:
    """Give every feed-forward the width that the model's class gives it, and the units that belong in it."""
    widths = []
    for feed in feeds:
        count = 0
        for extra in extras.get(feed.path, ()):
            count += extra.units.down.shape[0]
            _check_activation(twin, feed, extra.units.activation)
        if any(extra.stream for extra in extras.get(feed.path, ())):
            _refuse_shared_norm(anatomy, feed)
        up = twin.get_submodule(feed.up)
        if isinstance(up, nn.Linear):
            widths.append(Width(feed.up, feed.down, up.in_features, up.out_features, up.out_features + count))
    sizes = widened(twin, widths)
    for feed in feeds:
        if feed.up in sizes:
            _enlarge(twin, feed, extras.get(feed.path, ()), sizes[feed.up])


def _check_activation(twin: nn.Module, feed: FeedForward, name: str) -> None:
    for path, linear in zip((feed.up, feed.down), feed.linears(twin), strict=True):
        refuse_tied(twin, linear, path)
    if not feed.applies(twin, ACTIVATIONS[name]):
        raise UnsupportedError(
            f"its activation is {name!r}, and the feed-forward at {feed.path!r} is not two linear maps with exactly "
            f"that between them (it has {feed.between(twin)})"
        )


def _refuse_shared_norm(anatomy: Anatomy, feed: FeedForward) -> None:
    readers = [role for role, spots in anatomy.roles.items() for spot in spots if spot.stream == feed.norm]
    if len(readers) > 1:
        raise UnsupportedError(f"{feed.norm!r} stands before {' and '.join(readers)}, so its weights cannot be moved")


def _enlarge(twin: nn.Module, feed: FeedForward, extras: Sequence[Extra], size: int) -> None:
    """Write the units of ``extras`` into one feed-forward and fill up to ``size`` units with zeros."""
    up, down = feed.linears(twin)
    weight, bias = up.weight.double(), up.bias.double()
    rows, shifts = [weight], [bias]
    columns, offset = [down.weight.double()], down.bias.double()
    for extra in extras:
        units = extra.units
        rows.append(units.down.to(weight))
        shifts.append(units.down_bias.to(weight))
        columns.append(units.up.to(weight) * extra.factor)
        offset = offset + units.up_bias.to(weight) * extra.factor
    if any(extra.stream for extra in extras):
        assert feed.norm is not None
        own = twin.get_submodule(feed.norm)
        norms = [own, *(extra.units.norm if extra.stream else own for extra in extras)]
        for number, norm in enumerate(norms):
            assert isinstance(norm, nn.LayerNorm)
            shifts[number] = shifts[number] + rows[number] @ norm.bias.to(weight)
            rows[number] = rows[number] * norm.weight.to(weight)
        assert isinstance(own, nn.LayerNorm)
        own.weight.fill_(1)
        own.bias.zero_()
    missing = size - sum(len(shift) for shift in shifts)
    rows.append(weight.new_zeros(missing, weight.shape[1]))
    shifts.append(weight.new_zeros(missing))
    columns.append(weight.new_zeros(columns[0].shape[0], missing))
    write(up, "weight", torch.cat(rows))
    write(up, "bias", torch.cat(shifts))
    write(down, "weight", torch.cat(columns, dim=1))
    write(down, "bias", offset)


def _result(model: nn.Module, feed: FeedForward) -> Tensor:
    """What norm and feed-forward, with what stands beside them, give for a random residual stream."""
    x = random_stream(model, feed)
    if feed.norm is not None:
        x = model.get_submodule(feed.norm)(x)
    return feed.run(model, x)


def _compare(twin: nn.Module, feed: FeedForward, expected: Tensor) -> None:
    found = _result(twin, feed)
    drift = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    tolerance = TOLERANCES.get(found.dtype, 1e-2)
    if not drift <= tolerance:
        raise UnsupportedError(
            f"at {feed.path!r} the folded feed-forward would differ by {drift:.1e} (relative), more than the tolerance "
            f"{tolerance:.1e}"
        )


__all__ = ["fold", "fold_obstacle"]
