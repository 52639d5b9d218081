"""Feed-forwards of two linear maps: where they are in a model, and whether one is what its parts say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.anatomy import Anatomy
from epitaxy.core.errors import UnsupportedError


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward ``down g(up x)``, by the paths of its parts.

    ``path`` is the module that gives its result and ``entry``, if another, the one that receives its input; ``norm`` is
    the norm in front of it, None where the norm comes after the sum or is not known.
    """

    path: str
    entry: str | None
    up: str
    down: str
    norm: str | None
    block: str

    def linears(self, model: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        """Its two maps; raises ``UnsupportedError`` where one is no plain linear map with a bias."""
        found = []
        for path in (self.up, self.down):
            module = model.get_submodule(path)
            if type(module) is not nn.Linear or module.bias is None:
                kind = "one without" if type(module) is nn.Linear else type(module).__name__
                raise UnsupportedError(f"{path!r} is no plain linear map with a bias, found {kind}")
            found.append(module)
        return found[0], found[1]

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """The feed-forward alone, without its norm, whether its block has it as one module or as two."""
        if self.entry is not None:
            x = model.get_submodule(self.entry)(x)
        if self.entry == self.up:
            between: Any = getattr(model.get_submodule(self.block), "activation_fn", None)
            if not callable(between):
                raise UnsupportedError(f"the activation between {self.up!r} and {self.down!r} is not known")
            x = between(x)
        return model.get_submodule(self.path)(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def applies(self, model: nn.Module, activation: Callable[[Tensor], Tensor]) -> bool:
        """Whether it is ``down(activation(up(x)))`` and nothing else.

        By its result in double precision, so that a gate, another approximation of GELU or a layer in between shows.
        """
        outer = f"{self.block}."
        within = FeedForward(
            self.path.removeprefix(outer),
            None if self.entry is None else self.entry.removeprefix(outer),
            self.up.removeprefix(outer),
            self.down.removeprefix(outer),
            None,
            "",
        )
        block = copy.deepcopy(model.get_submodule(self.block)).double()
        up, down = within.linears(block)
        if up.out_features != down.in_features:
            return False
        x = _noise(64, up.in_features).to(up.weight)
        x = x * 2 / (x @ up.weight.t()).std().clamp_min(1e-12)  # the activation is seen where it bends
        expected = down(activation(up(x)))
        return torch.allclose(within.run(block, x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))

    def between(self, model: nn.Module) -> str:
        """The kinds of module between the maps, for people."""
        linear = {self.up, self.down}
        modules = model.get_submodule(self.entry or self.path).named_modules(prefix=self.entry or self.path)
        kinds = [type(module).__name__ for path, module in modules if path not in linear and not module._modules]
        function = getattr(model.get_submodule(self.block), "activation_fn", None)
        kinds += [getattr(function, "__name__", type(function).__name__)] if self.entry == self.up and function else []
        return ", ".join(dict.fromkeys(kind for kind in kinds if kind not in ("Dropout", "Identity"))) or "nothing"


def feed_forwards(anatomy: Anatomy) -> Iterator[FeedForward]:
    """Every feed-forward whose two maps the layout names."""
    for role, spots in anatomy.roles.items():
        ups, downs = (
            {spot.layer: spot.path for spot in anatomy.roles.get(f"{role}.{part}", ())} for part in ("up", "down")
        )
        for spot in spots:
            block = anatomy.block_of(spot.path)
            if block is None or spot.layer not in ups or spot.layer not in downs:
                continue
            norm = spot.stream if spot.stream not in (spot.path, spot.entry) else None
            yield FeedForward(spot.path, spot.entry, ups[spot.layer], downs[spot.layer], norm, block.path)


def random_stream(model: nn.Module, feed: FeedForward) -> Tensor:
    """A random residual stream in front of a feed-forward, ``2 8 d``, always the same."""
    up, _ = feed.linears(model)
    return _noise(2, 8, up.in_features).to(up.weight)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


__all__ = ["FeedForward", "feed_forwards", "random_stream"]
