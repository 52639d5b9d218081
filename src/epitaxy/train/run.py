"""One run from recipe to result: prepare, train, test, and leave everything behind in the run directory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.files import TENSORS, save
from epitaxy.core.registry import methods_in
from epitaxy.data.splits import Splits
from epitaxy.methods.expert_use import expert_use
from epitaxy.methods.mixture import mixtures_of
from epitaxy.tasks.metrics import Metrics
from epitaxy.train import run_directory, samples
from epitaxy.train.config import TrainResult
from epitaxy.train.environment import describe_environment
from epitaxy.train.front_ends import FRONT_END, settings_of
from epitaxy.train.loop import train
from epitaxy.train.prepare import Prepared, prepare
from epitaxy.train.recipe import Recipe
from epitaxy.train.run_directory import (
    ADAPTER,
    MODEL,
    RESULT,
    SAMPLES,
    claim,
    held,
    read_json,
    require_claimable,
    write_json,
)
from epitaxy.train.saving import save_model, weight_bytes
from epitaxy.train.seeing import normalisation_of, processor_of

SIZES = ("rank", "experts", "slots", "bottleneck", "parts", "tokens")  # fields that say how large a method is


def leads() -> bool:
    """Whether this process is the one that writes and speaks; the others of a distributed run only compute."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def run(recipe: Recipe, splits: Splits | None = None, progress: bool = True) -> dict[str, Any]:
    """Carry out ``recipe``, or go on where an earlier call stopped; returns what ``result.json`` holds.

    A finished run is not repeated.  ``splits`` may hand over data already read.  All processes of a distributed run
    call this.  Raises ``RecipeError`` when the run directory belongs to another recipe or is in use.
    """
    from accelerate import PartialState

    processes = PartialState()
    require_claimable(recipe)
    out = recipe.out
    if not (out / RESULT).exists():
        began = time.perf_counter()
        ready = prepare(recipe, splits, progress and leads())
        processes.wait_for_everyone()
        with held(out) if leads() else nullcontext():
            if leads():
                claim(recipe)
                write_json(out / run_directory.ENVIRONMENT, describe_environment())
            trained = train_prepared(recipe, ready, out, progress)
            if leads():
                _finish(recipe, ready, trained, out, began)
            processes.wait_for_everyone()
    result = read_json(out / RESULT)
    if not isinstance(result, dict) or "test" not in result:
        raise EpitaxyError(f"{out / RESULT}: not the result of a run; remove it, and the run is finished anew")
    return result


def train_prepared(recipe: Recipe, ready: Prepared, out: Path, progress: bool = True) -> TrainResult:
    """Train what ``prepare`` built; without validation data (protocol final) the last step is what is kept."""
    model, splits = ready.opened.model, ready.splits
    data = (splits.train, splits.validation if len(splits.validation) else None)
    return train(model, ready.adapter, ready.task, *data, recipe.train, out, recipe.objective, progress=progress)


def _finish(recipe: Recipe, ready: Prepared, trained: TrainResult, out: Path, began: float) -> None:
    """Test, save, and write the result last: it is the mark of a finished run."""
    batch = recipe.train.evaluation_batch or recipe.train.batch
    tested = ready.task.evaluate(ready.opened.model, ready.splits.test, batch)
    _write_predictions(out, ready, tested, recipe.samples)
    _keep(recipe, out, ready, tested)
    result = {**_result(recipe, ready, trained, tested, out), **_expert_use(ready, batch)}
    write_json(out / RESULT, {**result, "seconds": time.perf_counter() - began})


def _keep(recipe: Recipe, out: Path, ready: Prepared, tested: Metrics) -> None:
    """Save what was trained: the adapter, or the whole model."""
    front_end = settings_of(ready.task)
    if ready.adapter is None:
        if not (out / MODEL).exists():
            processor = processor_of(ready.opened, ready.task.front_end)
            save_model(ready.opened.model, processor, out / MODEL, front_end)
        return
    ready.adapter.provenance = {
        "base": recipe.base.source,
        "data": recipe.data.source,
        "classes": list(ready.splits.classes),
        "test_accuracy": tested.accuracy,
        "test_unweighted_accuracy": tested.unweighted_accuracy,
        "test_macro_f1": tested.macro_f1,
        "seed": recipe.train.seed,
        **({FRONT_END: front_end} if front_end is not None else {}),
    }
    save(ready.opened.model, out / ADAPTER, recipe.name)


