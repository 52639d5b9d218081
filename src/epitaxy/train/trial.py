"""One trial: a recipe is trained and measured on the validation data alone, so that its settings can be chosen.

The test data are never looked at and nothing but the scores is kept.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from typing import Any

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.splits import Splits
from epitaxy.train import run_directory
from epitaxy.train.checkpoint import FOLDER
from epitaxy.train.config import TrainResult
from epitaxy.train.environment import describe_environment
from epitaxy.train.prepare import prepare
from epitaxy.train.recipe import Recipe, RecipeError
from epitaxy.train.run import leads, train_prepared
from epitaxy.train.run_directory import TRIAL, claim, held, read_json, require_claimable, write_json
from epitaxy.train.session import DivergenceError


def trial(recipe: Recipe, splits: Splits | None = None, progress: bool = True) -> dict[str, Any]:
    """Train as ``recipe`` says, or go on where an earlier call stopped; returns what ``trial.json`` holds.

    ``score`` is the validation value of ``train.metric``, and ``loss`` the validation loss, of the state that a run
    would keep: the best one with ``train.keep_best``, else the last one.  Of a training that ends in numbers that are
    not finite ``score`` is None and ``failed`` the reason.  Raises ``EpitaxyError`` when there are no validation data.
    """
    from accelerate import PartialState

    processes, out = PartialState(), recipe.out
    require_claimable(recipe)
    if not (out / TRIAL).exists():
        ready = prepare(recipe, splits)
        if not len(ready.splits.validation):
            raise EpitaxyError(f"{recipe.data.source}: settings are chosen on validation data, and there are none")
        processes.wait_for_everyone()
        with held(out) if leads() else nullcontext():
            if leads():
                claim(recipe)
                write_json(out / run_directory.ENVIRONMENT, describe_environment())
            try:
                trained = train_prepared(recipe, ready, out, progress)
                found = _found(recipe, trained)
            except DivergenceError as error:
                found = {**_empty(recipe), "failed": str(error)}
            if leads():
                write_json(out / TRIAL, found)
                shutil.rmtree(out / FOLDER, ignore_errors=True)
            processes.wait_for_everyone()
    return read_trial(recipe)


def read_trial(recipe: Recipe) -> dict[str, Any]:
    """What ``trial.json`` of a finished trial holds; raises ``EpitaxyError`` when it is broken."""
    path = recipe.out / TRIAL
    found = read_json(path)
    if not isinstance(found, dict) or "score" not in found:
        raise EpitaxyError(f"{path}: not what a trial writes; remove it, and the trial is made anew")
    return found


def _empty(recipe: Recipe) -> dict[str, Any]:
    state = "best" if recipe.train.keep_best else "last"
    return {"metric": recipe.train.metric, "seed": recipe.train.seed, "state": state, "score": None, "failed": None}


def _found(recipe: Recipe, trained: TrainResult) -> dict[str, Any]:
    name = f"validation_{recipe.train.metric}"
    evaluated = [record for record in trained.history if name in record]
    if not evaluated:
        raise RecipeError(f"{recipe.out}: the log of this trial holds no {name}; remove the directory and try again")
    kept = evaluated[-1]
    if recipe.train.keep_best:
        kept = next((record for record in evaluated if record["step"] == trained.best_step), kept)
    return {
        **_empty(recipe),
        "score": kept[name],
        "loss": kept["validation_loss"],
        "step": kept["step"],
        "steps": trained.steps,
        "train_seconds": trained.train_seconds,
    }
