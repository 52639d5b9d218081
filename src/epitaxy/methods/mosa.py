"""MoSA, a mixture of sparse adapters: one adapter whose projections are cut into parts that train in turn.

Zhang et al. 2023 (2312.02923).  In each pass of training every block draws one part of each split projection; only
its elements act and learn.  For evaluation the parts merge into one adapter of the plain size.  Beyond the paper: parts
that are slices and cost what they hold, several parts at once with a learned coefficient for each (MLAE 2024),
multiplicative noise on the adapter's output (PACE, NeurIPS 2024), rows without the adapter (Adapter+, CVPR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from epitaxy.core.edits import Edit, Insertion, Order, Reads, Scale
from epitaxy.core.errors import EpitaxyError, expect_one_of
from epitaxy.core.registry import declare, method
from epitaxy.core.sites import Site
from epitaxy.methods.bottleneck import Activation, Bottleneck, Norm, TwoLayerMLP
from epitaxy.methods.cutting import Cutting, Split, ticker_for, without_parts
from epitaxy.methods.draws import Clock, place_of
from epitaxy.methods.mosa_module import BiasBy, SparseMLP
from epitaxy.methods.partition import Partition
from epitaxy.methods.parts import Active, DrawBy, MergeBy, Rule

Balance = Literal["count", "saliency"]


@method("mosa", cannot={"merge": "a bottleneck is not linear, no weight can hold it"})
@dataclass(frozen=True)
class MoSA:
    """A bottleneck adapter (fields as there) with ``split`` projections cut into ``parts``.

    ``partition``: parts own random elements of all, of each row or of each column, or they are contiguous slices:
    "out_slice" of the output channels, "rank_slice" of the hidden units; slices are computed alone.  ``draw``: one draw
    for the batch, or for each row of it.  ``active="one"`` part, or each with probability ``keep`` ("bernoulli"), then
    divided by it.  ``coefficients`` learns a factor for each part.  ``merge`` of one active part is the mean, which is
    what training expects; "union" is N times that change.  ``bias="parts"`` gives each part a full bias, averaged.
    ``balance="saliency"`` asks for ``saliency.balance`` before training.  ``seed`` decides parts and draws.
    """

    at: str | tuple[str, ...] = "mlp"
    bottleneck: int = 64
    reduction: float | None = None
    parts: int = 4
    split: Split = "up"
    partition: Partition = "element"
    order: Order = "parallel"
    residual: bool | None = None
    norm: Norm = "none"
    reads: Reads = "sublayer"
    activation: Activation = "gelu"
    scale: Scale = 0.1
    dropout: float = 0.1
    bias: BiasBy = "shared"
    draw: DrawBy = "batch"
    active: Active = "one"
    keep: float = 0.5
    coefficients: bool = False
    noise: float = 0.0
    drop_path: float = 0.0
    merge: MergeBy = "mean"
    balance: Balance = "count"
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.plain, self.cutting  # noqa: B018  (check their fields)
        expect_one_of("bias", self.bias, get_args(BiasBy))
        expect_one_of("balance", self.balance, get_args(Balance))
        if self.balance == "saliency" and (self.partition, self.split) != ("element", "up"):
            raise EpitaxyError(
                "balance: 'saliency' needs partition='element' and split='up', because only the elements of `up` have "
                f"a gradient before training, found {self.partition!r} and {self.split!r}"
            )
        if self.bias == "parts" and self.active != "one":
            raise EpitaxyError("bias: 'parts' needs active='one', because several active parts share one bias")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise EpitaxyError(f"noise must be a finite number of at least 0, got {self.noise}")
        if not 0 <= self.drop_path < 1:
            raise EpitaxyError(f"drop_path must be from 0 to below 1, got {self.drop_path}")
        if self.drop_path and (self.order == "before" or (self.order == "sequential" and self.residual is False)):
            raise EpitaxyError("drop_path needs an adapter that is added to its sub-layer, not one in its place")
        if (departs := self.insertion.departs) is not None:
            declare(self, "identity", departs)

    @property
    def insertion(self) -> Insertion:
        """How the adapter stands to its sub-layer."""
        return Insertion(self.order, self.residual, self.reads)

    @property
    def cutting(self) -> Cutting:
        """How its projections are cut; raises ``EpitaxyError`` naming a field that is wrong."""
        rule = Rule(self.parts, self.draw, self.active, self.keep, self.coefficients, self.merge)
        return Cutting(rule, self.split, self.partition, self.seed, stored=self.balance == "saliency")

    @property
    def plain(self) -> Bottleneck:
        """The adapter that all parts merge into."""
        return without_parts(self, Bottleneck)

    @classmethod
    def adaptformer(cls, bottleneck: int = 64, parts: int = 4, partition: Partition = "element", seed: int = 0) -> MoSA:
        """From the residual stream before the norm to the feed-forward's output, with a norm of its own."""
        return cls(bottleneck=bottleneck, parts=parts, partition=partition, norm="layer", reads="stream", seed=seed)

    @classmethod
    def pfeiffer(cls, bottleneck: int = 64, parts: int = 4, partition: Partition = "element", seed: int = 0) -> MoSA:
        """After the feed-forward, with a norm of its own and ReLU."""
        return cls(
            bottleneck=bottleneck,
            parts=parts,
            partition=partition,
            order="sequential",
            norm="layer",
            activation="relu",
            scale=1.0,
            dropout=0.0,
            seed=seed,
        )

    @classmethod
    def houlsby(cls, bottleneck: int = 64, parts: int = 4, partition: Partition = "element", seed: int = 0) -> MoSA:
        """Added to the residual stream after attention and after the feed-forward, with SiLU."""
        return cls(
            at=("attention", "mlp"),
            bottleneck=bottleneck,
            parts=parts,
            partition=partition,
            order="sequential",
            reads="stream",
            activation="silu",
            scale=1.0,
            dropout=0.0,
            seed=seed,
        )

    @classmethod
    def swin(cls, bottleneck: int = 64, parts: int = 4, partition: Partition = "element", seed: int = 0) -> MoSA:
        """Beside the feed-forward, reading what it reads, without a norm."""
        return cls(bottleneck=bottleneck, parts=parts, partition=partition, seed=seed)

    @classmethod
    def published(cls, bottleneck: int = 64, parts: int = 4, split: Split = "up", seed: int = 0) -> MoSA:
        """What the released code trains: random elements, a full bias for each part of a split projection.

        It goes with two passes and a symmetric KL, and with ``idle="momentum"`` in the optimiser.
        """
        return cls(
            bottleneck=bottleneck, parts=parts, split=split, norm="layer", reads="stream", bias="parts", seed=seed
        )

    @property
    def fold_obstacle(self) -> str | None:
        """As of the adapter that its parts merge into."""
        return self.plain.fold_obstacle

    def shared(self, sites: Sequence[Site]) -> Clock:
        """The clock of all sites."""
        return Clock(self.seed)

    def edits(self, site: Site, clock: Clock) -> Iterator[Edit]:
        hidden = self.bottleneck if self.reduction is None else site.reduced(self.reduction)
        width_in, width = self.insertion.width_in(site), site.require_width()
        eps = self.insertion.norm_eps(site)
        plain = TwoLayerMLP(width_in, hidden, width, self.activation, self.dropout, norm=self.norm, norm_eps=eps)
        module = SparseMLP(
            plain,
            clock,
            self.cutting.parts(clock, site, "down", (hidden, width_in)),
            self.cutting.parts(clock, site, "up", (width, hidden)),
            self.bias,
            self.noise,
            self.drop_path,
            place_of(site.key, "drop_path"),
        )
        yield self.insertion.branch(module, self.scale, taps=ticker_for(site, clock))
