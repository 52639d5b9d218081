"""Many adapters measured on one base that is opened once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from epitaxy.core.errors import FormatError
from epitaxy.core.files import Contents, inspect, load
from epitaxy.core.host import detach
from epitaxy.data.image.spec import ImageSpec
from epitaxy.data.splits import load_splits
from epitaxy.tasks.classification import Classification
from epitaxy.train.front_ends import InputSpec, input_size, input_spec, open_for, saved_spec, stored_spec, task_for
from epitaxy.train.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """What one adapter scored; ``adapter`` is None for the bare base."""

    adapter: str | None
    method: str
    accuracy: float
    unweighted_accuracy: float
    macro_f1: float
    loss: float
    parameters: int
    examples: int
    seconds: float


def evaluate(recipe: Recipe, adapters: Sequence[Path], split: str, batch: int, progress: bool = False) -> list[Row]:
    """Metrics of each adapter in turn on ``split`` of the recipe's data, on the recipe's base.

    The bare base comes first where it has a head of its own for these classes.  Every file is looked at before
    anything is measured.  An adapter is measured with the front end it was trained with, a model that we saved with the
    one beside it.  Raises ``FormatError`` for an adapter of other classes, or for adapters whose models read inputs of
    different sizes.
    ``progress`` shows what takes long.
    """
    contents = [inspect(path) for path in adapters]
    splits = load_splits(recipe.data).lazily()
    for found in contents:
        _require_classes(found, splits.classes)
    asked = input_spec(recipe.data, splits, saved_spec(recipe.base.source))
    specs = [stored_spec(found.provenance, str(found.path), asked) or asked for found in contents]
    _require_one_size(contents, specs)
    spec = specs[0] if specs else asked
    opened = open_for(recipe.base.source, splits.classes, recipe.base.dtype, spec)
    model, data = opened.model, getattr(splits, split)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def measure(task: Classification, path: Path | None, method: str, parameters: int) -> Row:
        began = time.perf_counter()
        found = task.evaluate(model, data, batch)
        seconds = time.perf_counter() - began
        name = None if path is None else str(path)
        return Row(name, method, **found.scalars(), parameters=parameters, examples=len(data), seconds=seconds)

    def each() -> Iterator[Row]:
        if opened.head == "kept":
            yield measure(task_for(opened, splits, spec, progress), None, "the base alone", 0)
        for path, own in zip(adapters, specs, strict=True):
            adapter = load(model, path, "measured")
            try:
                task = task_for(opened, splits, own, progress)
                yield measure(task, path, " + ".join(entry["method"] for entry in adapter.config), adapter.size())
            finally:
                detach(model, "measured")

    rows = list(each())
    if not rows:
        raise FormatError(f"{recipe.base.source}: has no task head for these classes; name adapters to evaluate")
    return rows


def _require_one_size(contents: Sequence[Contents], specs: Sequence[InputSpec | None]) -> None:
    """One opened base reads clips of one length."""
    for found, spec in zip(contents, specs, strict=True):
        first = specs[0]
        if spec is not None and first is not None and input_size(spec) != input_size(first):
            raise FormatError(
                f"{found.path}: was trained on {_size(spec)}, {contents[0].path} on {_size(first, brief=True)}; "
                "measure them one at a time"
            )


def _size(spec: InputSpec, brief: bool = False) -> str:
    if isinstance(spec, ImageSpec):
        return f"pictures of {spec.size} pixels"
    return f"{spec.frames} and {spec.mels}" if brief else f"{spec.frames} frames and {spec.mels} mel bins"


def _require_classes(found: Contents, classes: Sequence[str]) -> None:
    trained = found.provenance.get("classes")
    if isinstance(trained, list) and [str(name) for name in trained] != list(classes):
        raise FormatError(
            f"{found.path}: trained for {len(trained)} classes ({', '.join(map(str, trained[:6]))}), "
            f"the data have {len(classes)} ({', '.join(classes[:6])})"
        )
