"""What a recipe will cost and give, told before it runs.

Parameters, file size, merging and export are found by building the adapter and trying.  Time and activation memory
are estimates from a probe: a few real training steps on real batches, whose weights are thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError, UnsupportedError
from epitaxy.core.explain import explain
from epitaxy.core.files import TENSORS, formats, save
from epitaxy.core.fold import fold
from epitaxy.core.host import activate
from epitaxy.core.merge import merge, unmerge
from epitaxy.tasks.classification import Classification
from epitaxy.train.config import count_steps, evaluation_interval
from epitaxy.train.front_ends import FRONT_END, settings_of
from epitaxy.train.prepare import Prepared, prepare
from epitaxy.train.probe import Measured, probe
from epitaxy.train.recipe import Recipe
from epitaxy.train.run import method_title
from epitaxy.train.session import check_metric
from epitaxy.train.tracking import check_trackers
from epitaxy.train.trainable import objective_for


@dataclass(frozen=True)
class Ability:
    """Whether something can be done with the result, and if not, why."""

    name: str
    possible: bool
    reason: str = ""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes during training, by what they hold."""

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.trained + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Time:
    """Estimated seconds, from the median of ``steps`` measured training steps and one measured evaluation."""

    step: float
    training: float
    evaluation: float
    measured_steps: int

    @property
    def total(self) -> float:
        """The whole run."""
        return self.training + self.evaluation


@dataclass(frozen=True)
class Objective:
    """What replaces the plain loss: work and activations as multiples of a plain step's."""

    title: str
    work: float
    activations: float


@dataclass(frozen=True)
class Plan:
    """Everything ``epitaxy plan`` prints."""

    title: str
    base: str
    base_parameters: int
    head: str
    trained_parameters: int
    stored_parameters: int
    file_bytes: int
    places: tuple[str, ...]
    data: Mapping[str, Any]
    steps: int
    objective: Objective | None
    merge: Ability
    fold: Ability
    exports: tuple[Ability, ...]
    memory: Memory
    time: Time | None
    device: str


def plan(recipe: Recipe, measure: bool = True, progress: bool = False) -> Plan:
    """Work out the cost of ``recipe``; ``measure=False`` leaves out what has to be measured, ``progress`` shows what
    takes long.

    Raises ``EpitaxyError`` for whatever would stop the run before its first step.
    """
    check_trackers(recipe.train.trackers)
    check_metric(recipe.train.metric, Classification.metrics)
    ready = prepare(recipe, progress=progress)
    model, adapter, splits = ready.opened.model, ready.adapter, ready.splits
    explanation = explain(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = count_steps(recipe.train, len(splits.train))
    stored, size, exports = _stored(model, adapter, recipe.name)
    mergeable = _merges(model, adapter)
    objective_for(adapter, recipe.objective)  # refuses what would be refused
    objective = _objective(recipe)
    measured = probe(ready, recipe.train, recipe.objective) if measure else None
    own = {id(parameter) for parameter in adapter.parameters()} if adapter is not None else {id(p) for p in trained}
    bytes_trained = sum(p.numel() * p.element_size() for p in trained)
    memory = Memory(
        base=sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in own),
        trained=bytes_trained,
        gradients=bytes_trained,
        optimizer=2 * bytes_trained,  # AdamW keeps two moments of each parameter
        activations=round(measured.activations * (objective.activations if objective else 1)) if measured else None,
    )
    return Plan(
        title=method_title(recipe),
        base=explanation.base,
        base_parameters=explanation.base_parameters,
        head=ready.opened.head,
        trained_parameters=sum(p.numel() for p in trained),
        stored_parameters=stored,
        file_bytes=size,
        places=explanation.adapters[0].places if explanation.adapters else ("every parameter of the base",),
        data={
            "source": recipe.data.source,
            "modality": splits.modality,
            "classes": list(splits.classes),
            "counts": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
            "skipped": len(splits.skipped),
            "left_out": [list(entry) for entry in splits.skipped],
            "notes": list(splits.notes),
            FRONT_END: settings_of(ready.task),
        },
        steps=steps,
        objective=objective,
        merge=mergeable,
        fold=_folds(model, adapter),
        exports=exports,
        memory=memory,
        time=_time(measured, recipe, ready, steps) if measured else None,
        device=str(next(model.parameters()).device),
    )


def _objective(recipe: Recipe) -> Objective | None:
    found = recipe.objective
    return None if found is None else Objective(str(found), found.cost(not recipe.full), found.memory)


def _merges(model: nn.Module, adapter: Adapter | None) -> Ability:
    if adapter is None:
        return Ability("merge", True, "the base itself is trained; there is nothing to merge")
    try:
        merge(model, adapter.name)
    except UnsupportedError as error:
        return Ability("merge", False, str(error))
    unmerge(model, adapter.name)
    activate(model, adapter.name)
    return Ability("merge", True, "into the weights of the base, at no cost when it runs")


def _folds(model: nn.Module, adapter: Adapter | None) -> Ability:
    if adapter is None:
        return Ability("fold", True, "the base itself is trained; there is nothing to fold")
    own = {id(parameter) for parameter in adapter.parameters()}
    before = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    try:
        after = sum(parameter.numel() for parameter in fold(model, adapter.name).parameters())
    except UnsupportedError as error:
        return Ability("fold", False, str(error))
    if after == before:
        return Ability("fold", True, "all of it merges")
    return Ability(
        "fold", True, f"into wider feed-forwards of the same class, {after / before - 1:.2%} more parameters"
    )


def _stored(model: nn.Module, adapter: Adapter | None, name: str) -> tuple[int, int, tuple[Ability, ...]]:
    """Stored values, bytes of the file, and what becomes of it in every format, by writing it to a scratch place."""
    if adapter is None:
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        reason = "full fine-tuning has no adapter; the whole model is saved as transformers saves it"
        return sum(p.numel() for p in model.parameters()), size, (Ability("transformers model", True, reason),)
    exports, size = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for format in (name for name, entry in formats().items() if entry.write is not None):
            try:
                save(model, Path(scratch) / format, name, format)
                exports.append(Ability(format, True))
            except EpitaxyError as error:
                exports.append(Ability(format, False, str(error)))
        size = (Path(scratch) / "epitaxy" / TENSORS).stat().st_size
    return sum(tensor.numel() for tensor in adapter.tensors().values()), size, tuple(exports)


def _time(measured: Measured, recipe: Recipe, ready: Prepared, steps: int) -> Time:
    config, splits = recipe.train, ready.splits
    rounds = -(-steps // evaluation_interval(config, len(splits.train)))
    evaluated = rounds * len(splits.validation) + len(splits.test)
    return Time(measured.step, measured.step * steps, measured.evaluation * evaluated, measured.steps)
