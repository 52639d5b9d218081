"""Classification of pictures, sounds and texts: examples to a batch, a batch to a loss, a data set to metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.tasks.group import Group
from epitaxy.tasks.metrics import SCALARS, Metrics, score

Batch = dict[str, Tensor]


class Opened(Protocol):
    """A model with the processor of its inputs, as ``open_classifier`` returns it."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def processor(self) -> Any: ...
    @property
    def modality(self) -> str: ...
    @property
    def source(self) -> str: ...


class Example(Protocol):
    """A picture, a sound (which can give itself ``at`` another rate) or a text, with its class number and name."""

    @property
    def value(self) -> Any: ...
    @property
    def label(self) -> int: ...
    @property
    def name(self) -> str: ...


class Examples(Protocol):
    """A data set whose labels are known without decoding."""

    @property
    def labels(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Example: ...


Draw = tuple[int, ...]  # what decides the chances of one training example: (seed, epoch, row)


class FrontEnd(Protocol):
    """Makes the input of a model of sounds or pictures; ``draws`` marks training examples."""

    def inputs(self, examples: Sequence[Example], draws: Sequence[Draw] | None = None) -> Mapping[str, Tensor]: ...


class Classification:
    """Cross-entropy over ``classes`` with the inputs that ``opened``'s processor, or ``front_end``, makes."""

    metrics = SCALARS

    def __init__(
        self,
        opened: Opened,
        classes: Sequence[str],
        label_smoothing: float = 0.0,
        front_end: FrontEnd | None = None,
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise EpitaxyError(f"label_smoothing lies in [0, 1), got {label_smoothing}")
        self.processor, self.modality, self.source = opened.processor, opened.modality, opened.source
        self.classes, self.label_smoothing, self.front_end = tuple(classes), label_smoothing, front_end
        self.tokens = _token_limit(opened) if opened.modality == "text" else None

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The model's inputs and ``labels`` (``b``), on the CPU; raises ``FormatError`` naming what does not fit."""
        return self._batch(examples, None)

    def training_batch(self, examples: Sequence[Example], draws: Sequence[Draw]) -> Batch:
        """As ``batch``, for training: each draw alone decides what chance does to its example."""
        return self._batch(examples, draws)

    def _batch(self, examples: Sequence[Example], draws: Sequence[Draw] | None) -> Batch:
        inputs = self._prepare(examples, draws)
        labels = torch.tensor([example.label for example in examples], dtype=torch.long)
        return {**{key: value for key, value in inputs.items() if isinstance(value, Tensor)}, "labels": labels}

    def _prepare(self, examples: Sequence[Example], draws: Sequence[Draw] | None) -> Any:
        values = [example.value for example in examples]
        found = {"vision": "picture", "audio": "sound", "text": "text"}
        kind = "text" if isinstance(values[0], str) else "audio" if hasattr(values[0], "samples") else "vision"
        if kind != self.modality:
            raise FormatError(f"{self.source} reads {found[self.modality]}s, but {examples[0].name} is a {found[kind]}")
        if self.front_end is not None and kind != "text":
            return self.front_end.inputs(examples, draws)
        if kind == "vision":
            return self.processor(images=values, return_tensors="pt")
        if kind == "text":
            return self.processor(values, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        rate = int(self.processor.sampling_rate)
        samples = [wave.at(rate).samples for wave in values]
        raw = self.processor.model_input_names[0] == "input_values"  # spectrograms have a length of their own
        return self.processor(samples, sampling_rate=rate, return_tensors="pt", **({"padding": True} if raw else {}))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores of every class, ``b classes``.

        Where ``batch["windows"]`` says that an example has several rows, their probabilities are averaged.
        """
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch.items()
            if key not in ("labels", "windows")
        }
        output: Tensor = model(**inputs).logits
        if "windows" in batch:
            output = _averaged(output, batch["windows"])
        if output.shape[-1] != len(self.classes):
            raise EpitaxyError(
                f"the model has {output.shape[-1]} outputs but the data have {len(self.classes)} classes; "
                "open it with the labels of the data, or give it a head of that size"
            )
        return output

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch."""
        return self.criterion(self.logits(model, batch), batch)

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the scores of a batch, in fp32."""
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.label_smoothing)

    def evaluate(
        self, model: nn.Module, dataset: Examples, batch_size: int = 64, group: Group | None = None
    ) -> Metrics:
        """Metrics over a whole data set, computed in evaluation mode; the model's mode is restored."""
        group = group or Group()
        if not len(dataset):
            raise EpitaxyError("there is nothing to evaluate: the data set is empty")
        found: list[tuple[list[int], Tensor]] = []
        with _evaluating(model):
            for rows in group.batches(len(dataset), batch_size):
                batch = self.batch([dataset[row] for row in rows])
                found.append((rows, self.logits(model, _to_device(batch, model)).float().cpu()))
        logits = torch.empty(len(dataset), len(self.classes))
        for rows, part in group.gather(found):
            logits[rows] = part
        return score(logits, dataset.labels)


def _token_limit(opened: Opened) -> int | None:
    """The longest text the model takes, in tokens, by its tokenizer or else by its table of positions."""
    limit = int(opened.processor.model_max_length)
    if limit < 1_000_000:  # tokenizers without a limit say 1e30
        return limit
    positions = getattr(getattr(opened.model, "config", None), "max_position_embeddings", None)
    return None if positions is None else int(positions) - 2  # RoBERTa's table starts at two


def _averaged(logits: Tensor, windows: Tensor) -> Tensor:
    """The logarithm of each example's mean probabilities over its windows; of a single one its logits themselves."""
    parts = torch.split(logits, windows.tolist())
    if all(len(part) == 1 for part in parts):
        return logits
    return torch.cat([part if len(part) == 1 else _mean(part.float()) for part in parts])


def _mean(logits: Tensor) -> Tensor:
    return (logits.log_softmax(-1).logsumexp(0, keepdim=True) - math.log(len(logits))).to(logits.dtype)


def _to_device(batch: Batch, model: nn.Module) -> Batch:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {key: value.to(device) for key, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
