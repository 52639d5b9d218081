"""What a run changes: the adapter's parameters, or every parameter of the model that asks for gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import FormatError, StateError, UnsupportedError
from epitaxy.core.host import hosted, unwrap
from epitaxy.core.registry import methods_in
from epitaxy.tasks.objective import Objective
from epitaxy.train.config import Decay


@dataclass(frozen=True)
class Trainable:
    """Named parameters for the optimiser, and named buffers that training moves along with them."""

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it, detached, still sharing memory with the model."""
        return {**{key: parameter.detach() for key, parameter in self.parameters.items()}, **self.buffers}

    def copy(self) -> dict[str, Tensor]:
        """Values at this moment, on the CPU."""
        return {key: tensor.to("cpu", copy=True) for key, tensor in self.tensors().items()}

    def fill(self, values: Mapping[str, Tensor], source: str) -> None:
        """Set everything to ``values``; raises ``FormatError`` when names or shapes differ."""
        places = self.tensors()
        for key in (*sorted(places.keys() - values.keys()), *sorted(values.keys() - places.keys())):
            raise FormatError(f"{source}: {key!r} is {'missing there' if key in places else 'not in this model'}")
        for key, place in places.items():
            if place.shape != values[key].shape:
                raise FormatError(
                    f"{source}: {key!r} has shape {tuple(values[key].shape)}, this model needs {tuple(place.shape)}"
                )
        for key, place in places.items():
            place.copy_(values[key])

    def groups(self, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
        """Parameter groups: which parameters decay says ``TrainConfig.decay``."""

        def decays(key: str, parameter: nn.Parameter) -> bool:
            bias = key.endswith("bias")
            return {"matrices": parameter.dim() > 1 and not bias, "weights": not bias, "everything": True}[decay]

        decaying = {key: decays(key, parameter) for key, parameter in self.parameters.items()}
        return [
            {"params": [p for key, p in self.parameters.items() if decaying[key] is flag], "weight_decay": strength}
            for flag, strength in ((True, weight_decay), (False, 0.0))
            if flag in decaying.values()
        ]

    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    def update_norms(self, start: Mapping[str, Tensor]) -> dict[str, float]:
        """How far each module's parameters moved from ``start``: the root mean square of the change."""
        squares: dict[str, tuple[float, int]] = {}
        for key, parameter in self.parameters.items():
            module = key.rpartition(".")[0]
            total, count = squares.get(module, (0.0, 0))
            change = parameter.detach().float() - start[key].to(parameter.device).float()
            squares[module] = (total + float(change.square().sum()), count + parameter.numel())
        return {module: math.sqrt(total / count) for module, (total, count) in squares.items()}


def trainable_of(model: nn.Module, adapter: Adapter | None) -> Trainable:
    """What to train.  Raises ``StateError`` when the adapter cannot learn as things stand, or nothing is left to."""
    model = unwrap(model)
    if adapter is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    else:
        _require_active(model, adapter)
        parameters = {key: p for key, p in adapter.named_parameters() if p.requires_grad}
        buffers = {
            key: tensor for key, tensor in adapter.tensors().items() if key not in dict(adapter.named_parameters())
        }
    if not parameters:
        raise StateError("nothing would train: no parameter asks for a gradient")
    half = next((key for key, p in parameters.items() if p.dtype == torch.float16), None)
    if half is not None:
        raise UnsupportedError(
            f"{half!r} is float16, in which training underflows; open the model in float32 and choose precision fp16"
        )
    return Trainable(parameters, buffers)


def _require_active(model: nn.Module, adapter: Adapter) -> None:
    record = hosted(model)
    if record is None or record.adapters.get(adapter.name) is not adapter:
        raise StateError(f"adapter {adapter.name!r} is not attached to this model")
    if adapter.name not in record.state.active:
        raise StateError(f"adapter {adapter.name!r} is not active, so it would get no gradient; activate it first")
    if not adapter.trainable:
        raise StateError(f"adapter {adapter.name!r} is frozen; set adapter.trainable = True to train it")
    own = [name for name, p in model.named_parameters() if p.requires_grad and "epitaxy" not in name.split(".")]
    if own:
        raise StateError(
            f"{len(own)} parameters of the base ask for gradients beside the adapter, the first is {own[0]!r}; "
            "freeze them, or give the adapter a part for them (Head, BitFit, NormTuning)"
        )


def objective_of(adapter: Adapter | None) -> Any:
    """The objective that a method of the adapter brings along, or None."""
    found = (
        [part for part in methods_in(adapter.method) if callable(getattr(part, "objective", None))] if adapter else []
    )
    if len(found) > 1:
        names = " and ".join(part.method_name for part in found)
        raise UnsupportedError(f"{names} each bring an objective of their own; pass one that joins them to train()")
    return found[0].objective if found else None


def objective_for(adapter: Adapter | None, given: Any) -> Any:
    """The objective of a run: the one given, or what a method brings along.

    Raises ``UnsupportedError`` where a method's own would be lost to one that knows nothing of it.
    """
    own = objective_of(adapter)
    if own is not None and isinstance(given, Objective):
        raise UnsupportedError(
            f"a method of this adapter brings an objective of its own, which '{given}' would replace; leave one out"
        )
    return own if given is None else given
