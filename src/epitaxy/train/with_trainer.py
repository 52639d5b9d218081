"""Our objective and our clocks in a ``transformers.Trainer`` of the user's own.

    class Mine(WithObjective, Trainer):
        objective = TwoPass()

Everything else is the Trainer's: arguments, data, logging, evaluation on the plain loss, saving.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.errors import UnsupportedError
from epitaxy.core.host import hosted, unwrap
from epitaxy.methods.draws import at_step
from epitaxy.tasks import batch_rows
from epitaxy.tasks.objective import Objective, Part, Turn
from epitaxy.train.config import BaseMode
from epitaxy.train.modes import training_modes

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

IGNORED = -100  # the label of what does not count, in all of transformers


class WithObjective(_Trainer):  # type: ignore[misc]
    """Stands before ``Trainer`` among the parents of a class.

    ``objective`` replaces the loss in training (None: the Trainer's own).  Every training pass tells the clocks of
    the adapters which step and which accumulated batch it is, so that a run resumed by the Trainer draws as the whole
    one would have.  ``base_mode``: see ``TrainConfig``.

    Scores are compared where labels count: all rows of a classifier, all labelled tokens otherwise, shifted by one
    for a causal language model.  ``label_smoothing_factor``, accumulation and ``num_items_in_batch`` mean what they
    mean to the Trainer.  Raises ``UnsupportedError`` for a ``compute_loss_func``, for ``nn.DataParallel`` and for
    DeepSpeed, which have no place for a second pass.
    """

    objective: ClassVar[Objective | None] = None
    base_mode: ClassVar[BaseMode] = "eval"
    _turn: tuple[int, int] = (-1, 0)
    _parts: Iterator[Part] | None = None
    _modes: ExitStack | None = None
    _more: bool = False
    _scale: float = 1.0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: as many backward passes as the objective asks for; returns the loss, detached."""
        step = int(self.state.global_step)
        self._turn = (step, self._turn[1] + 1 if self._turn[0] == step else 0)
        with ExitStack() as self._modes:
            if self.objective is None:
                with at_step(model, *self._turn):
                    loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
                return loss
            return self._all_parts(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In training the next part of the objective; otherwise what the Trainer computes."""
        if model.training and self._modes is not None:
            record = hosted(model)
            trained = [adapter for adapter in record.adapters.values() if adapter.trainable] if record else []
            self._modes.enter_context(training_modes(unwrap(model), trained, self.base_mode))
        if self._parts is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        part = next(self._parts)
        self._more = not part.last
        return part.loss * self._scale

    def _all_parts(self, model: nn.Module, inputs: Any, items: Any) -> Tensor:
        assert self.objective is not None
        self._refuse(inputs)
        batch = dict(self._prepare_inputs(inputs))
        items = items if self.model_accepts_loss_kwargs else None
        averaged = items is not None and self.args.average_tokens_across_devices
        self._scale = float(self.accelerator.num_processes) if averaged else 1.0  # as the Trainer scales its own loss
        task = _LabelledScores(float(self.args.label_smoothing_factor), items, len(batch["labels"]), _shifts(model))
        turn = Turn(*self._turn, no_sync=partial(self.accelerator.no_sync, model))
        parts = self.objective.parts(model, batch, task, turn)
        total = torch.zeros((), device=self.args.device)
        self._parts, self._more = parts, True
        try:
            while self._more:
                total = total + super().training_step(model, inputs, items)
        finally:
            self._parts = None
            parts.close()  # type: ignore[attr-defined]
        return total

    def _refuse(self, inputs: Any) -> None:
        if self.compute_loss_func is not None:
            raise UnsupportedError("compute_loss_func sees one pass only; leave it out, or leave out the objective")
        if self.args.n_gpu > 1:
            raise UnsupportedError("an objective runs in one process for each GPU; start with torchrun or accelerate")
        if self.is_deepspeed_enabled:
            raise UnsupportedError("DeepSpeed allows one backward pass a batch; use DDP, or leave out the objective")
        if "labels" not in inputs:
            raise UnsupportedError(f"the batch has no 'labels', only {', '.join(inputs)}: there is nothing to learn")


@dataclass(frozen=True)
class _LabelledScores:
    """Cross-entropy as the Trainer computes it; ``items`` is what it divides by instead of counting labels."""

    smoothing: float
    items: Any
    rows: int
    shifted: bool

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
        scores: Tensor = output["logits"] if isinstance(output, dict) else output[0]
        return scores[..., :-1, :] if self.shifted else scores

    def criterion(self, logits: Tensor, batch: Any) -> Tensor:
        labels = self._labels(batch)
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise UnsupportedError(
                f"scores of shape {tuple(logits.shape)} are compared for one class each, the labels are "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        losses = F.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        return (losses * self.weights(batch).flatten()).sum()

    def weights(self, batch: Any) -> Tensor:
        counted = self._labels(batch).ne(IGNORED).float()
        if self.items is None:
            return counted / counted.sum()
        share = batch_rows.count(batch) / self.rows  # of the batch, where the second pass sees a part of it
        return counted / (torch.as_tensor(self.items, device=counted.device) * share)

    def _labels(self, batch: Any) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels[..., 1:] if self.shifted else labels


def _shifts(model: nn.Module) -> bool:
    """Whether scores say the next token: the Trainer's own test."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(unwrap(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
