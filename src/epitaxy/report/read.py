"""A run directory as the report sees it.  Only files are read: neither the data nor the model is needed."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError

RECIPE, RESULT, METRICS = "recipe.yaml", "result.json", "metrics.jsonl"
ENVIRONMENT, PREDICTIONS = "environment.json", "predictions.json"


@dataclass(frozen=True)
class Run:
    """What a run left behind; one that is not finished has no ``result`` and no ``predictions``."""

    path: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    result: Mapping[str, Any] | None = None
    predictions: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.recipe.get("name", self.path.name))


def read_run(path: Path) -> Run:
    """Read a run directory; raises ``EpitaxyError`` naming the file that is missing or broken."""
    import yaml

    if not (path / RECIPE).is_file():
        raise EpitaxyError(f"{path}: not a run directory, {RECIPE} is missing")
    text, recipe = _text(path / RECIPE), None
    with suppress(yaml.YAMLError):
        recipe = yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise EpitaxyError(f"{path / RECIPE}: not readable as a recipe")
    return Run(
        path,
        text,
        recipe,
        _json(path / ENVIRONMENT) or {},
        _lines(path / METRICS),
        _json(path / RESULT, needed=("method", "base", "data", "test", "validation", "peak_memory")),
        _json(path / PREDICTIONS, needed=("classes", "confusion", "names", "targets", "predictions", "confidences")),
    )


def data_uri(path: Path) -> str | None:
    """A PNG as text that a page can hold, or None when the file is gone."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EpitaxyError(f"{path}: not a text file in UTF-8") from None


def _json(path: Path, needed: Sequence[str] = ()) -> Mapping[str, Any] | None:
    """The object in a file, or None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise EpitaxyError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise EpitaxyError(f"{path}: expected an object with named fields, found {type(value).__name__}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise EpitaxyError(f"{path}: not what a run writes, {missing[0]!r} is missing")
    return value


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a log; the last one may be torn while a run goes on."""
    if not path.is_file():
        return []
    found: list[Mapping[str, Any]] = []
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise EpitaxyError(f"{path}, line {number}: not readable as JSON") from None
        if not isinstance(value, dict):
            raise EpitaxyError(f"{path}, line {number}: expected an object with named fields")
        found.append(value)
    return found
