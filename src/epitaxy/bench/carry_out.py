"""Carrying out a grid: one run after the other, each in a directory of its own, finished ones left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from epitaxy.bench.grid import Cell, Planned
from epitaxy.core.errors import EpitaxyError
from epitaxy.data.splits import DataSpec, Splits, load_splits
from epitaxy.report import build_report
from epitaxy.report.page import PAGE
from epitaxy.train.checkpoint import FOLDER
from epitaxy.train.run import leads, run
from epitaxy.train.run_directory import RECIPE, RESULT

Told = Callable[[Cell, Planned, "dict[str, Any] | None", "str | None", bool], None]


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


def ordered(cells: Sequence[Cell]) -> list[tuple[Cell, Planned]]:
    """All runs, those on the same data next to each other."""
    pairs = [(cell, planned) for cell in cells for planned in cell.runs]
    columns = list(dict.fromkeys(cell.column for cell in cells))
    return sorted(pairs, key=lambda pair: (columns.index(pair[0].column), pair[1].fold or 0))


def carry_out(cells: Sequence[Cell], told: Told, stop: bool = False, progress: bool = True) -> dict[str, str]:
    """Carry out every run that is not finished; returns why runs failed, by name.

    ``told`` hears of every run: its result, or why it failed, and whether it was finished before.  A failure ends the
    grid with ``stop``, else the others go on.
    """
    failures: dict[str, str] = {}
    shelf = Shelf()
    for cell, planned in ordered(cells):
        recipe = planned.recipe
        finished = (recipe.out / RESULT).exists()
        try:
            result = run(recipe, None if finished else shelf.get(recipe.data), progress=progress)
            if leads():
                shutil.rmtree(recipe.out / FOLDER, ignore_errors=True)  # of no use any more, and large for full models
                if not finished or not (recipe.out / PAGE).exists():
                    build_report(recipe.out)
        except Exception as error:  # one broken cell does not take the others along
            reason = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, EpitaxyError):
                reason = f"{type(error).__name__}: {reason}"
            failures[f"{cell.title}, {planned.title}"] = reason
            told(cell, planned, None, reason, finished)
            if stop:
                break
            continue
        told(cell, planned, result, None, finished)
    return failures


def standing(planned: Planned) -> str:
    """How far a run is: finished, begun or open."""
    out = planned.recipe.out
    return "finished" if (out / RESULT).exists() else "begun" if (out / RECIPE).exists() else "open"
