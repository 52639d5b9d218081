"""PEFT LoRA files out: what our adapter computes, PEFT computes from the file, or nothing is written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter, Piece
from epitaxy.core.anatomy import base_modules
from epitaxy.core.edits import Delta, Edit, Swap
from epitaxy.core.edits.head import Replace
from epitaxy.core.errors import FormatError, UnsupportedError
from epitaxy.core.files import CARD, whole_tensors
from epitaxy.core.host import require
from epitaxy.core.kinds import is_fused, is_norm
from epitaxy.core.registry import methods_in
from epitaxy.core.storage import read_tensors, write_atomically
from epitaxy.interop.peft_config import CLASSIFIERS, CONFIG, PREFIX, TENSORS, LoraConfig, base_value, obstacle

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# What PEFT adds to modules_to_save for a task, asked or not.
TASK_HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}


@dataclass
class Content:
    """What goes into the files, by module path: low-rank changes as (down, up, scale), and whole modules."""

    changes: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def write(model: nn.Module, target: Path, name: str) -> None:
    """Write the adapter ``name`` as a PEFT LoRA; raises ``UnsupportedError`` naming what PEFT cannot express."""
    if target.exists() and not target.is_dir():
        raise FormatError(f"{target}: expected a directory to save into, found a file")
    adapter = require(model, name).adapters[name]
    content = _gather(model, adapter)
    flags = [part.rank_stabilised for part in methods_in(adapter.method) if hasattr(part, "rank_stabilised")]
    rank_stabilised = bool(flags) and all(flags)
    dropout = max((edit.dropout for edit in adapter.edits if isinstance(edit, Delta)), default=0.0)
    config = _config(model, name, content, rank_stabilised, dropout)
    tensors = _tensors(model, content)
    _store(target, config, tensors)


def _gather(model: nn.Module, adapter: Adapter) -> Content:
    content, values = Content(), whole_tensors(adapter)
    stacks: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for piece in adapter.pieces:
        if piece.key is None:
            continue
        host, edit = model.get_submodule(piece.path), piece.module
        if isinstance(edit, Delta):
            _refuse_host(adapter.name, piece, model)
            down, up = (values[f"{piece.key}.down"], values[f"{piece.key}.up"]) if edit.own else edit.factors()
            stacks.setdefault(piece.path, []).append((down.detach(), up.detach(), edit.scale))
        elif isinstance(edit, Replace):
            head = {key: values[f"{piece.key}.linear.{key}"] for key, _ in edit.linear.named_parameters()}
            content.modules[piece.path] = _head(adapter.name, piece.path, head, host)
        elif isinstance(edit, Swap) and is_norm(host):
            content.modules[piece.path] = _own(model, piece.path)
            for key in edit.names:
                content.modules[piece.path][key] += values[f"{piece.key}.{key}"]
        else:
            what = type(edit).__name__ if isinstance(edit, Edit) else "a generator"
            raise UnsupportedError(
                f"adapter {adapter.name!r} cannot be written as a PEFT LoRA: its part {piece.part!r} ({what} at "
                f"{piece.path or 'the model itself'!r}) is no low-rank change of a weight; use format='epitaxy'"
            )
    if not stacks:
        raise UnsupportedError(f"adapter {adapter.name!r} cannot be written as a PEFT LoRA: it has no LoRA part")
    content.changes = {path: _fused(changes) for path, changes in stacks.items()}
    return content


def _refuse_host(name: str, piece: Piece, model: nn.Module) -> None:
    assert isinstance(piece.module, Delta)
    host = model.get_submodule(piece.path)
    reason = obstacle(host)
    if not piece.path:
        reason = "it is the whole model, which PEFT never adapts"
    elif is_fused(model.get_submodule(piece.path.rpartition(".")[0])):
        reason = "its attention layer never calls it, so that PEFT's change would have no effect"
    elif piece.module.factors()[1].dim() != 2:
        reason = "its change differs from row to row of a batch"
    if reason is not None:
        raise UnsupportedError(
            f"adapter {name!r} cannot be written as a PEFT LoRA: {piece.path or type(host).__name__!r} has no "
            f"equal there, because {reason}"
        )


def _own(model: nn.Module, path: str) -> dict[str, Tensor]:
    """A copy of the module's parameters and buffers: PEFT saves a module as a whole."""
    host = model.get_submodule(path)
    return {key: base_value(model, path, key).clone() for key in host.state_dict() if not key.startswith("epitaxy.")}


def _head(name: str, path: str, values: dict[str, Tensor], host: nn.Module) -> dict[str, Tensor]:
    """The new head as a module of the host's class: PEFT replaces the module but keeps its class."""
    if not isinstance(host, nn.Linear):
        values["weight"] = values["weight"].t()
    old = host.get_parameter("weight").shape
    if values["weight"].shape != old:
        raise UnsupportedError(
            f"adapter {name!r} cannot be written as a PEFT LoRA: its head at {path!r} has a weight of shape "
            f"{tuple(values['weight'].shape)} and the base's {tuple(old)}, but PEFT keeps the base's sizes"
        )
    return values


