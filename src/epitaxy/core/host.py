"""One model and its adapters: attach, detach, activate, route.

Everything we add to a model is: a child called ``epitaxy`` on each host module, two hooks there, and one record in
the model's ``__dict__``.  The base keeps its class, its module paths and its state-dict keys.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core import attention, fused
from epitaxy.core.adapter import Adapter, Piece, build
from epitaxy.core.anatomy import INTERFACE_PREFIX, Anatomy, Layout, base_modules, describe
from epitaxy.core.edits import Edit
from epitaxy.core.edits.tokens import KeyMask, Tokens
from epitaxy.core.errors import StateError, UnsupportedError, nearest
from epitaxy.core.registry import check_fields
from epitaxy.core.route import Route
from epitaxy.core.sites import select
from epitaxy.core.slot import Slot, State, input_hook, output_hook

RECORD = "_epitaxy"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")


class Hosted:
    """The record of one model: its adapters, what is switched on, and what must come back at the end."""

    def __init__(self, model: nn.Module, layout: Layout | None) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.state = State()
        self.layout = layout
        self.anatomy: Anatomy = describe(model, layout)
        self.asked_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.stash: dict[str, dict[str, Tensor]] = {}
        self.counting: list[str] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.state.interface is not None:  # unpickled, perhaps in a process that never attached anything
            attention.register()


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.Module):
            return model
        else:
            parts = [
                name for name in ("unet", "transformer", "model") if isinstance(getattr(model, name, None), nn.Module)
            ]
            hint = f"; pass its part .{parts[0]}" if parts else ""
            raise StateError(f"expected a model (a torch.nn.Module), found {type(model).__name__}{hint}")


def hosted(model: nn.Module) -> Hosted | None:
    """The record of ``model``, or None when nothing is attached."""
    return unwrap(model).__dict__.get(RECORD)


def require(model: nn.Module, name: str | None = None) -> Hosted:
    """The record of ``model``; raises ``StateError`` when it, or the adapter ``name``, does not exist."""
    record = hosted(model)
    if record is None:
        raise StateError("no adapter is attached to this model")
    if name is not None:
        _require_known(record, name)
    return record


def require_one(model: nn.Module, name: str | None, doing: str) -> tuple[Hosted, str]:
    """The record of ``model`` and the adapter meant: ``name``, or the only one there is.

    Raises ``StateError`` where it does not exist, or where None leaves open which one is to be ``doing`` ("merge").
    """
    record = require(model, name)
    if name is None:
        if len(record.adapters) != 1:
            raise StateError(f"say which adapter to {doing}: {', '.join(record.adapters)}")
        name = next(iter(record.adapters))
    return record, name


def _require_known(record: Hosted, name: Any) -> None:
    if not isinstance(name, str):
        raise StateError(f"adapters are named by strings, got {name!r}")
    if name not in record.adapters:
        raise StateError(f"no adapter is called {name!r}{nearest(name, record.adapters)}")


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of ``model`` by name."""
    record = hosted(model)
    return {} if record is None else dict(record.adapters)


