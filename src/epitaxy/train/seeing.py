"""What a run needs for pictures: a task fed by our own preparation, and which normalisation was in force."""

from __future__ import annotations

from typing import Any

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.image.front_end import Pixels, own_normalisation
from epitaxy.data.image.spec import ImageSpec
from epitaxy.data.splits import Splits
from epitaxy.models.opening import Opened
from epitaxy.tasks.classification import Classification


def image_spec(asked: ImageSpec | None, splits: Splits) -> ImageSpec | None:
    """The settings in force for ``splits``, None where the model's processor prepares; raises when they do not fit."""
    if asked is not None and splits.modality != "vision":
        found = {"audio": "sounds", "text": "texts"}[splits.modality]
        raise EpitaxyError(f"data.image: is for pictures, and these data are {found}; leave it out")
    return asked


def processor_of(opened: Opened, front_end: Any) -> Any:
    """The processor to save beside a model, which prepares pictures as ``front_end`` does."""
    return front_end.processor_like(opened.processor) if isinstance(front_end, Pixels) else opened.processor


def normalisation_of(task: Classification, asked: ImageSpec | None) -> dict[str, Any] | None:
    """What the pixels of a task are normalised with: the name asked for, mean and standard deviation; None for others.

    The name is "processor" where the model's own processor prepares pictures, "explicit" for given numbers.
    """
    if task.modality != "vision":
        return None
    if isinstance(task.front_end, Pixels):
        found = task.front_end.spec.normalisation
        name = asked.normalisation if asked is not None and isinstance(asked.normalisation, str) else "explicit"
    else:
        name = "processor"
        try:
            found = own_normalisation(task.processor)
        except EpitaxyError:
            return {"name": name, "mean": None, "std": None}
    assert not isinstance(found, str)
    mean, std = found
    return {"name": name, "mean": list(mean), "std": list(std)}
