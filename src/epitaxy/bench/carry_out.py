"""Carrying out a grid: one run after the other, each in a directory of its own, finished ones left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from epitaxy.bench.choosing import Trial, settled
from epitaxy.bench.grid import Cell, Planned
from epitaxy.core.errors import EpitaxyError
from epitaxy.data.splits import DataSpec, Splits, load_splits
from epitaxy.report import build_report
from epitaxy.report.page import PAGE
from epitaxy.train.checkpoint import FOLDER
from epitaxy.train.run import leads, run
from epitaxy.train.run_directory import RECIPE, RESULT, TRIAL
from epitaxy.train.trial import trial

Piece = Planned | Trial
Told = Callable[[Cell, Piece, "dict[str, Any] | None", "str | None", bool], None]


@dataclass
class Shelf:
    """The data read last: the runs of a grid are in an order in which many in turn share them."""

    spec: DataSpec | None = None
    splits: Splits | None = field(default=None, repr=False)

    def get(self, spec: DataSpec) -> Splits:
        """The splits of ``spec``, read only when they are not at hand."""
        if self.splits is None or spec != self.spec:
            self.spec = self.splits = None  # the old ones go before the new ones come
            self.splits = load_splits(spec)
            self.spec = spec
        return self.splits


def ordered(cells: Sequence[Cell]) -> list[tuple[Cell, Piece]]:
    """All trials and runs: those on the same data next to each other, the trials of a fold before its runs."""
    pairs: list[tuple[Cell, Piece]] = []
    for cell in cells:
        pairs += [(cell, piece) for piece in cell.trials]
        pairs += [(cell, piece) for piece in cell.runs]
    columns = list(dict.fromkeys(cell.column for cell in cells))
    return sorted(
        pairs, key=lambda pair: (columns.index(pair[0].column), pair[1].fold or 0, isinstance(pair[1], Planned))
    )


def carry_out(cells: Sequence[Cell], told: Told, stop: bool = False, progress: bool = True) -> dict[str, str]:
    """Carry out every trial and run that is not finished; returns why some failed, by name.

    ``told`` hears of each: its result, or why it failed, and whether it was finished before.  A failure ends the grid
    with ``stop``, else the others go on.
    """
    failures: dict[str, str] = {}
    shelf = Shelf()
    for cell, piece in ordered(cells):
        finished = standing(piece) == "finished"
        try:
            result = _one(cell, piece, shelf, finished, progress)
        except Exception as error:  # one broken cell does not take the others along
            reason = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, EpitaxyError):
                reason = f"{type(error).__name__}: {reason}"
            failures[f"{cell.title}, {piece.title}"] = reason
            told(cell, piece, None, reason, finished)
            if stop:
                break
            continue
        told(cell, piece, result, None, finished)
    return failures


def _one(cell: Cell, piece: Piece, shelf: Shelf, finished: bool, progress: bool) -> dict[str, Any]:
    if isinstance(piece, Trial):
        return trial(piece.recipe, None if finished else shelf.get(piece.recipe.data), progress)
    choice = cell.choice(piece.fold)
    recipe = piece.recipe if choice is None else settled(piece.recipe, choice)
    result = run(recipe, None if finished else shelf.get(recipe.data), progress=progress)
    if leads():
        shutil.rmtree(recipe.out / FOLDER, ignore_errors=True)  # of no use any more, and large for full models
        if not finished or not (recipe.out / PAGE).exists():
            build_report(recipe.out)
    return result


def standing(piece: Piece) -> str:
    """How far a trial or run is: finished, begun or open."""
    out = piece.recipe.out
    last = TRIAL if isinstance(piece, Trial) else RESULT
    return "finished" if (out / last).exists() else "begun" if (out / RECIPE).exists() else "open"
