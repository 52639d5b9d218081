"""What every edit has in common: where its pieces sit, how it acts on a host, how it merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.errors import UnsupportedError

if TYPE_CHECKING:
    from epitaxy.core.route import Route
    from epitaxy.core.sites import Site

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Edit(nn.Module):
    """A change to one host module of a frozen model.

    An edit acts on the host's input (``before``), on its output (``after``), or both.  Both see one tensor whose
    first dimension runs over rows, so that the caller can send each row through another adapter.  Edits that need
    the whole call (masks, caches) set ``rowwise`` to False and override ``rewrite_input`` and ``rewrite_output``;
    among those on one host, the ``late`` ones rewrite the output last.  ``inert`` ones change nothing that is
    computed, so that a merge leaves them out.
    """

    rowwise: ClassVar[bool] = True
    late: ClassVar[bool] = False
    inert: ClassVar[bool] = False
    acts_before: bool = False
    acts_after: bool = True
    exclusive: ClassVar[bool] = False
    needs_attention_interface: bool = False

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        """Yield (module path, edit) for every piece; the first is the edit that holds the parameters."""
        yield site.path, self

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return the new input of the host."""
        return x

    def after(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output of the host, given its input ``x`` and output ``y``."""
        return y

    def rows(self, members: Tensor) -> None:
        """Told, before a routed call, which rows of the batch this edit is about to see."""

    def needs_batch(self, host: nn.Module) -> bool:
        """Whether a row's change depends on the other rows of the batch: a routed call then shows it all of them."""
        return False

    def mergeable_into(self, host: nn.Module) -> None:
        """Raise ``UnsupportedError`` when this edit cannot be merged into ``host``."""
        raise UnsupportedError(f"{type(self).__name__} edits compute something no weight of the base can hold")

    def merged(self, host: nn.Module) -> Mapping[str, Tensor]:
        """The host's parameters with this edit folded in, by name; full precision is up to the caller."""
        raise UnsupportedError(f"{type(self).__name__} edits cannot be merged")

    @classmethod
    def rewrite_input(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments
    ) -> Arguments:
        """Whole-call form for edits that are not row-wise; ``group`` maps adapter number to its edit here."""
        return call

    @classmethod
    def rewrite_output(
        cls, group: Mapping[int, Edit], route: Route | None, host: nn.Module, call: Arguments, output: Any
    ) -> Any:
        """Whole-call form of ``after``."""
        return output


def first_tensor(call: Arguments) -> Tensor:
    """The tensor a host works on: its first positional argument, else ``hidden_states``."""
    args, kwargs = call
    value = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
    if not isinstance(value, Tensor):
        raise UnsupportedError(
            f"expected a tensor as the first argument of an adapted module, got {type(value).__name__}"
        )
    return value


def with_first(call: Arguments, value: Tensor) -> Arguments:
    """The same call with its first tensor replaced."""
    args, kwargs = call
    if args:
        return (value, *args[1:]), kwargs
    key = "hidden_states" if "hidden_states" in kwargs else "input"
    return args, {**kwargs, key: value}


def output_tensor(output: Any) -> Tensor:
    """The tensor inside a host's output, which may be a tuple whose first element it is."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def with_output(output: Any, value: Tensor) -> Any:
    """The same output with its tensor replaced."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def cast(weight: Tensor, like: Tensor) -> Tensor:
    """``weight`` in the type of the activation it meets, so that a bf16 base works with fp32 adapters."""
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


def wide(value: Tensor) -> Tensor:
    """``value`` in the precision that sums are taken in: fp32, and fp64 as it is."""
    return value if value.dtype == torch.float64 else value.float()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, computed in the type of ``x``.

    Lay ``x`` out contiguously: otherwise torch rounds differently when the layer is frozen and when it trains, and a
    loaded adapter would not give the bits of the saved one.
    """
    return F.linear(x, cast(layer.weight, x), cast(layer.bias, x))


def refuse_quantised(host: nn.Module) -> None:
    """Raise where the host's weight is not a plain floating-point tensor that a merge could write."""
    weight = getattr(host, "weight", None)
    if not isinstance(weight, Tensor) or not torch.is_floating_point(weight):
        raise UnsupportedError(
            f"cannot merge into {type(host).__name__}: its weight is "
            f"{getattr(weight, 'dtype', 'missing')}, expected floating point; dequantise the base first"
        )
    if hasattr(host, "parametrizations"):
        raise UnsupportedError(
            f"cannot merge into {type(host).__name__}: its weight is computed from other parameters (a parametrization)"
        )
