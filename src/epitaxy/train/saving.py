"""Whole models on disk: what full fine-tuning and merging write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from epitaxy.core.storage import appearing
from epitaxy.train.run_directory import write_json

FRONT_END_FILE = "front_end.json"


def save_model(model: nn.Module, processor: Any, target: Path, front_end: Mapping[str, Any] | None = None) -> None:
    """Write a transformers model, without its adapters, and its processor to the new directory ``target``.

    ``front_end`` holds the settings of a front end for sounds; they go into a file beside the model, which only we
    read.  The directory appears complete or not at all.  Raises ``EpitaxyError`` when it exists already.
    """
    weights = {name: tensor for name, tensor in model.state_dict().items() if "epitaxy" not in name.split(".")}
    with appearing(target) as draft:
        with _without_bars():
            model.save_pretrained(draft, state_dict=weights)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(draft)
        if front_end is not None:
            write_json(draft / FRONT_END_FILE, front_end)


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
