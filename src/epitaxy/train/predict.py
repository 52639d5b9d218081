"""A trained classifier on new inputs: scores of every class for files, and for every window of long sounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.core.files import inspect, load
from epitaxy.core.merge import MergeReport, merge
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.inputs import Piece, Windows, pieces
from epitaxy.models.opening import Opened
from epitaxy.tasks.classification import Classification
from epitaxy.train.front_ends import InputSpec, front_end_for, open_for, saved_spec, stored_spec
from epitaxy.train.run_directory import ADAPTER, MODEL, RESULT, is_run, read_json, read_recipe

Aggregate = Literal["mean", "max"]
CONFIG = "config.json"  # of transformers
WINDOW = 30.0  # seconds, for a model that was trained on sounds of any length


@dataclass(frozen=True)
class Window:
    """Scores of one window, from ``start`` to ``end`` in seconds."""

    start: float
    end: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """Scores of one input, in the order of the classes; ``windows`` are those of a sound."""

    name: str
    scores: tuple[float, ...]
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """An input that could not be read, and why."""

    name: str
    reason: str


@dataclass
class Predictor:
    """A classifier with its adapter, ready for new inputs; ``seconds`` is the length of the clips it was trained on."""

    model: nn.Module
    task: Classification
    classes: tuple[str, ...]
    source: str
    spec: InputSpec | None = None
    adapter: str | None = None

    @property
    def seconds(self) -> float | None:
        """Length of the trained clips; None where it may be any."""
        frames = getattr(getattr(self.task.front_end, "spec", None), "frames", None)
        return None if frames is None else frames / 100

    def windows(self, length: float | None = None, hop: float | None = None) -> Windows | None:
        """How sounds are cut: by default windows of the trained length, every half of it; None for other inputs."""
        if self.task.modality != "audio":
            if length is not None or hop is not None:
                raise EpitaxyError(f"{self.source} reads no sounds, and only sounds are cut into windows")
            return None
        if length is not None and self.seconds is not None and length > self.seconds:
            raise EpitaxyError(
                f"the window may be as long as the clips of the training, {self.seconds:g} seconds, got {length:g}"
            )
        length = length or self.seconds or WINDOW
        mono = self.spec.mono if isinstance(self.spec, AudioSpec) else "mean"
        return Windows(length, length / 2 if hop is None else hop, int(self.task.processor.sampling_rate), mono)

    def merge(self) -> MergeReport:
        """Fold the adapter into the model, where its method can; raises ``UnsupportedError`` where not."""
        if self.adapter is None:
            raise EpitaxyError(f"{self.source}: a whole model without an adapter, there is nothing to merge")
        return merge(self.model, self.adapter)

    def predict(
        self, files: Iterable[Path], windows: Windows | None, batch: int = 16, aggregate: Aggregate = "mean"
    ) -> Iterator[Prediction | Unreadable]:
        """The prediction for each file, in their order; those that cannot be read come as ``Unreadable``.

        Batches are filled across files.  A sound's scores are the mean, or class by class the largest, of its windows'.
        """
        waiting: list[Piece] = []
        scored: list[tuple[Piece, tuple[float, ...]]] = []
        faults: dict[str, str] = {}
        names: list[str] = []
        self.model.eval()

        def run() -> None:
            for piece, scores in self._scores(waiting, faults):  # a long sound's windows would add up to all of it
                scored.append((replace(piece, value=None), scores))
            waiting.clear()

        def finished(until: str | None) -> Iterator[Prediction | Unreadable]:
            while names and names[0] != until:
                name = names.pop(0)
                own = [(piece, scores) for piece, scores in scored if piece.name == name]
                scored[:] = [entry for entry in scored if entry[0].name != name]
                yield Unreadable(name, faults[name]) if name in faults else _joined(name, own, aggregate)

        for file in files:
            names.append(str(file))
            try:
                for piece in pieces(file, self.task.modality, windows):  # type: ignore[arg-type]
                    waiting.append(piece)
                    if len(waiting) == batch:
                        run()
            except FormatError as error:
                faults[str(file)] = str(error).removeprefix(f"{file}: ")
                waiting[:] = [piece for piece in waiting if piece.name != str(file)]
            yield from finished(waiting[0].name if waiting else None)
        if waiting:
            run()
        yield from finished(None)

    def _scores(self, waiting: Sequence[Piece], faults: dict[str, str]) -> Iterator[tuple[Piece, tuple[float, ...]]]:
        """Probabilities of every class; a piece that cannot be prepared is found by trying each alone."""
        try:
            inputs = self.task.batch(waiting)
        except FormatError as error:
            if len(waiting) == 1:
                faults[waiting[0].name] = str(error).removeprefix(f"{waiting[0].name}: ")
                return
            for piece in waiting:
                yield from self._scores([piece], faults)
            return
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            logits = self.task.logits(self.model, {key: value.to(device) for key, value in inputs.items()})
        for piece, scores in zip(waiting, logits.float().softmax(-1).tolist(), strict=True):
            yield piece, tuple(scores)


def open_predictor(target: Path, base: str | None = None) -> Predictor:
    """Open what was trained: an adapter, a run directory, or the directory of a classifier such as a merged model.

    ``base`` is taken instead of the base the adapter names.

    Raises ``FormatError`` when it is no classifier, or does not say its base or its classes.
    """
    if is_run(target):
        recipe = read_recipe(target)
        if not (target / RESULT).exists():
            raise EpitaxyError(f"{target}: this run is not finished; finish it with epitaxy train")
        if recipe.full:
            data = read_json(target / RESULT)["data"]
            return _opened(str(target / MODEL), data["classes"], stored_spec(data, str(target)), whole=True)
        return _adapted(target / ADAPTER, base or recipe.base.source, recipe.base.dtype)
    if (target / CONFIG).is_file() and any(target.glob("model*.safetensors")):
        if base is not None:
            raise EpitaxyError(f"{target}: a whole model, which stands on no base; leave --base out")
        return _whole(target)
    return _adapted(target, base)


def _whole(folder: Path) -> Predictor:
    """A plain model with a head of its own."""
    config = read_json(folder / CONFIG)
    labels = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(labels, dict) or not all(str(number).isdigit() for number in labels):
        raise FormatError(f"{folder / CONFIG}: names no classes (id2label), so this model is no classifier")
    classes = [str(label) for _, label in sorted((int(number), label) for number, label in labels.items())]
    return _opened(str(folder), classes, saved_spec(str(folder)), whole=True)


def _adapted(path: Path, base: str | None, dtype: str = "float32") -> Predictor:
    contents = inspect(path)
    classes = contents.provenance.get("classes")
    if not isinstance(classes, list):
        raise FormatError(f"{path}: does not say which classes it was trained for, so it is no classifier of ours")
    source = base or contents.provenance.get("base") or contents.base.get("source")
    if not source:
        raise FormatError(f"{path}: does not say which base it was made for; name it with --base")
    found = _opened(str(source), [str(name) for name in classes], stored_spec(contents.provenance, str(path)), dtype)
    adapter = load(found.model, path)
    found.adapter, found.source = adapter.name, str(path)
    return found


def _opened(
    source: str, classes: Sequence[str], spec: InputSpec | None, dtype: str = "float32", whole: bool = False
) -> Predictor:
    opened: Opened = open_for(source, classes, dtype, spec)
    if whole and opened.head == "fresh":
        raise FormatError(f"{source}: this model has no head for its classes, so it is no classifier")
    if opened.modality == "audio":
        spec = spec or AudioSpec()
    front_end: Any = None if spec is None else front_end_for(opened, spec)
    opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(opened.model, Classification(opened, classes, front_end=front_end), tuple(classes), source, spec)


def _joined(name: str, own: Sequence[tuple[Piece, tuple[float, ...]]], aggregate: Aggregate) -> Prediction:
    columns = list(zip(*(scores for _, scores in own), strict=True))
    scores = tuple(max(column) if aggregate == "max" else sum(column) / len(column) for column in columns)
    windows = tuple(
        Window(piece.start, piece.end, found)
        for piece, found in own
        if piece.start is not None and piece.end is not None
    )
    return Prediction(name, scores, windows)


__all__ = ["Prediction", "Predictor", "Unreadable", "Window", "open_predictor"]
