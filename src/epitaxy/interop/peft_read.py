"""PEFT LoRA files in: every tensor is placed or explained, or the model stays as it was."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epitaxy.core.adapter import Adapter
from epitaxy.core.anatomy import Anatomy, base_modules, describe
from epitaxy.core.edits import Delta, Swap
from epitaxy.core.edits.head import Replace
from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.core.files import fill
from epitaxy.core.host import attach, detach, hosted
from epitaxy.core.kinds import is_linear, is_norm
from epitaxy.core.registry import Composition
from epitaxy.core.sites import width_out
from epitaxy.interop.peft_config import (
    ALL_LINEAR,
    CONFIG,
    PICKLE,
    PREFIX,
    TENSORS,
    LoraConfig,
    all_linear,
    base_value,
    obstacle,
    read_config,
)
from epitaxy.interop.peft_names import names_in_file
from epitaxy.interop.places import where
from epitaxy.interop.state_dicts import read_state
from epitaxy.methods.bitfit import BitFit
from epitaxy.methods.head import Head
from epitaxy.methods.lora import LoRA
from epitaxy.methods.norm_tuning import NormTuning

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.\w+)?\.weight")
Named = tuple[str, Tensor]  # the key in the file, for error messages, and the tensor


@dataclass
class Stored:
    """The tensors of one file by the module they belong to, in the file's own names."""

    file: Path
    factors: dict[str, dict[str, Named]] = field(default_factory=dict)
    others: dict[str, dict[str, Named]] = field(default_factory=dict)

    def modules(self) -> list[str]:
        """Names of all modules that occur."""
        return [*self.factors, *self.others]


@dataclass
class Plan:
    """The methods that hold the content of a file, and the values of each place: (path, edit) -> parameter -> value."""

    parts: list[Any] = field(default_factory=list)
    values: dict[tuple[str, type[nn.Module]], dict[str, Named]] = field(default_factory=dict)


def read(model: nn.Module, path: Path, name: str) -> Adapter:
    """Put the PEFT LoRA at ``path`` on ``model``; raises ``FormatError`` and leaves the model as it was otherwise."""
    folder = path if path.is_dir() else path.parent
    config, file = read_config(folder / CONFIG), tensor_file(folder)
    stored = sort(read_state(file), file)
    naming = names_in_file(model, stored.modules(), str(file))
    record = hosted(model)
    anatomy = record.anatomy if record is not None else describe(model)
    previous = record.state.active if record is not None else ()
    try:
        plan = _plan(model, anatomy, config, stored, naming)
        adapter = attach(model, plan.parts[0] if len(plan.parts) == 1 else Composition(tuple(plan.parts)), name)
    except FormatError:
        raise
    except EpitaxyError as error:
        raise type(error)(f"{file}: {error}") from None
    try:
        fill(adapter, _by_key(adapter, plan, file), str(file))
    except EpitaxyError:
        detach(model, name)
        if record is not None:
            record.state.active = previous
        raise
    base = config.raw.get("base_model_name_or_path")
    adapter.provenance = {"imported from": "peft", **({"base": base} if base else {})}
    _warn_of_other_base(model, base, file)
    return adapter


