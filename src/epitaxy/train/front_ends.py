"""What a run needs of our front ends, for sounds and for pictures: a model opened for the input, and a task fed by it.

What is for pictures alone is in ``seeing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio.front_end import build
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.image.front_end import build as pixels
from epitaxy.data.image.spec import READS, ImageSpec
from epitaxy.data.spec import DataSpec
from epitaxy.data.splits import Splits
from epitaxy.models.opening import InputSize, Opened, open_classifier
from epitaxy.tasks.classification import Classification, FrontEnd
from epitaxy.train.progress import counted
from epitaxy.train.run_directory import read_json
from epitaxy.train.saving import FRONT_END_FILE
from epitaxy.train.seeing import image_spec

InputSpec = AudioSpec | ImageSpec
FRONT_END = "front_end"  # its place in an adapter's provenance


def input_spec(data: DataSpec, splits: Splits, saved: InputSpec | None = None) -> InputSpec | None:
    """The settings in force for ``splits``, else those ``saved`` with the model; raises when they do not fit the data.

    None where the model's own processor does all.
    """
    audio = data.audio or (saved if isinstance(saved, AudioSpec) else None)
    image = data.image or (saved if isinstance(saved, ImageSpec) else None)
    return image_spec(image, splits) or audio_spec(audio, splits)


def audio_spec(asked: AudioSpec | None, splits: Splits) -> AudioSpec | None:
    """The settings in force for ``splits``, None for pictures and texts; raises when sounds were expected."""
    if splits.modality == "audio":
        return asked or AudioSpec()
    if asked is not None:
        found = {"vision": "pictures", "text": "texts"}[splits.modality]
        raise EpitaxyError(f"data.audio: is for sounds, and these data are {found}; leave it out")
    return None


def open_for(source: str, classes: Sequence[str], dtype: str, spec: InputSpec | None) -> Opened:
    """Open a classifier whose input has the size that ``spec`` asks for."""
    return open_classifier(source, classes, dtype, None if spec is None else input_size(spec))


def input_size(spec: InputSpec) -> InputSize:
    """The part of the settings that changes the model."""
    if isinstance(spec, ImageSpec):
        return InputSize(pixels=spec.size)
    return InputSize(spec.frames, spec.mels, spec.positions, spec.legacy)


def task_for(opened: Opened, splits: Splits, spec: InputSpec | None, progress: bool = False) -> Classification:
    """Classification with our front end where the model and the data are of sounds, or of pictures prepared by us.

    ``progress`` shows how far the statistics of the training sounds are, whose features go to the cache on the way.
    """
    if isinstance(spec, ImageSpec):
        return Classification(opened, splits.classes, front_end=front_end_for(opened, spec))
    if spec is None or opened.modality != "audio":
        return Classification(opened, splits.classes)
    training = (splits.train[row] for row in range(len(splits.train)))
    told = "statistics" + (" and features" if spec.cache else "") + " of the training sounds"
    watched = counted(training, len(splits.train), told, progress)
    return Classification(opened, splits.classes, front_end=build(spec, opened.processor, watched))


def front_end_for(opened: Opened, spec: InputSpec) -> FrontEnd | None:
    """The front end that stored settings describe."""
    if isinstance(spec, ImageSpec):
        return pixels(spec, opened.processor) if opened.modality == "vision" else None
    return build(spec, opened.processor)


def settings_of(task: Classification) -> dict[str, Any] | None:
    """The settings of a task's front end with nothing left open, as plain data."""
    spec = getattr(task.front_end, "spec", None)
    return None if spec is None else spec.stored()


def saved_spec(source: str) -> InputSpec | None:
    """The settings that lie beside a model saved by us, None where there are none."""
    file = Path(source).expanduser() / FRONT_END_FILE
    return stored_spec({FRONT_END: read_json(file)}, str(file)) if file.is_file() else None


def stored_spec(provenance: Mapping[str, Any], origin: str, asked: InputSpec | None = None) -> InputSpec | None:
    """The settings an adapter was trained with, None when it has none; the cache is that of ``asked``."""
    found = provenance.get(FRONT_END)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise FormatError(f"{origin}: its front end should be a mapping, found {found!r}")
    if found.get("reads") == READS:
        return ImageSpec.from_stored(found, origin)
    spec = AudioSpec.from_stored(found, origin)
    return (
        spec
        if not isinstance(asked, AudioSpec)
        else replace(spec, cache=asked.cache, cache_gigabytes=asked.cache_gigabytes)
    )
