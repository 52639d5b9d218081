"""Whole models on disk: what full fine-tuning and merging write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from epitaxy.core.errors import EpitaxyError
from epitaxy.core.storage import writing
from epitaxy.train.run_directory import write_json

FRONT_END_FILE = "front_end.json"


def require_free(target: Path) -> None:
    """Raise when ``target`` exists and is not an empty directory."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise EpitaxyError(f"{target}: exists already and is not overwritten; choose another directory")


def save_model(model: nn.Module, processor: Any, target: Path, front_end: Mapping[str, Any] | None = None) -> None:
    """Write a transformers model, without its adapters, and its processor to the new directory ``target``.

    ``front_end`` holds the settings of a front end for sounds; they go into a file beside the model, which only we
    read.  The directory appears complete or not at all.  Raises ``EpitaxyError`` when it exists already.
    """
    require_free(target)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "epitaxy" not in name.split(".")}
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            with _without_bars():
                model.save_pretrained(draft, state_dict=weights)  # type: ignore[operator]
            if processor is not None:
                processor.save_pretrained(draft)
            if front_end is not None:
                write_json(draft / FRONT_END_FILE, front_end)
            os.chmod(draft, 0o755)
            if target.is_dir():
                target.rmdir()
            os.replace(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers on the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weight_bytes(folder: Path) -> int:
    """Size of the safetensors files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