def tensor_file(folder: Path) -> Path:
    """The file with the tensors; safetensors are preferred."""
    for name in (TENSORS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise FormatError(f"{folder}: {CONFIG} is there but neither {TENSORS} nor {PICKLE} is")


def sort(tensors: Mapping[str, Tensor], file: Path) -> Stored:
    """Sort tensors by module; raises on factors of LoRA variants that are not plain LoRA."""
    stored = Stored(file)
    for key, tensor in tensors.items():
        short = key.removeprefix(PREFIX).replace("_orig_mod.", "").replace(".base_layer.", ".")
        match = FACTOR.fullmatch(short)
        if match is not None:
            pair = stored.factors.setdefault(match["module"], {})
            if match["factor"] in pair:
                raise FormatError(f"{file}: holds more than one adapter for {match['module']!r}; expected one")
            pair[match["factor"]] = (key, tensor)
        elif ".lora_" in short:
            what = "a LoRA of an embedding" if "embedding" in short else "part of a LoRA variant other than plain LoRA"
            raise FormatError(f"{file}: {key!r} is {what}, which cannot be read")
        elif ".original_module." not in short:
            short = re.sub(r"\.modules_to_save(\.\w+(?=\.))?\.", ".", short)
            module, _, parameter = short.rpartition(".")
            stored.others.setdefault(module, {})[parameter] = (key, tensor)
    if not stored.factors:
        raise FormatError(f"{file}: holds no LoRA tensors")
    for module, pair in stored.factors.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            raise FormatError(f"{file}: module {module!r} has no tensor lora_{missing}")
    return stored


def _plan(model: nn.Module, anatomy: Anatomy, config: LoraConfig, stored: Stored, naming: Mapping[str, str]) -> Plan:
    modules = base_modules(model)
    plan = Plan()
    for name in stored.factors:
        host = modules[naming[name]]
        if not is_linear(host) and not isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise FormatError(
                f"{stored.file}: {name!r} is of class {type(host).__name__}; only linear maps and "
                "convolutions can be read"
            )
    _check_targets(model, modules, config, stored, naming)
    groups: dict[tuple[int, float], list[str]] = {}
    for name, pair in stored.factors.items():
        path = naming[name]
        _check_factors(name, pair, config, modules[path], stored.file)
        groups.setdefault((config.rank(name), config.alpha(name)), []).append(path)
        (key_a, down), (key_b, up) = pair["A"], pair["B"]
        plan.values[path, Delta] = {"down": (key_a, down), "up": (key_b, up.reshape(up.shape[:2]))}
    for (rank, alpha), paths in groups.items():
        at, layers = where(model, anatomy, paths)
        plan.parts.append(LoRA(at, rank, alpha, config.lora_dropout, config.use_rslora, layers=layers))
    _plan_others(model, modules, anatomy, config, stored, naming, plan)
    return plan


def _check_targets(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    stored: Stored,
    naming: Mapping[str, str],
) -> None:
    """The modules with tensors must be those that the config targets: PEFT drops the one and zeroes the other."""
    wanted = config.target_modules
    if not wanted:
        return
    everything = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    if everything:
        get = getattr(model, "get_output_embeddings", None)
        output = get() if callable(get) else None
        chosen = all_linear(modules, output, config.raw.get("task_type"))
        expected = {name for name, path in naming.items() if path in chosen and not config.saves(name)}
    else:
        expected = {name for name in naming if config.targets(name)}
    missing, extra = sorted(expected - stored.factors.keys()), sorted(stored.factors.keys() - expected)
    if missing:
        raise FormatError(
            f"{stored.file}: {len(missing)} modules that target_modules of {CONFIG} names have no tensors, "
            f"the first is {missing[0]!r}"
        )
    if extra and not everything:
        raise FormatError(
            f"{stored.file}: {len(extra)} modules have tensors but target_modules of {CONFIG} does not name them, "
            f"the first is {extra[0]!r}"
        )


def _check_factors(name: str, pair: Mapping[str, Named], config: LoraConfig, host: nn.Module, file: Path) -> None:
    (key_a, down), (key_b, up) = pair["A"], pair["B"]
    reason = obstacle(host)
    if reason is not None:
        raise FormatError(f"{file}: the convolution {name!r} cannot take PEFT's change: {reason}")
    rank = config.rank(name)
    for key, tensor, found in ((key_a, down, down.shape[:1]), (key_b, up, up.shape[1:2])):
        if tuple(found) != (rank,) or tensor.dim() < 2:
            raise FormatError(
                f"{file}: {key!r} has shape {tuple(tensor.shape)}, but r and rank_pattern of {CONFIG} say rank {rank}"
            )
    if any(size != 1 for size in up.shape[2:]):
        raise FormatError(f"{file}: {key_b!r} has shape {tuple(up.shape)}; expected a 1 x 1 convolution")


def _plan_others(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    anatomy: Anatomy,
    config: LoraConfig,
    stored: Stored,
    naming: Mapping[str, str],
    plan: Plan,
) -> None:
    heads: dict[int | None, list[str]] = {}
    norms: list[str] = []
    biases: list[str] = []
    for name in _saved(config, modules, stored, naming):
        path, found = naming[name], stored.others.pop(name, {})
        host = modules[path]
        needed = [key for key, parameter in host._parameters.items() if parameter is not None]
        lacking = [key for key in needed if key not in found]
        if lacking:
            raise FormatError(f"{stored.file}: modules_to_save names {name!r} but its {lacking[0]} is missing")
        if is_linear(host):
            heads.setdefault(_labels(host, found), []).append(path)
            plan.values[path, Replace] = {f"linear.{key}": value for key, value in found.items()}
        elif is_norm(host):
            norms.append(path)
            plan.values[path, Swap] = {key: _change(model, path, key, found.pop(key), stored.file) for key in needed}
            _refuse_changed(model, path, found, stored.file)
        else:
            raise FormatError(
                f"{stored.file}: modules_to_save holds {name!r} of class {type(host).__name__}; only linear heads "
                "and norms can be read"
            )
    for name, found in stored.others.items():
        path = naming[name]
        if config.bias != "none" and "bias" in found and (path, Swap) not in plan.values:
            biases.append(path)
            plan.values[path, Swap] = {"bias": _change(model, path, "bias", found.pop("bias"), stored.file)}
        _refuse_changed(model, path, found, stored.file)
    for labels, paths in heads.items():
        at, layers = where(model, anatomy, paths)
        plan.parts.append(Head(labels, at=at, layers=layers))
    if norms:
        at, layers = where(model, anatomy, norms)
        plan.parts.append(NormTuning(at, layers=layers))
    if biases:
        at, layers = where(model, anatomy, biases)
        plan.parts.append(BitFit(at, layers=layers))


def _saved(
    config: LoraConfig, modules: Mapping[str, nn.Module], stored: Stored, naming: Mapping[str, str]
) -> Iterator[str]:
    """Names of the modules with parameters of their own that lie in a module of ``modules_to_save``."""
    for name, path in naming.items():
        steps = name.split(".")
        inside = any(config.saves(".".join(steps[: count + 1])) for count in range(len(steps)))
        if inside and any(parameter is not None for parameter in modules[path]._parameters.values()):
            yield name


def _labels(host: nn.Module, found: Mapping[str, Named]) -> int | None:
    outputs = int(found["weight"][1].shape[0])
    return None if outputs == width_out(host) else outputs


def _change(model: nn.Module, path: str, parameter: str, value: Named, file: Path) -> Named:
    """The difference between a stored parameter and the base's, which is what our edits keep."""
    key, tensor = value
    if not isinstance(getattr(model.get_submodule(path), parameter, None), Tensor):
        raise FormatError(f"{file}: {key!r} has no place: {path!r} of this model has no {parameter}")
    base = base_value(model, path, parameter)
    if base.shape != tensor.shape:
        raise FormatError(f"{file}: {key!r} has shape {tuple(tensor.shape)}, this model's has {tuple(base.shape)}")
    return key, tensor.float() - base.float()


def _refuse_changed(model: nn.Module, path: str, found: Mapping[str, Named], file: Path) -> None:
    """Copies of unchanged base weights, which PEFT adds for embeddings and targeted heads, say nothing new."""
    for parameter, (key, tensor) in found.items():
        there = isinstance(getattr(model.get_submodule(path), parameter, None), Tensor)
        base = base_value(model, path, parameter) if there else torch.empty(0)
        if base.shape != tensor.shape or not torch.equal(base.to(tensor.dtype), tensor):
            raise FormatError(f"{file}: {key!r} is a changed weight of the base model, which an adapter cannot hold")


def _by_key(adapter: Adapter, plan: Plan, file: Path) -> dict[str, Tensor]:
    """The values under the adapter's own keys, shapes checked in the names of the file."""
    tensors: dict[str, Tensor] = {}
    for piece in adapter.pieces:
        if piece.key is None:
            continue
        values = plan.values[piece.path, type(piece.module)]
        places = dict(piece.module.named_parameters())
        for parameter in values.keys() - places.keys():
            raise FormatError(f"{file}: {values[parameter][0]!r} has no place in {piece.path!r} of this model")
        for parameter, place in places.items():
            if parameter not in values:  # a head of other size than the base's always has a bias
                tensors[f"{piece.key}.{parameter}"] = torch.zeros_like(place)
                continue
            key, tensor = values[parameter]
            if tensor.shape != place.shape:
                raise FormatError(
                    f"{file}: {key!r} has shape {tuple(tensor.shape)}, but {piece.path!r} of this model needs "
                    f"{tuple(place.shape)}"
                )
            tensors[f"{piece.key}.{parameter}"] = tensor
    return tensors


def _warn_of_other_base(model: nn.Module, base: Any, file: Path) -> None:
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not base or not here or Path(str(base)).exists() or Path(str(here)).exists():
        return
    if str(base).rpartition("/")[2].lower() != str(here).rpartition("/")[2].lower():
        warnings.warn(f"{file}: made for the base {base!r}, this model is {here!r}; results may differ", stacklevel=4)
