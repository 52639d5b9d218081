"""Choose the learning rate of every recipe of a demo on the validation split.

Each rate is tried with a few seeds that the demo itself does not use; the best mean validation accuracy wins, and of
equal ones the lower validation loss.  The test split is never evaluated.  The winners stand in ``recipes/demo``.

    python -m scripts.choose_demo_settings vision --out settings.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from epitaxy.cli.demo import DEMOS
from epitaxy.data.splits import Splits, load_splits
from epitaxy.train.loop import train
from epitaxy.train.prepare import prepare
from epitaxy.train.recipe import Recipe
from epitaxy.train.recipe_files import load_recipe

RATES = {"linear-probe": (3e-3, 1e-2, 3e-2), "full": (1e-4, 3e-4, 1e-3)}
USUAL_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Trial:
    """One recipe with one learning rate: validation accuracy and loss of each seed."""

    recipe: str
    learning_rate: float
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return statistics.fmean(self.accuracies), -statistics.fmean(self.losses)


def validate(recipe: Recipe, splits: Splits) -> tuple[float, float]:
    """Train in a scratch directory; the best validation accuracy and the loss at that step."""
    with tempfile.TemporaryDirectory() as scratch:
        ready = prepare(recipe, splits)
        result = train(
            ready.opened.model,
            ready.adapter,
            ready.task,
            splits.train,
            splits.validation,
            recipe.train,
            Path(scratch),
            recipe.objective,
            progress=False,
        )
    best = next(line for line in result.history if line["step"] == result.best_step and "validation_loss" in line)
    return float(best["validation_accuracy"]), float(best["validation_loss"])


def trials(name: str, seeds: Sequence[int]) -> Iterator[Trial]:
    """Every learning rate of one recipe."""
    recipe = load_recipe(f"shipped:{name}")
    splits = load_splits(recipe.data)
    for rate in RATES.get(name.rpartition("/")[2], USUAL_RATES):
        scores = [
            validate(recipe.model_copy(update={"train": replace(recipe.train, learning_rate=rate, seed=seed)}), splits)
            for seed in seeds
        ]
        accuracies, losses = zip(*scores, strict=True)
        yield Trial(name, rate, accuracies, losses)


def main() -> None:
    """Try everything and print what to write into the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=list(DEMOS), help="whose recipes")
    parser.add_argument("--recipe", action="append", help="only this one (may be repeated)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write every trial to this JSON file")
    arguments = parser.parse_args()
    found: list[Trial] = []
    demo = DEMOS[arguments.system]
    for name in [f"{demo.folder}/{recipe}" for recipe in arguments.recipe or demo.recipes]:
        for trial in trials(name, arguments.seeds):
            found.append(trial)
            shown = ", ".join(f"{accuracy:.3f}" for accuracy in trial.accuracies)
            loss = statistics.fmean(trial.losses)
            print(f"{name:24s} {trial.learning_rate:<8g} validation {shown}  loss {loss:.3f}", flush=True)
        best = max((trial for trial in found if trial.recipe == name), key=lambda trial: trial.rank)
        print(f"{name:24s} -> learning_rate: {best.learning_rate:g}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([asdict(trial) for trial in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