def _expert_use(ready: Prepared, batch: int) -> dict[str, Any]:
    """How a mixture of adapters uses its experts on the validation data; nothing for other methods."""
    if ready.adapter is None or not mixtures_of(ready.adapter) or not len(ready.splits.validation):
        return {}
    with expert_use(ready.adapter) as counted:
        ready.task.evaluate(ready.opened.model, ready.splits.validation, batch)
    return {"expert_use": counted()}


def _write_predictions(out: Path, ready: Prepared, tested: Metrics, count: int) -> None:
    test = ready.splits.test
    write_json(
        out / run_directory.PREDICTIONS,
        {
            "classes": list(ready.splits.classes),
            "confusion": tested.confusion,
            "names": list(test.names),
            "targets": tested.targets,
            "predictions": tested.predictions,
            "confidences": tested.confidences,
            "samples": samples.store(test, samples.choose(tested, count), out / SAMPLES),
        },
    )


def _result(recipe: Recipe, ready: Prepared, trained: TrainResult, tested: Metrics, out: Path) -> dict[str, Any]:
    splits, adapter, model = ready.splits, ready.adapter, ready.opened.model
    front_end, normalisation = settings_of(ready.task), normalisation_of(ready.task, recipe.data.image)
    base = sum(p.numel() for name, p in model.named_parameters() if "epitaxy" not in name.split("."))
    return {
        "name": recipe.name,
        "method": method_title(recipe),
        "base": {"source": recipe.base.source, "class": type(model).__name__, "parameters": base},
        "data": {
            "source": recipe.data.source,
            "modality": splits.modality,
            "classes": list(splits.classes),
            "counts": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
            "skipped": [list(entry) for entry in splits.skipped],
            "notes": list(splits.notes),
            **({FRONT_END: front_end} if front_end is not None else {}),
            **({"normalisation": normalisation} if normalisation is not None else {}),
        },
        "seed": recipe.train.seed,
        "test": tested.scalars(),
        **_by_group(splits, tested),
        "validation": {"metric": recipe.train.metric, "best": trained.best_metric, "step": trained.best_step},
        "objective": None if recipe.objective is None else str(recipe.objective),
        "steps": trained.steps,
        "skipped_steps": trained.skipped_steps,
        "stopped_early": trained.stopped_early,
        "trained_parameters": trained.trained_parameters,
        "stored_parameters": base if adapter is None else sum(t.numel() for t in adapter.tensors().values()),
        "file": f"{MODEL}/" if adapter is None else f"{ADAPTER}/{TENSORS}",
        "file_bytes": weight_bytes(out / (MODEL if adapter is None else ADAPTER)),
        "train_seconds": trained.train_seconds,
        "peak_memory": peak_memory(model),
    }


def _by_group(splits: Splits, tested: Metrics) -> dict[str, Any]:
    """Accuracy and size of each set, where the data join several."""
    if not splits.groups:
        return {}
    right: dict[str, list[bool]] = {}
    for target, said in zip(tested.targets, tested.predictions, strict=True):
        right.setdefault(splits.groups[splits.classes[target]], []).append(said == target)
    return {"groups": {name: {"accuracy": sum(own) / len(own), "examples": len(own)} for name, own in right.items()}}


def method_title(recipe: Recipe) -> str:
    """The method in a few words: its name and what sets its size, ``lora (rank 8) + head``."""
    if recipe.full:
        return "full fine-tuning"
    parts = []
    for part in methods_in(recipe.adapter_method()):
        sizes = [f"{name} {getattr(part, name)}" for name in SIZES if hasattr(part, name)]
        deep = ["deep"] if getattr(part, "deep", False) else []
        details = ", ".join([*deep, *sizes])
        parts.append(f"{part.method_name} ({details})" if details else str(part.method_name))
    return " + ".join(parts)


def peak_memory(model: nn.Module) -> Mapping[str, Any]:
    """The most memory held so far, on the accelerator or else by the whole process."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "what": "allocated on the accelerator"}
    try:
        import resource
    except ImportError:  # not on Windows
        return {"bytes": None, "what": "not measured on this system"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "what": "resident, of the whole process"}
