"""From a recipe to the things a run needs: data, base, adapter and task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.errors import EpitaxyError
from epitaxy.core.host import attach
from epitaxy.data.splits import Splits, load_splits
from epitaxy.methods.saliency import balance, wants_balance
from epitaxy.models.opening import Opened
from epitaxy.tasks.classification import Batch, Classification
from epitaxy.train.front_ends import input_spec, open_for, task_for
from epitaxy.train.recipe import Recipe

SALIENCY_BATCHES = 8
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Prepared:
    """Everything built and nothing trained; ``adapter`` is None for full fine-tuning."""

    opened: Opened
    adapter: Adapter | None
    splits: Splits
    task: Classification


def prepare(recipe: Recipe, splits: Splits | None = None, progress: bool = False) -> Prepared:
    """Read the data, open the base, put a fresh adapter on it; the same recipe always gives the same start.

    ``progress`` shows what takes long.

    Raises ``EpitaxyError`` when the parts do not fit, such as a fresh task head that nothing would train.
    """
    splits = (load_splits(recipe.data) if splits is None else splits).lazily()
    spec = input_spec(recipe.data, splits)
    torch.manual_seed(recipe.train.seed)
    opened = open_for(recipe.base.source, splits.classes, recipe.base.dtype, spec)
    adapter = None
    if not recipe.full:
        adapter = attach(opened.model, recipe.adapter_method(), recipe.name)
        _require_head(recipe, opened, adapter)
        keep_all_layers(opened.model)
    ready = Prepared(opened, adapter, splits, task_for(opened, splits, spec, progress))
    if adapter is not None and wants_balance(adapter.method):
        batches = _some_batches(ready, recipe.train.batch, recipe.train.seed)
        balance(opened.model, adapter, batches, ready.task.loss)
    return ready


def _some_batches(ready: Prepared, size: int, seed: int) -> Iterator[Batch]:
    """Batches of the training data, in an order drawn from the seed: what owners from data are told by."""
    order = torch.randperm(len(ready.splits.train), generator=torch.Generator().manual_seed(seed))
    for start in range(0, min(len(order), SALIENCY_BATCHES * size), size):
        yield ready.task.batch([ready.splits.train[int(row)] for row in order[start : start + size]])


def keep_all_layers(model: nn.Module) -> None:
    """Switch layer drop off: it regularises weights that are frozen here, and would leave out adapters with them."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in LAYER_DROPS:
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)


def _require_head(recipe: Recipe, opened: Opened, adapter: Adapter) -> None:
    if opened.head == "fresh" and not any(piece.role == "head" for piece in adapter.pieces):
        names = [entry["method"] for entry in recipe.method]
        raise EpitaxyError(
            f"the base {opened.source!r} has no task head for these classes, so one was drawn at random, and the "
            f"method {' + '.join(names)} would neither train nor save it; write method: [{', '.join([*names, 'head'])}]"
        )
