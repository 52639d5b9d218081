"""``adapter_config.json`` of a PEFT LoRA: read, checked, and applied to module paths by PEFT's own rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epitaxy.core.errors import FormatError
from epitaxy.core.host import hosted
from epitaxy.core.kinds import is_linear

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
CLASSIFIERS = ("score", "classifier")

# Variants that compute something else than W + scale * B A; each is refused by name when it is switched on.
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA with a bias of its own",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA, which changes the base weights",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing over several adapters",
    "megatron_config": "Megatron's parallel layers",
    "layer_replication": "layer replication, which builds another base model",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "ensure_weight_tying": "adapters tied to one another",
}
# Initialisations that leave the base weights alone.  PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Fields without influence on what a trained adapter computes.
BOOKKEEPING = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("corda_config", "eva_config", "lora_ga_config", "loftq_config", "init_lora_weights", "runtime_config"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "task_type"),
)


@dataclass(frozen=True)
class LoraConfig:
    """The fields of a PEFT LoRA that decide what it computes and where."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank(self, path: str) -> int:
        """Rank of the change at ``path``."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def alpha(self, path: str) -> float:
        """Alpha at ``path``; the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``."""
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha)

    def scale(self, path: str) -> float:
        """Factor of ``B A`` at ``path``."""
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would put a LoRA on the module ``path`` (``all-linear`` is resolved by ``all_linear``)."""
        if self.exclude_modules and _named(self.exclude_modules, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        if not self.target_modules:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        if path in self.target_modules:
            return True
        return _named(self.target_modules, path) and self._in_layers(path)

    def saves(self, path: str) -> bool:
        """Whether PEFT would replace the whole module ``path``; it compares endings of strings, not of paths."""
        return any(path.endswith(name) for name in self.modules_to_save)

    def _in_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, path))), None)
        return found is not None and int(found.group(1)) in self.layers_to_transform


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _named(names: str | Iterable[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def all_linear(modules: Mapping[str, nn.Module], output: nn.Module | None, task: str | None) -> set[str]:
    """The paths that ``all-linear`` stands for: every linear map but the output layer ``output`` or the classifier."""
    paths = {path for path, module in modules.items() if path and is_linear(module)}
    if output is not None:
        return {path for path in paths if modules[path] is not output}
    if task == "SEQ_CLS":
        head = next((name for name in CLASSIFIERS if name in modules), None)
        return {path for path in paths if path != head}
    return paths


def read_config(file: Path) -> LoraConfig:
    """Parse and check ``adapter_config.json``; raises ``FormatError`` naming the file and the field it cannot take."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file; a PEFT adapter needs it beside its tensors") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise FormatError(f"{file}: peft_type is {kind!r}; only 'LORA' can be read")
    for name, what in VARIANTS.items():
        if raw.get(name):
            raise FormatError(f"{file}: {name} is set: {what} is not plain LoRA and cannot be read")
    _refuse_changed_base(raw, file)
    known = {*LoraConfig.__dataclass_fields__, *VARIANTS, *BOOKKEEPING}
    for name in sorted(raw.keys() - known):
        if raw[name]:
            raise FormatError(f"{file}: {name} = {raw[name]!r} is a field this version does not know")
    return _checked(raw, file)


def _refuse_changed_base(raw: Mapping[str, Any], file: Path) -> None:
    start = raw.get("init_lora_weights", True)
    harmless = start is None or isinstance(start, bool) or str(start).lower() in HARMLESS_STARTS
    if raw.get("loftq_config") or not harmless:
        field_name, value = ("init_lora_weights", start) if not harmless else ("loftq_config", raw["loftq_config"])
        raise FormatError(
            f"{file}: {field_name} = {value!r} changed the base weights when training began; save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion to get a plain LoRA"
        )


def _checked(raw: Mapping[str, Any], file: Path) -> LoraConfig:
    def expect(name: str, good: bool, what: str) -> None:
        if not good:
            raise FormatError(f"{file}: {name} must be {what}, found {raw[name]!r}")

    values: dict[str, Any] = {}
    for name in LoraConfig.__dataclass_fields__:
        value = raw.get(name)
        if value is None or name == "raw":
            continue
        if name == "r":
            expect(name, _whole(value), "a positive integer")
        elif name == "lora_alpha":
            expect(name, _number(value), "a number")
        elif name == "lora_dropout":
            expect(name, _number(value) and 0 <= value < 1, "a number from 0 to below 1")
        elif name == "use_rslora":
            expect(name, isinstance(value, bool), "true or false")
        elif name == "bias":
            expect(name, value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'")
        elif name in ("rank_pattern", "alpha_pattern"):
            good = _whole if name == "rank_pattern" else _number
            expect(name, isinstance(value, dict) and all(map(good, value.values())), "a mapping of names to numbers")
            _refuse_bad_patterns(value, name, file)
        elif name == "layers_to_transform":
            value = (value,) if isinstance(value, int) else value
            good_list = isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
            expect(name, good_list, "an integer or a list of integers")
            value = tuple(value)
        elif isinstance(value, str) and name in ("target_modules", "exclude_modules"):
            _refuse_bad_patterns([] if value.lower() == ALL_LINEAR else [value], name, file)
        else:
            value = [value] if isinstance(value, str) else value
            good_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
            expect(name, good_list, "a list of module names")
            value = tuple(sorted(value))
        values[name] = value
    return LoraConfig(**values, raw=dict(raw))


def _refuse_bad_patterns(patterns: Iterable[str], name: str, file: Path) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"{file}: {name} has {pattern!r}, which is no regular expression ({error})") from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def obstacle(host: nn.Module) -> str | None:
    """Why PEFT's LoRA of this convolution is not the change of its weight that ours is; None where they agree."""
    if not isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    if host.groups != 1:
        return f"it works in {host.groups} groups"
    wide = any(size > 1 for size in host.kernel_size)
    if wide and any(step > 1 for step in host.dilation):
        return "it is dilated, which PEFT leaves out of the change"
    padded = isinstance(host.padding, str) or any(host.padding)
    if wide and padded and host.padding_mode != "zeros":
        return f"it pads by {host.padding_mode!r}, which PEFT leaves out of the change"
    return None


def base_value(model: nn.Module, path: str, key: str) -> Tensor:
    """A parameter or buffer of the base on the CPU, looked up beneath merged adapters and gathered from its shards."""
    record = hosted(model)
    value = getattr(model.get_submodule(path), key)
    for name in reversed(record.state.merged if record is not None else ()):
        assert record is not None
        value = record.stash[name].get(f"{path}.{key}", value)
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu()
