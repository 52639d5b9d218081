"""Where and how a method cuts its projections into parts, and the checks of the fields that say so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from epitaxy.core.edits import Edit
from epitaxy.core.errors import EpitaxyError, expect_one_of
from epitaxy.core.sites import Site
from epitaxy.methods.draws import Clock, Ticker, place_of
from epitaxy.methods.partition import MOST, Partition, owners_of, random_kaiming, random_scores
from epitaxy.methods.parts import Active, DrawBy, MergeBy, Parts, Rule

Split = Literal["up", "down", "both"]
Projection = Literal["down", "up"]
SLICES = ("out_slice", "rank_slice")


@dataclass(frozen=True)
class Cutting:
    """``split`` projections, cut by ``partition``; ``stored`` keeps owners in the adapter's file.

    Raises ``EpitaxyError`` naming a field that is wrong, or two that do not go together.
    """

    rule: Rule
    split: Split
    partition: Partition
    seed: int
    stored: bool = False

    def __post_init__(self) -> None:
        rule = self.rule
        if not 1 <= rule.parts <= MOST:
            raise EpitaxyError(f"parts must be from 1 to {MOST}, got {rule.parts}")
        for name, value, known in (
            ("split", self.split, Split),
            ("partition", self.partition, Partition),
            ("draw", rule.draw, DrawBy),
            ("active", rule.active, Active),
            ("merge", rule.merge, MergeBy),
        ):
            expect_one_of(name, value, get_args(known))
        if not 0 < rule.keep <= 1:
            raise EpitaxyError(f"keep must be above 0 and at most 1, got {rule.keep}")
        if self.partition in SLICES and self.split != "up":
            raise EpitaxyError(
                f"partition: {self.partition!r} needs split='up', found {self.split!r}: what a split `down` starts "
                "from is dense, so that no slice of it could be left out"
            )
        if rule.merge == "union" and rule.active != "one":
            raise EpitaxyError("merge: 'union' needs active='one', because several active parts merge to all of them")

    def parts(self, clock: Clock, site: Site, projection: Projection, shape: tuple[int, ...]) -> Parts | None:
        """The parts of one projection (out, in, ...) at ``site``; None where it is not split, or split into one.

        Raises ``SiteError`` for more parts than there is to own.
        """
        if self.rule.plain or self.split not in (projection, "both"):
            return None
        place, key = place_of(site.key, projection), f"{site.key}/{projection}"
        if self.partition in SLICES:
            axis = 0 if self.partition == "out_slice" else 1
            return Parts.slices(self.rule, clock, place, shape[axis], axis)
        owners = owners_of(random_scores(self.seed, key, shape), self.rule.parts, self.partition)
        initial = random_kaiming(self.seed, f"{key}/start", shape) if projection == "down" else None
        return Parts(self.rule, clock, place, owners, initial, stored=self.stored)


Plain = TypeVar("Plain")


def without_parts(config: Any, kind: type[Plain]) -> Plain:
    """The method ``kind`` with the fields that ``config`` shares with it."""
    names = {field.name for field in fields(config)}
    shared = {field.name for field in fields(kind)} & names  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in shared})


def ticker_for(site: Site, clock: Clock) -> list[tuple[str, Edit]]:
    """What moves the clock, once for each adapter: a tap on the model itself."""
    return [("", Ticker(clock))] if site.index == 0 else []
