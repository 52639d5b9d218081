"""PEFT's LoRA format: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

PEFT itself is not needed.  Readers of these files include PEFT, transformers, diffusers and vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epitaxy.core import files
from epitaxy.core.files import Contents, Format, register_format
from epitaxy.core.storage import read_shapes
from epitaxy.interop.peft_config import CONFIG, PICKLE, PREFIX, TENSORS, LoraConfig, read_config
from epitaxy.interop.peft_read import FACTOR, read, tensor_file
from epitaxy.interop.peft_write import write
from epitaxy.interop.state_dicts import read_state


def recognises(path: Path) -> bool:
    """Whether ``path`` is a PEFT adapter: its directory, or one of its files."""
    if path.is_dir():
        ours = (path / files.TENSORS).exists() or (path / files.CONFIG).exists()
        return not ours and any((path / name).exists() for name in (CONFIG, TENSORS, PICKLE))
    return path.name in (CONFIG, TENSORS, PICKLE)


def inspect(path: Path) -> Contents:
    """Tell what the files hold, without a model: one LoRA entry per rank and alpha, in the file's module names."""
    folder = path if path.is_dir() else path.parent
    config, file = read_config(folder / CONFIG), tensor_file(folder)
    if file.name == TENSORS:
        shapes = read_shapes(file)[0]
    else:
        shapes = {key: tuple(tensor.shape) for key, tensor in read_state(file).items()}
    raw = config.raw
    library = raw.get("auto_mapping")
    made_on = library.get("base_model_class") if isinstance(library, dict) else None
    return Contents(
        path,
        "peft",
        re.sub(r"[^A-Za-z0-9_\-]", "_", folder.resolve().name).lstrip("-") or "default",
        _methods(config, shapes),
        {"source": raw.get("base_model_name_or_path"), "model_class": made_on},
        shapes,
        file.stat().st_size,
        {key: raw[key] for key in ("peft_version", "task_type") if raw.get(key)},
    )


def _methods(config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, float], list[str]] = {}
    saved: set[str] = set()
    for key in shapes:
        short = key.removeprefix(PREFIX)
        match = FACTOR.fullmatch(short)
        if match is None:
            saved.add(short.rpartition(".")[0])
        elif match["factor"] == "A":
            groups.setdefault((config.rank(match["module"]), config.alpha(match["module"])), []).append(match["module"])
    methods: list[dict[str, Any]] = [
        {"method": "lora", "at": tuple(at), "rank": rank, "alpha": alpha, "rank_stabilised": config.use_rslora}
        for (rank, alpha), at in groups.items()
    ]
    return methods + ([{"method": "modules_to_save", "at": tuple(sorted(saved))}] if saved else [])


register_format(Format("peft", recognises, read, write, inspect))
