"""A run directory as the report sees it.  Only files are read: neither the data nor the model is needed."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
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
    text = (path / RECIPE).read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict):
        raise EpitaxyError(f"{path / RECIPE}: not readable as a recipe")
    return Run(
        path,
        text,
        recipe,
        _json(path / ENVIRONMENT) or {},
        _lines(path / METRICS),
        _json(path / RESULT),
        _json(path / PREDICTIONS),
    )


def data_uri(path: Path) -> str | None:
    """A PNG as text that a page can hold, or None when the file is gone."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EpitaxyError(f"{path}: not readable as JSON ({error})") from None


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a log; the last one may be torn while a run goes on."""
    if not path.is_file():
        return []
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise EpitaxyError(f"{path}, line {number}: not readable as JSON") from None
    return found
