"""MoSA written out as it was published: N copies of every split projection, one picked, gradients masked.

Independent of the library: loops over parts, holds everything N times, knows no owner map but the masks it is given.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Copies(nn.Module):
    """``parts`` copies of one linear map, each of which learns the elements under its own mask alone."""

    def __init__(self, layer: nn.Linear, masks: list[Tensor]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(layer) for _ in masks)
        self.masks = masks
        self.active = 0
        for module, mask in zip(self.copies, masks, strict=True):
            module.get_parameter("weight").register_hook(lambda gradient, mask=mask: gradient * mask)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.copies[self.active](x)
        return result

    def merged(self) -> nn.Linear:
        """The mean of the copies."""
        layer: nn.Linear = copy.deepcopy(self.copies[0])  # type: ignore[assignment]
        with torch.no_grad():
            layer.weight.copy_(torch.stack([module.get_parameter("weight") for module in self.copies]).mean(0))
            layer.bias.copy_(torch.stack([module.get_parameter("bias") for module in self.copies]).mean(0))
        return layer


class CopiedAdapter(nn.Module):
    """``up(gelu(down(x)))`` with copies in place of a split projection; ``draw`` says which are active."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def draw(self, down: int | None, up: int | None) -> None:
        for module, number in ((self.down, down), (self.up, up)):
            if isinstance(module, Copies):
                assert number is not None
                module.active = number

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            down, up = (m.merged() if isinstance(m, Copies) else m for m in (self.down, self.up))
            result: Tensor = up(F.gelu(down(x)))
            return result
        return self.up(F.gelu(self.down(x)))  # type: ignore[no-any-return]
