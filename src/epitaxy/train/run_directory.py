"""The directory of one run: which recipe it belongs to, what lies in it, and whether it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import write_atomically, writing
from epitaxy.train.config import FREE
from epitaxy.train.recipe import Recipe, RecipeError, differences, from_dict
from epitaxy.train.strict_yaml import read

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RECIPE, ENVIRONMENT, METRICS, RESULT = "recipe.yaml", "environment.json", "metrics.jsonl", "result.json"
TRIAL = "trial.json"
PREDICTIONS, ADAPTER, MODEL, SAMPLES = "predictions.json", "adapter", "model", "samples"
LOCK = ".lock"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the run directory ``out``, making it if need be; raises when another process is at work in it.

    The system lets go of it when the process ends, however it ends.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (out / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{out}: another process is at work on this run; wait for it, or end it") from None
        except OSError:  # some network file systems have no locks
            pass
        yield


def claim(recipe: Recipe) -> Path:
    """Make the run directory of ``recipe``, or find it again; raises as ``require_claimable`` does.

    What a killed run left half-written is cleared away.
    """
    require_claimable(recipe)
    out = recipe.out
    for draft in _drafts(out):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
    if not (out / RECIPE).exists() or differences(read_recipe(out), recipe):
        write_atomically(out / RECIPE, recipe.to_yaml().encode())
    return out


def require_claimable(recipe: Recipe) -> None:
    """Raise ``RecipeError`` when the run directory holds foreign files, or a run of another recipe that has begun.

    The message names the keys that differ; those that change no result may.
    """
    out = recipe.out
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out}: expected a run directory, found a file")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    found -= {LOCK, *(path.name for path in _drafts(out))}
    if RECIPE not in found:
        if found:
            raise RecipeError(f"{out}: holds files that are no run ({RECIPE} is missing); choose another directory")
    elif found - {RECIPE, ENVIRONMENT}:
        free = {f"train.{key}" for key in FREE}
        keys = [key for key in differences(read_recipe(out), recipe) if key not in free]
        if keys:
            raise RecipeError(
                f"{out}: holds a run of another recipe, which differs in {', '.join(keys)}; "
                f"choose another directory with out=..., or remove this one"
            )


def _drafts(out: Path) -> Iterator[Path]:
    """Drafts that were never moved into place: hidden, and named after what they were to become."""
    for name in (RECIPE, ENVIRONMENT, PREDICTIONS, RESULT, TRIAL, MODEL):
        yield from out.glob(f".{name}.*")
    for folder in (ADAPTER, SAMPLES):
        yield from (out / folder).glob(".*")


def read_recipe(run: Path) -> Recipe:
    """The resolved recipe of the run in ``run``."""
    file = run / RECIPE
    if not file.is_file():
        raise RecipeError(f"{run}: not a run directory, {RECIPE} is missing")
    values = read(file)
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: expected a mapping")
    return from_dict(values, str(file))


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory."""
    return (path / RECIPE).is_file()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; raises ``EpitaxyError`` when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EpitaxyError(f"{path}: no such file") from None
    except ValueError as error:
        raise EpitaxyError(f"{path}: not readable as JSON ({error})") from None
