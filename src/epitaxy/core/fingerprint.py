"""What a base model is, in a few words: family, class, a digest of its shapes and one of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epitaxy.core.anatomy import base_modules, describe
from epitaxy.core.errors import FormatError
from epitaxy.core.host import hosted, unwrap


@dataclass(frozen=True)
class Base:
    """Identity of a base model.

    ``shapes`` digests names and shapes of all parameters but the task head; ``weights`` a sample of their values,
    rounded to bf16 so that the same model in another precision is still the same.
    """

    family: str
    model_class: str
    shapes: str
    weights: str
    source: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """As plain data."""
        return asdict(self)


def fingerprint(model: nn.Module) -> Base:
    """Identify the base of ``model``, whatever adapters it carries; merged weights are looked through."""
    model = unwrap(model)
    record = hosted(model)
    anatomy = record.anatomy if record is not None else describe(model)
    heads = tuple(spot.path + "." for spot in anatomy.roles.get("head", ()))
    stashed: dict[str, Tensor] = {}
    if record is not None:
        for name in reversed(record.state.merged):
            stashed.update(record.stash[name])
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, parameter in _base_parameters(model):
        if name.startswith(heads or ("\0",)):
            continue
        value = stashed.get(name, parameter).detach()
        shapes.update(f"{name}{tuple(value.shape)}".encode())
        if torch.is_floating_point(value) and value.device.type != "meta":
            if isinstance(value, DTensor):
                value = value.full_tensor()
            sample = value.flatten()[:16].to("cpu", torch.bfloat16)
            weights.update(sample.view(torch.int16).numpy().tobytes())
    config = getattr(model, "config", None)
    return Base(
        anatomy.family, type(model).__name__, shapes.hexdigest()[:16], weights.hexdigest()[:16], _source(config)
    )


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``named_parameters``, without walking through the adapters, of which there may be thousands."""
    seen: set[int] = set()
    for path, module in base_modules(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), parameter


def _source(config: object) -> str | None:
    """What the base was opened as; of a path only its name, as a path says nothing on another machine."""
    source = getattr(config, "_name_or_path", None) or None
    return Path(source).name if source is not None and Path(source).exists() else source


def check_base(expected: dict[str, str | None], found: Base, path: str) -> str | None:
    """Raise when an adapter made for ``expected`` cannot fit ``found``; return a warning when its weights differ."""
    if expected.get("family") != found.family:
        raise FormatError(
            f"{path}: made for a base of family {expected.get('family')!r}, this model is {found.family!r}"
        )
    if expected.get("shapes") != found.shapes:
        raise FormatError(
            f"{path}: made for a {expected.get('family')} of other sizes (shape digest {expected.get('shapes')}, "
            f"this model has {found.shapes})"
        )
    if expected.get("weights") != found.weights:
        return (
            f"{path}: trained on a base with other weights ({expected.get('source') or 'unnamed'}); results may differ"
        )
    return None