def _fused(changes: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Several changes of one weight as one of the summed rank: the factors stacked, differing scales folded in."""
    scale = changes[0][2]
    if any(other != scale for _, _, other in changes):
        scale = 1.0
    ups = [up if own == scale else up * own for _, up, own in changes]
    return torch.cat([down for down, _, _ in changes]), torch.cat(ups, dim=1), scale


def _config(model: nn.Module, name: str, content: Content, rank_stabilised: bool, dropout: float) -> dict[str, Any]:
    modules = {path: module for path, module in base_modules(model).items() if path}
    settings = {
        path: (down.shape[0], _alpha(scale, down.shape[0], rank_stabilised))
        for path, (down, _, scale) in content.changes.items()
    }
    rank, alpha = Counter(settings.values()).most_common(1)[0][0]
    task = _task(model, modules, content)
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": own for path, (own, _) in settings.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(path)}": own for path, (_, own) in settings.items() if own != alpha},
        "use_rslora": rank_stabilised,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": _targets(modules, content),
        "modules_to_save": sorted(content.modules) or None,
    }
    _check(name, fields, modules, content)
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    library = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else library,
        "base_model_name_or_path": source or None,
        "inference_mode": True,
        "fan_in_fan_out": not any(isinstance(modules[path], nn.Linear) for path in content.changes),
        "init_lora_weights": True,
        **fields,
    }


def _alpha(scale: float, rank: int, rank_stabilised: bool) -> float:
    """The alpha that PEFT turns back into ``scale``; an integer where one does."""
    divisor = math.sqrt(rank) if rank_stabilised else float(rank)
    alpha = scale * divisor
    whole = round(alpha)
    return whole if math.isclose(whole / divisor, scale, rel_tol=1e-12) else alpha


def _targets(modules: Iterable[str], content: Content) -> list[str] | str:
    """The shortest form of ``target_modules`` that names exactly the changed modules: endings, paths, or a regex."""
    paths, wanted = list(modules), content.changes.keys()
    saved = tuple(content.modules)
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        attempt = LoraConfig(target_modules=tuple(names), modules_to_save=saved)
        if {path for path in paths if attempt.targets(path)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))


def _check(name: str, fields: Mapping[str, Any], modules: Mapping[str, nn.Module], content: Content) -> None:
    """Apply PEFT's own matching to what is about to be written; it must find our places and no others."""
    config = LoraConfig(**{key: value for key, value in fields.items() if value is not None})
    found = {path for path in modules if config.targets(path)}
    if found != content.changes.keys():
        odd = sorted(found ^ content.changes.keys())[0]
        raise UnsupportedError(
            f"adapter {name!r} cannot be written as a PEFT LoRA: {odd!r} lies in a module that is saved as a whole"
        )
    taken = sorted(path for path in modules if config.saves(path) and path not in content.modules)
    if taken:
        raise UnsupportedError(
            f"adapter {name!r} cannot be written as a PEFT LoRA: PEFT would take {taken[0]!r} for one of the modules "
            f"to save ({', '.join(sorted(content.modules))}), because its name ends alike"
        )


def _task(model: nn.Module, modules: Iterable[str], content: Content) -> str | None:
    """PEFT's task type, where its wrapper for that task would neither add a head we lack nor demand other inputs."""
    kind = type(model).__name__
    task = next((task for ending, task in TASKS.items() if kind.endswith(ending)), None)
    if task is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    heads = {path for path in modules if path.endswith(TASK_HEADS.get(task, ("\0",)))}
    return task if heads <= content.modules.keys() else None


def _tensors(model: nn.Module, content: Content) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, (down, up, _) in content.changes.items():
        ones = (1,) * (down.dim() - 2)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = down
        tensors[f"{PREFIX}{path}.lora_B.weight"] = up.reshape(*up.shape, *ones)
    for path, values in content.modules.items():
        for key, value in values.items():
            tensors[f"{PREFIX}{path}.{key}"] = value
    return {key: value.to("cpu").contiguous().clone() for key, value in tensors.items()}


def _store(target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Two files that belong together: while the tensors are replaced there is no config, so a crash shows."""
    from safetensors.torch import save

    (target / CONFIG).unlink(missing_ok=True)
    write_atomically(target / TENSORS, save(dict(tensors), {"format": "pt"}))
    again, _ = read_tensors(target / TENSORS)
    if again.keys() != tensors.keys() or any(not torch.equal(again[key], tensors[key]) for key in tensors):
        raise FormatError(f"{target / TENSORS}: what was written does not read back; the disk may be full or failing")
    write_atomically(target / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    if not (target / CARD).exists():
        write_atomically(target / CARD, _card(config, tensors).encode())


def _card(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    base = config["base_model_name_or_path"]
    front = {**({"base_model": base} if base else {}), "library_name": "peft", "tags": ["lora", "epitaxy"]}
    count = sum(tensor.numel() for tensor in tensors.values())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# LoRA\n\n"
        f"{count:,} parameters, rank {config['r']}, alpha {config['lora_alpha']:g}"
        f"{', for ' + base if base else ''}.\n\n```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(model, "path/to/this")\n```\n'
    )
