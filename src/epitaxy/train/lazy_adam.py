"""AdamW for parameters whose elements belong to parts, of which a step draws only some (MoSA, 2312.02923).

A part that was not drawn since the last step rests: its elements keep their values, both moments and the count of its
steps, and do not decay.  So the elements of a part go the way they would go as a parameter of their own that has no
gradient on that step.  ``idle="momentum"`` lets a part that was drawn once go on by momentum and decay, as it does
under optimisers that see a gradient of zero instead of none.

Decay acts on the values of the elements that move, not on their distance from where they started, and never on the
frozen values that an active part reads at the places of the others.  (The published optimiser decays those too, in
every copy of the projection.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, StateError
from epitaxy.train.config import Idle

Split = tuple[str, nn.Parameter, Tensor, Tensor]
_plain_step = inspect.unwrap(torch.optim.AdamW.step)  # without the hooks, which stand around our own step


class LazyAdamW(torch.optim.AdamW):
    """A drop-in for ``torch.optim.AdamW``, to the bit for every parameter that ``split`` does not name.

    ``split`` yields (name, parameter, owners, used): ``owners`` uint8 of the parameter's shape, the part of each
    element; ``used`` bool (parts,), set by the module where it draws a part.  Give ``split_parameters(adapter)``, or a
    function that returns it, which is asked anew at every step, so that the model may still move to another device.

    Every step clears ``used``, also one that a gradient scaler leaves out; ``forget`` does it where a loop leaves out a
    step by itself.  Draws are united over the micro-batches of a step and, with ``unite``, over the processes of the
    default group, which all have to step then.  ``published`` is the older AdamW of transformers, which the published
    recipes used: ``eps`` joins the root of the second moment before bias correction, decay follows the step.

    A parameter's state is that of AdamW with ``step`` (parts,) instead of one number.  No step waits for a GPU, but for
    one with a gradient scaler, which does by itself.

    Raises ``EpitaxyError`` for another ``idle``, ``StateError`` when owners or states do not fit their parameter.
    """

    _step_supports_amp_scaling = True  # GradScaler then calls ``step`` on overflow too, so that ``used`` can be cleared
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Any,
        split: Iterable[Split] | Callable[[], Iterable[Split]] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        idle: Idle = "lazy",
        published: bool = False,
        unite: bool = True,
    ) -> None:
        if idle not in ("lazy", "momentum"):
            raise EpitaxyError(f"idle is lazy or momentum, got {idle!r}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._split = split if callable(split) else tuple(split)
        self.idle, self.published, self.unite = idle, published, unite
        self.forget()

    def forget(self) -> None:
        """Clear ``used``: the draws since the last step belong to no step."""
        _clear(self._parts())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = self._parts()
        if not self._overflow():
            if self.unite:
                _unite([used for _, _, _, used in parts])
            lazy = {p: (owners, used) for _, p, owners, used in parts if len(used) > 1}
            if not self.published:
                self._step_of_torch(lazy)
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and (self.published or parameter in lazy):
                        self._move(parameter, group, *lazy.get(parameter, (None, None)))
        _clear(parts)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the counts of steps have to fit the parts."""
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        shapes = {parameter: (name, used.shape) for name, parameter, _, used in self._parts() if len(used) > 1}
        for parameter, number in zip(own, numbers, strict=False):
            name, shape = shapes.get(parameter, ("", torch.Size()))
            step = state_dict["state"].get(number, {}).get("step")
            if name and step is not None and step.shape != shape:
                raise StateError(
                    f"{name}: the optimiser's state counts steps of shape {tuple(step.shape)}, "
                    f"this parameter has {shape.numel()} parts"
                )
        super().load_state_dict(state_dict)
        for parameter in own:
            if "step" in self.state.get(parameter, {}) and (self.published or parameter in shapes):
                self.state[parameter]["step"] = self.state[parameter]["step"].to(parameter.device)

    def _parts(self) -> list[Split]:
        """The split parameters as they are now."""
        found = list(self._split() if callable(self._split) else self._split)
        for name, parameter, owners, used in found:
            if owners.shape != parameter.shape:
                raise StateError(f"{name}: owners have shape {tuple(owners.shape)}, not {tuple(parameter.shape)}")
            if not owners.device == used.device == parameter.device:
                raise StateError(
                    f"{name}: the parameter is on {parameter.device}, its draws were noted on {used.device}; the model "
                    "moved after the optimiser was made: give split as a function, or make the optimiser last"
                )
        return found

    def _overflow(self) -> bool:
        """Whether a gradient scaler found infinite gradients; divides the others by its scale if it has not."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is None:
            return False
        self.grad_scale = self.found_inf = None  # the scaler deletes both afterwards
        if bool(found):
            return True
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad.mul_(inverse.to(parameter.grad.device))
        return False

    def _step_of_torch(self, lazy: Iterable[nn.Parameter]) -> None:
        """AdamW of torch on everything else: it passes over parameters without a gradient."""
        hidden = {parameter: parameter.grad for parameter in lazy}
        try:
            for parameter in hidden:
                parameter.grad = None
            _plain_step(self)
        finally:
            for parameter, gradient in hidden.items():
                parameter.grad = gradient

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], owners: Tensor | None, used: Tensor | None) -> None:
        """AdamW on one parameter; with ``owners`` only on the elements of the parts that move."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(() if used is None else len(used), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        first, second, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
        moves = torch.ones_like(steps, dtype=torch.bool)
        if used is not None:
            moves = used if self.idle == "lazy" else used | (steps > 0)
        steps.add_(moves)
        index = None if owners is None else owners.flatten().int()

        def spread(values: Tensor) -> Tensor:  # of each part -> of each element
            return values if index is None else values.index_select(0, index).view_as(parameter)

        beta1, beta2 = group["betas"]
        exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        correction1 = spread(_correction(beta1, steps).to(exact))
        correction2 = spread(_correction(beta2, steps).sqrt().to(exact))
        rate, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        new_first = first.lerp(gradient, 1 - beta1)
        new_second = second.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if self.published:
            change = rate * correction2 / correction1 * new_first / (new_second.sqrt() + eps)
            value = (parameter - change) * (1 - rate * decay)
        else:
            change = rate / correction1 * new_first / (new_second.sqrt() / correction2 + eps)
            value = parameter * (1 - rate * decay) - change
        moving = spread(moves)
        for place, moved in ((parameter, value), (first, new_first), (second, new_second)):
            place.copy_(torch.where(moving, moved, place))


def _clear(parts: Iterable[Split]) -> None:
    for _, _, _, used in parts:
        used.zero_()


def _correction(beta: float, steps: Tensor) -> Tensor:
    """``1 - beta ** steps`` without cancellation; parts that never moved count as having moved once."""
    logarithm = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(steps.clamp(min=1).to(_widest(steps.device)) * logarithm)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _unite(used: list[Tensor]) -> None:
    """What one process drew, all of them drew."""
    distributed = torch.distributed
    if not used or not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    flags = torch.cat([flag.to(used[0].device, torch.uint8) for flag in used])
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
    for flag, united in zip(used, torch.split(flags, [len(flag) for flag in used]), strict=True):
        flag.copy_(united)
