"""What verbs are given on the command line, found and opened: adapters, run directories, bases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epitaxy.core.errors import EpitaxyError, FormatError

if TYPE_CHECKING:
    from torch import nn

    from epitaxy.core.files import Contents


@dataclass(frozen=True)
class Base:
    """An opened base model and its processor, where it has one."""

    model: nn.Module
    processor: Any
    source: str


def adapter_in(path: Path) -> Path:
    """The adapter at ``path``, which may be a run directory."""
    from epitaxy.train.run_directory import ADAPTER, MODEL, is_run

    if not is_run(path):
        return path
    if (path / ADAPTER).is_dir():
        return path / ADAPTER
    if (path / MODEL).is_dir():
        raise EpitaxyError(f"{path}: a run of full fine-tuning, which has no adapter; its model is {path / MODEL}")
    raise EpitaxyError(f"{path}: this run has no adapter yet; finish it with epitaxy train")


def source_of(contents: Contents) -> str:
    """The base an adapter says it was made for."""
    source = contents.provenance.get("base") or contents.base.get("source")
    if not source:
        raise FormatError(f"{contents.path}: does not say which base it was made for; name it with --base")
    return str(source)


def classes_of(contents: Contents) -> list[str] | None:
    """The classes an adapter was trained for, if it is a classifier's."""
    classes = contents.provenance.get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) else None


def open_base(source: str, contents: Contents) -> Base:
    """Open the classifier that an adapter was trained on, or the model class that the source's own config names.

    Files of other programs name no classes; one with a head for so many tells how many the classifier needs.
    """
    from epitaxy.train.front_ends import front_end_for, open_for, stored_spec
    from epitaxy.train.seeing import processor_of

    classes = classes_of(contents) or _numbered(contents)
    if classes is not None:
        spec = stored_spec(contents.provenance, str(contents.path))
        opened = open_for(source, classes, "float32", spec)
        front_end = (
            None if spec is None else front_end_for(opened, spec)
        )  # sets the statistics of a processor of sounds
        return Base(opened.model, processor_of(opened, front_end), source)  # what the merged model is saved with
    return _open_any(source)


def _numbered(contents: Contents) -> list[str] | None:
    """Names for the classes of a foreign head, as transformers gives them."""
    if contents.format == "epitaxy":
        return None
    counts = [entry.get("labels") for entry in contents.methods if entry["method"] == "head"]
    return [f"LABEL_{number}" for number in range(counts[0])] if counts and isinstance(counts[0], int) else None


def _open_any(source: str) -> Base:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        name = (config.architectures or [""])[0]
        if not hasattr(transformers, name):
            raise FormatError(f"{source}: its config names the class {name!r}, which transformers does not have")
        model = getattr(transformers, name).from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, EpitaxyError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FormatError(f"{source}: cannot be opened as a transformers model: {first}") from None
    try:
        processor = transformers.AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        processor = None
    return Base(model, processor, source)
