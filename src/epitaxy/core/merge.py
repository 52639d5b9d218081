"""Merge adapters into the base weights, report the drift, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.edits import Edit
from epitaxy.core.errors import StateError, UnsupportedError
from epitaxy.core.host import activate, require, require_one, unwrap
from epitaxy.core.registry import methods_in
from epitaxy.core.sites import width_in

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """How far the merged base is from the base with its adapter.

    ``drift`` is the largest absolute difference of outputs divided by the largest absolute output, over the probe
    inputs; ``absolute`` the difference itself; ``weights`` counts the parameters that changed.
    """

    name: str
    drift: float
    absolute: float
    tolerance: float
    weights: int

    def __str__(self) -> str:
        return f"merged {self.name!r} into {self.weights} parameters; relative drift {self.drift:.1e} on probe inputs"


@torch.no_grad()
def merge(
    model: nn.Module,
    name: str | None = None,
    probe: Mapping[str, Any] | Callable[[nn.Module], Tensor] | None = None,
    tolerance: float | None = None,
) -> MergeReport:
    """Fold an adapter into the base weights; the originals are stashed for ``unmerge``.

    ``probe`` gives the inputs on which the drift is measured: keyword arguments for the model, or a function of the
    model that returns a tensor.  Without one, every changed module is probed alone with random inputs.  A drift
    beyond ``tolerance`` (by default according to the base's precision) undoes the merge and raises.
    """
    model = unwrap(model)
    record, name = require_one(model, name, "merge")
    if name in record.state.merged:
        raise StateError(f"adapter {name!r} is merged already")
    for key, tensor in record.adapters[name].tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"adapter {name!r} is not merged: {key} holds NaN or infinite values")
    if probe is not None and not callable(probe) and not isinstance(probe, Mapping):
        raise StateError(f"probe must be a mapping of inputs or a function of the model, got {type(probe).__name__}")
    edits = _mergeable(model, record.adapters[name])
    previous = record.state.active
    paths = list(dict.fromkeys(path for path, _ in edits))
    stash: dict[str, Tensor] = {}
    try:
        activate(model, name)
        before = _probe(model, paths, probe)
        for path, edit in edits:
            host = model.get_submodule(path)
            for key, value in edit.merged(host).items():
                parameter = host._parameters[key]
                assert parameter is not None
                stash.setdefault(f"{path}.{key}", parameter.detach().clone())
                write(host, key, value)
        record.state.active = ()
        after = _probe(model, paths, probe)
    except Exception:
        _restore(model, stash)
        record.state.active = previous
        raise
    differences = [(a.float() - b.float()).abs().max() for a, b in zip(before, after, strict=True)]
    absolute = float(torch.stack(differences).max())  # NaN wins, which Python's max would pass over
    largest = max(float(a.float().abs().max()) for a in before)
    dtype = next(iter(stash.values())).dtype
    report = MergeReport(
        name,
        absolute / max(largest, 1e-12),
        absolute,
        TOLERANCES.get(dtype, 1e-2) if tolerance is None else tolerance,
        len(stash),
    )
    if not report.drift <= report.tolerance:
        _restore(model, stash)
        record.state.active = previous
        raise UnsupportedError(
            f"merging {name!r} would change the outputs by {report.drift:.1e} (relative), more than the tolerance "
            f"{report.tolerance:.1e}; the base is unchanged"
        )
    record.stash[name] = stash
    record.state.merged += (name,)
    record.state.active = tuple(other for other in previous if other != name)
    return report


@torch.no_grad()
def unmerge(model: nn.Module, name: str | None = None) -> None:
    """Put the stashed weights back, bit for bit.  Adapters merged later must be unmerged before."""
    model = unwrap(model)
    record = require(model)
    if not record.state.merged:
        raise StateError("no adapter is merged into this model")
    name = record.state.merged[-1] if name is None else name
    require(model, name)
    if name not in record.state.merged:
        raise StateError(f"adapter {name!r} is not merged")
    if record.state.merged[-1] != name:
        raise StateError(f"adapter {record.state.merged[-1]!r} was merged after {name!r}; unmerge it first")
    _restore(model, record.stash.pop(name))
    record.state.merged = record.state.merged[:-1]


def _mergeable(model: nn.Module, adapter: Adapter) -> list[tuple[str, Edit]]:
    """The (path, edit) pairs to fold in; raises with the method's own reason when one of them cannot be."""
    for part in methods_in(adapter.method):
        if "merge" in part.cannot:
            raise UnsupportedError(
                f"adapter {adapter.name!r} cannot be merged: {part.method_name}: {part.cannot['merge']}"
            )
    if not all(isinstance(piece.module, Edit) for piece in adapter.pieces):
        raise UnsupportedError(f"adapter {adapter.name!r} cannot be merged: what its generator adds needs a context")
    edits: list[tuple[str, Edit]] = []
    for piece in adapter.pieces:
        assert isinstance(piece.module, Edit)
        if piece.module.inert:
            continue
        host = model.get_submodule(piece.path)
        piece.module.mergeable_into(host)
        refuse_tied(model, host, piece.path)
        edits.append((piece.path, piece.module))
    return edits


def write(host: nn.Module, key: str, value: Tensor) -> None:
    """Write in place where the shape allows; a head with other outputs gets a new parameter."""
    parameter = host._parameters[key]
    assert parameter is not None
    if parameter.shape == value.shape:
        parameter.data.copy_(value.to(parameter.dtype))
        return
    new = nn.Parameter(value.to(parameter.device, parameter.dtype).clone(), requires_grad=parameter.requires_grad)
    host._parameters[key] = new
    if isinstance(host, nn.Linear) and key == "weight":
        host.out_features, host.in_features = (int(size) for size in new.shape)


def _restore(model: nn.Module, stash: Mapping[str, Tensor]) -> None:
    for full, value in stash.items():
        path, _, key = full.rpartition(".")
        write(model.get_submodule(path), key, value)


def refuse_tied(model: nn.Module, host: nn.Module, path: str) -> None:
    """Raise ``UnsupportedError`` where another module of ``model`` uses the weight of ``host``."""
    weight = host._parameters.get("weight")
    for other, module in model.named_modules(remove_duplicate=False):
        if other != path and module is not host and weight is not None and module._parameters.get("weight") is weight:
            raise UnsupportedError(
                f"the weight of {path!r} is shared with {other!r}: merging would change both; untie them first"
            )


def _probe(model: nn.Module, paths: list[str], probe: Any) -> list[Tensor]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if probe is None:
            return [_probe_host(model.get_submodule(path)) for path in paths]
        output = probe(model) if callable(probe) else model(**probe)
        if not isinstance(output, Tensor):
            output = next(
                (getattr(output, key) for key in ("logits", "sample", "last_hidden_state") if hasattr(output, key)),
                output[0],
            )
        return [output.detach().clone()]
    finally:
        for module, flag in training.items():
            module.training = flag


def _probe_host(host: nn.Module) -> Tensor:
    """The output of one module for random inputs of a shape it takes."""
    parameter = next(host.parameters(recurse=False))
    dtype = parameter.dtype if torch.is_floating_point(parameter) else torch.float32
    width = width_in(host) or int(parameter.shape[0])
    if isinstance(host, nn.modules.conv._ConvNd):
        shape: tuple[int, ...] = (2, host.in_channels, *(4 * size for size in host.kernel_size))
    elif isinstance(host, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        shape = (8, width, *(2,) * {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}.get(type(host), 0))
    else:
        shape = (2, width, 4, 4) if isinstance(host, nn.GroupNorm) else (2, 4, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device, dtype)
    try:
        return host(x).detach().clone()  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(
            f"give merge() a probe: {type(host).__name__} takes no random input ({reason})"
        ) from None


__all__ = ["TOLERANCES", "MergeReport", "merge", "refuse_tied", "unmerge", "write"]
