"""Settings chosen on validation data: every value of some keys is tried, and the best one makes the runs of a cell.

The test data take no part: a trial is trained and measured on the validation data alone (``train.trial``).  What a
paper reports after choosing by the test score is too good by an amount that nobody knows; here every row of a table
has its settings chosen by the same rule.

The best mean score over the seeds of the trials wins, then the lower mean validation loss, then the value written
first.  A training that ended in numbers that are not finite loses.  A set whose protocol is ``final`` has no
validation data; its trials use the protocol ``select``, and are judged by their last step, which is what its runs test.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.spec import FINAL, SELECT
from epitaxy.train.recipe import Recipe, RecipeError
from epitaxy.train.recipe_files import with_keys
from epitaxy.train.run_directory import TRIAL
from epitaxy.train.session import is_better
from epitaxy.train.trial import read_trial

FIXED = ("name", "out", "samples", "data", "train.seed", "train.metric")  # what no validation score can choose
PREPARATION = ("data.image.", "data.audio.")  # but these are settings of the input


@dataclass(frozen=True)
class Trial:
    """One training of a cell with one option, told apart by ``title``."""

    recipe: Recipe
    fold: int | None
    seed: int
    title: str


@dataclass(frozen=True)
class Option:
    """Values of the keys that are chosen, and the trials that measure them."""

    values: Mapping[str, Any]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Choice:
    """What one fold of a cell is chosen among."""

    fold: int | None
    options: tuple[Option, ...]

    def trials(self) -> Iterator[Trial]:
        """All trials, option by option."""
        return (trial for option in self.options for trial in option.trials)


@dataclass(frozen=True)
class Verdict:
    """How a choice stands; ``chosen`` is None until every trial is finished, or when all of them failed.

    ``options`` are plain data: ``values``, mean ``score`` in percent where the metric is a share, mean ``loss``, how
    many trials are ``finished``, the runs' ``paths``, and why the option ``failed``.
    """

    chosen: Mapping[str, Any] | None
    options: tuple[Mapping[str, Any], ...]
    metric: str
    fold: int | None = None

    @property
    def edges(self) -> tuple[str, ...]:
        """The chosen keys that lie at an end of the three or more numbers tried: a wider list may hold better ones."""
        found = []
        for key, value in (self.chosen or {}).items():
            tried = {option["values"][key] for option in self.options if _is_number(option["values"][key])}
            if len(tried) > 2 and value in (min(tried), max(tried)):
                found.append(key)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        chosen = None if self.chosen is None else dict(self.chosen)
        options = [dict(option) for option in self.options]
        return {"fold": self.fold, "metric": self.metric, "chosen": chosen, "edges": self.edges, "options": options}


def options_of(select: Mapping[str, Sequence[Any]], origin: str) -> list[dict[str, Any]]:
    """Every combination of the values of ``select``; raises ``RecipeError`` for a key that cannot be chosen."""
    for key, values in select.items():
        fixed = next((name for name in FIXED if key == name or key.startswith(f"{name}.")), None)
        if fixed is not None and not key.startswith(PREPARATION):
            raise RecipeError(
                f"{origin}: select: {key!r} cannot be chosen by validation; choose among method and train"
            )
        if not values:
            raise RecipeError(f"{origin}: select.{key}: expected a list of values to try, found none")
    if not select:
        return []
    return [dict(zip(select, values, strict=True)) for values in itertools.product(*select.values())]


def trial_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys in which a trial differs from ``recipe`` where that leaves no validation data."""
    if recipe.data.protocol != FINAL:
        return {}
    return {"data.protocol": SELECT, "train.keep_best": False, "train.patience": None}


def described(values: Mapping[str, Any]) -> str:
    """Values as text: ``learning_rate 0.005, dropout 0.1``."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


def judge(choice: Choice) -> Verdict:
    """Read the finished trials of ``choice``."""
    rows: list[dict[str, Any]] = []
    metric = next(choice.trials()).recipe.train.metric
    for option in choice.options:
        found = [read_trial(trial.recipe) for trial in option.trials if (trial.recipe.out / TRIAL).exists()]
        failed = next((one["failed"] or "no finite score" for one in found if one["score"] is None), None)
        whole = len(found) == len(option.trials) and failed is None
        losses = [one["loss"] for one in found if one.get("loss") is not None]
        rows.append(
            {
                "values": dict(option.values),
                "score": statistics.fmean(one["score"] for one in found) if whole else None,
                "loss": statistics.fmean(losses) if whole and len(losses) == len(found) else None,
                "finished": len(found),
                "planned": len(option.trials),
                "failed": failed,
                "paths": [str(trial.recipe.out) for trial in option.trials],
            }
        )
    chosen: dict[str, Any] | None = None
    if all(row["finished"] == row["planned"] for row in rows):
        for row in rows:
            if row["score"] is not None and (chosen is None or _beats(metric, row, chosen)):
                chosen = row
    return Verdict(None if chosen is None else chosen["values"], tuple(rows), metric, choice.fold)


def settled(recipe: Recipe, choice: Choice) -> Recipe:
    """``recipe`` with the values that won; raises ``EpitaxyError`` while there are none."""
    verdict = judge(choice)
    if verdict.chosen is None:
        done, planned = (sum(row[key] for row in verdict.options) for key in ("finished", "planned"))
        if done < planned:
            raise EpitaxyError(f"its settings are not chosen yet: {planned - done} of {planned} trials are open")
        raise EpitaxyError(f"every setting tried failed, the first: {verdict.options[0]['failed']}")
    return with_keys(recipe, verdict.chosen, f"{recipe.out}: select")


def _beats(metric: str, row: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    if row["score"] != best["score"]:
        return is_better(metric, row["score"], best["score"])
    return row["loss"] is not None and (best["loss"] is None or row["loss"] < best["loss"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
