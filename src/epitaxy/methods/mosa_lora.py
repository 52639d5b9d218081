"""MoSA on LoRA: low-rank changes whose factors are cut into parts that train in turn.  Zhang et al. 2023 (2312.02923).

``W + (alpha / rank) B A`` with the parts of ``A`` (down), ``B`` (up) or both drawn in every pass of training; merged
parts are one LoRA of the same rank.  Parts that are slices of the rank, each active by itself with a learned
coefficient, are the rank-one experts of MLAE (2024): ``partition="rank_slice", parts=rank, active="bernoulli",
coefficients=True``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epitaxy.core.edits import Delta, Edit
from epitaxy.core.registry import method
from epitaxy.core.sites import Site
from epitaxy.methods.cutting import Cutting, Split, ticker_for, without_parts
from epitaxy.methods.draws import Clock
from epitaxy.methods.lora import LoRA
from epitaxy.methods.partition import Partition
from epitaxy.methods.parts import Active, DrawBy, MergeBy, Parts, Rule


class SplitDelta(Delta):
    """A low-rank change with one or both factors in parts (None: not cut)."""

    def __init__(
        self, host: nn.Module, rank: int, scale: float, dropout: float, taps: Sequence[tuple[str, Edit]] = ()
    ) -> None:
        super().__init__(host, rank, scale, dropout)
        self.down_parts: Parts | None = None
        self.up_parts: Parts | None = None
        self._taps = tuple(taps)

    def placements(self, site: Site) -> Iterator[tuple[str, Edit]]:
        taps, self._taps = self._taps, ()
        yield site.path, self
        yield from taps

    def cut(self, down_parts: Parts | None, up_parts: Parts | None) -> None:
        """Cut the fresh factors."""
        self.down_parts, self.up_parts = down_parts, up_parts
        if down_parts is not None and down_parts.initial is not None:
            self.down.data.copy_(down_parts.initial)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = super().factors()
        return (
            down if self.down_parts is None else self.down_parts.merged(down),
            up if self.up_parts is None else self.up_parts.merged(up),
        )

    def factors_for(self, rows: int) -> tuple[Tensor, Tensor]:
        if not self.training or (self.down_parts is None and self.up_parts is None):
            return self.factors()
        drawn = [
            tensor.unsqueeze(0) if parts is None else parts.weight(tensor, parts.draw(rows))
            for tensor, parts in ((self.down, self.down_parts), (self.up, self.up_parts))
        ]
        groups = max(factor.shape[0] for factor in drawn)
        if groups == 1:
            return drawn[0][0], drawn[1][0]
        down, up = (factor.expand(groups, *factor.shape[1:]) for factor in drawn)
        return down, up

    @property
    def own(self) -> bool:
        return super().own and not (self.training and (self.down_parts is not None or self.up_parts is not None))

    @torch.no_grad()
    def merged_into(self, plain: Delta) -> None:
        """Write what evaluation computes into a plain low-rank change of the same sizes."""
        down, up = self.factors()
        plain.down.copy_(down)
        plain.up.copy_(up)

    def in_parts(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """(name, parameter, owners, used) of what is cut (``partition.split_parameters``)."""
        for name, tensor, parts in (("down", self.down, self.down_parts), ("up", self.up, self.up_parts)):
            if parts is None:
                continue
            if parts.axis == 1:
                trail = (1,) * (self.down.dim() - 1)
                yield "down", self.down, parts.owners.view(-1, *trail).expand_as(self.down), parts.used
            yield name, tensor, parts.owner_map(tensor), parts.used


@method("mosa_lora")
@dataclass(frozen=True)
class MoSALoRA:
    """LoRA (fields as there) with ``split`` factors cut into ``parts`` (fields as of ``MoSA``).

    Masked factors are computed at full size; slices save no work here.  A scale of one is the default, as in LoRA.
    """

    at: str | tuple[str, ...] = ("attention.q", "attention.v")
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False
    parts: int = 4
    split: Split = "up"
    partition: Partition = "element"
    draw: DrawBy = "batch"
    active: Active = "one"
    keep: float = 0.5
    coefficients: bool = False
    merge: MergeBy = "mean"
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.cutting, self.plain  # noqa: B018  (check their fields)

    @property
    def plain(self) -> LoRA:
        """The LoRA that all parts merge into."""
        return without_parts(self, LoRA)

    @property
    def cutting(self) -> Cutting:
        """How its factors are cut; raises ``EpitaxyError`` naming a field that is wrong."""
        rule = Rule(self.parts, self.draw, self.active, self.keep, self.coefficients, self.merge)
        return Cutting(rule, self.split, self.partition, self.seed)

    def shared(self, sites: Sequence[Site]) -> Clock:
        """The clock of all sites."""
        return Clock(self.seed)

    def edits(self, site: Site, clock: Clock) -> Iterator[Edit]:
        edit = SplitDelta(site.module, self.rank, self.plain.scale, self.dropout, taps=ticker_for(site, clock))
        edit.cut(
            self.cutting.parts(clock, site, "down", tuple(edit.down.shape)),
            self.cutting.parts(clock, site, "up", tuple(edit.up.shape)),
        )
        yield edit