def attach(model: nn.Module, method: Any, name: str = "default", layout: Layout | None = None) -> Adapter:
    """Put a fresh adapter on ``model``, freeze the base, and make the adapter the active one.

    ``method`` is a method or a composition (``LoRA(rank=8) + BitFit()``); ``layout`` describes the blocks of a model
    whose structure is not known.  Raises ``SiteError`` for a role or pattern that matches nothing, ``StateError`` for
    a name in use, ``UnsupportedError`` where the method cannot sit on this model; the model is then unchanged.
    """
    model = unwrap(model)
    record = hosted(model)
    _check_name(name, record)
    fresh = record is None
    if record is None:
        record = Hosted(model, layout)
    elif layout is not None and layout != record.layout:
        raise StateError("this model already carries adapters placed with another layout; detach them first")
    anatomy = record.anatomy
    check_fields(method)
    pieces = build(method, lambda part: select(model, anatomy, part.at, part.layers))
    _place(model, record, name, pieces)
    adapter = Adapter(name, method, pieces)
    if fresh:
        model.__dict__[RECORD] = record
        fused.open_up(model)
        record.counting = _stop_counting(model)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in record.asked_gradient:
                parameter.requires_grad_(False)
    record.adapters[name] = adapter
    adapter.trainable = True
    try:
        activate(model, name)
    except Exception:
        detach(model, name)
        raise
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (default: all) off; after the last one the base is bit for bit what it was."""
    model = unwrap(model)
    record = require(model, name)
    names = list(record.adapters) if name is None else [name]
    for merged in names:
        if merged in record.state.merged:
            raise StateError(f"adapter {merged!r} is merged into the base; unmerge it first")
    for gone in names:
        for path in {piece.path for piece in record.adapters[gone].pieces}:
            _remove(model.get_submodule(path), gone)
        del record.adapters[gone]
    record.state.active = tuple(kept for kept in record.state.active if kept in record.adapters)
    if record.adapters:
        return
    if record.state.interface is not None:
        model.set_attn_implementation(attention.for_towers(model, record.state.interface))  # type: ignore[operator]
    fused.close_again(model)
    for path in record.counting:
        model.get_submodule(path).track_running_stats = True  # type: ignore[assignment]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(record.asked_gradient.get(parameter_name, parameter.requires_grad))
    del model.__dict__[RECORD]


def rename(model: nn.Module, name: str, new: str) -> None:
    """Give an adapter another name; raises ``StateError`` for a name in use or one that no adapter may have."""
    record = require(model, name)
    _check_name(new, record)
    if name in record.state.merged:
        raise StateError(f"adapter {name!r} is merged into the base; unmerge it first")
    adapter = record.adapters[name]
    for path in {piece.path for piece in adapter.pieces}:
        slot = unwrap(model).get_submodule(path)._modules["epitaxy"]
        assert slot is not None
        slot._modules[new] = slot._modules.pop(name)
    record.adapters = {new if key == name else key: value for key, value in record.adapters.items()}
    record.state.active = tuple(new if key == name else key for key in record.state.active)
    adapter.name = new


def activate(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Switch to one adapter, to several at once (applied in the given order), or to the bare base (None).

    Takes the same time however many adapters are attached; never changes what is trainable.
    """
    model = unwrap(model)
    names = () if name is None else tuple(name) if isinstance(name, Iterable) and not isinstance(name, str) else (name,)
    if not names and hosted(model) is None:
        return
    record = require(model)
    for wanted in names:
        _require_known(record, wanted)
        if wanted in record.state.merged:
            raise StateError(f"adapter {wanted!r} is merged into the base already; unmerge it to switch it on")
    if len(set(names)) < len(names):
        raise StateError(f"an adapter is named twice in {list(names)}")
    _refuse_conflicts(record, names)
    if any(edit.needs_attention_interface for wanted in names for edit in record.adapters[wanted].edits):
        _use_interface(model, record)
    record.state.active = names


@contextmanager
def route(model: nn.Module, rows: Sequence[str | None], expand: str = "interleave") -> Iterator[None]:
    """Send each row of the batches inside the ``with`` block through the adapter it names, or None for the base.

    ``expand`` tells how a module that sees k times the batch orders it: each row k times in place ("interleave"), or
    the whole batch k times ("tile", as for classifier-free guidance).  Backward passes of routed calls belong inside
    the block too when gradient checkpointing is on.
    """
    model = unwrap(model)
    record = require(model)
    if record.state.route is not None:
        raise StateError("route() blocks cannot be nested")
    if isinstance(rows, str):
        raise StateError(f"route() takes one name or None per row of the batch, got the single name {rows!r}")
    plan = Route(rows, expand)
    for wanted in plan.names:
        _require_known(record, wanted)
        if wanted in record.state.merged:
            raise StateError(f"adapter {wanted!r} is merged into the base; unmerge it before routing")
    _refuse_crossing_prompts(record, plan.names)
    pieces = [piece.module for wanted in plan.names for piece in record.adapters[wanted].pieces]
    masked = any(
        isinstance(module, KeyMask) or getattr(module, "needs_attention_interface", False) for module in pieces
    )
    if masked and hasattr(model, "set_attn_implementation"):
        _use_interface(model, record)
    record.state.route = plan
    try:
        yield
    finally:
        record.state.route = None


def _stop_counting(model: nn.Module) -> list[str]:
    """Keep training from writing into the running statistics of the base's norms; returns the paths of these norms.

    A norm that does not track them computes the same in both modes: batch statistics in training, running ones else.
    """
    norms = [
        (path, module)
        for path, module in base_modules(model).items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    for _, module in norms:
        module.track_running_stats = False
    return [path for path, _ in norms]


def _check_name(name: str, record: Hosted | None) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise StateError(f"an adapter's name has letters, digits, '_' and '-' only, got {name!r}")
    if record is not None and name in record.adapters:
        raise StateError(f"an adapter called {name!r} is attached already; detach it or choose another name")


def _refuse_conflicts(record: Hosted, names: Sequence[str]) -> None:
    owner: dict[str, tuple[str, Piece]] = {}
    for name in names:
        for piece in record.adapters[name].pieces:
            if isinstance(piece.module, Edit) and piece.module.exclusive:
                other, first = owner.setdefault(piece.path, (name, piece))
                if other != name:
                    raise StateError(
                        f"adapters {other!r} and {name!r} both replace {piece.path!r}; activate one of them"
                    )
                if first is not piece:
                    raise StateError(f"adapter {name!r} would replace {piece.path!r} twice")
    _refuse_crossing_prompts(record, names)


def _refuse_crossing_prompts(record: Hosted, names: Sequence[str]) -> None:
    """Prompts of several adapters stand side by side over the same blocks, or in blocks of their own."""
    prompts = [(name, edit) for name in names for edit in record.adapters[name].edits if isinstance(edit, Tokens)]
    for (name, edit), (other, another) in itertools.combinations(prompts, 2):
        if name == other and set(edit.blocks) & set(another.blocks):
            raise StateError(f"adapter {name!r} would put prompts twice before the same blocks; give it one prompt")
        if edit.blocks != another.blocks and set(edit.blocks) & set(another.blocks):
            raise StateError(
                f"the prompts of {name!r} and {other!r} span different blocks, {edit.blocks[0]} to {edit.blocks[-1]} "
                f"and {another.blocks[0]} to {another.blocks[-1]}; use one of them at a time"
            )


def _use_interface(model: nn.Module, record: Hosted) -> None:
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if record.state.interface is None or not str(current).startswith(INTERFACE_PREFIX):  # or the user changed it since
        if not hasattr(model, "set_attn_implementation"):
            raise UnsupportedError(
                f"{type(model).__name__} does not use the attention interface of transformers, which this method needs"
            )
        record.state.interface = attention.use(model)


def _place(model: nn.Module, record: Hosted, name: str, pieces: list[Piece]) -> None:
    taken: set[tuple[str, str]] = set()
    for piece in pieces:
        model.get_submodule(piece.path)
        if (piece.path, piece.slot_key) in taken:
            raise StateError(f"two edits of one adapter share the name {piece.slot_key!r} at {piece.path!r}")
        taken.add((piece.path, piece.slot_key))
    for piece in pieces:
        host = model.get_submodule(piece.path)
        slot = host._modules.get("epitaxy")
        if slot is None:
            slot = Slot(record.state)
            slot.train(host.training)
            host._modules["epitaxy"] = slot
            host.register_forward_pre_hook(input_hook, with_kwargs=True)
            host.register_forward_hook(output_hook, with_kwargs=True)
        assert isinstance(slot, Slot)
        piece.module.to(device=_device(host, model))
        piece.module.train(host.training)
        slot.add(name, piece.slot_key, piece.module)


def _device(host: nn.Module, model: nn.Module) -> torch.device:
    for owner in (host, model):
        for parameter_name, parameter in owner.named_parameters():
            if "epitaxy" not in parameter_name.split("."):
                return parameter.device
    return torch.device("cpu")


def _remove(host: nn.Module, name: str) -> None:
    slot = host._modules.get("epitaxy")
    assert isinstance(slot, Slot)
    slot._modules.pop(name, None)
    if slot._modules:
        return
    del host._modules["epitaxy"]
    for hooks, extra, ours in (
        (host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs, input_hook),
        (host._forward_hooks, host._forward_hooks_with_kwargs, output_hook),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            extra.pop(key, None)
