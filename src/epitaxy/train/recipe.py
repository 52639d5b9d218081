"""What a recipe holds: base, method, data and training, checked key by key.

The sections ``data`` and ``train`` are the dataclasses ``DataSpec`` and ``TrainConfig`` themselves, so their fields
have one home.  Reading files and overrides is the business of ``recipe_files``.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.core.registry import from_config, methods_in, to_config
from epitaxy.data.audio.spec import AudioSpec, Augment
from epitaxy.data.image.spec import ImageSpec
from epitaxy.data.splits import DataSpec
from epitaxy.tasks.two_pass import TwoPass
from epitaxy.train.config import TrainConfig

FULL = "full"  # the method of full fine-tuning: no adapter, every parameter of the base trains
OBJECTIVES = {"two_pass": TwoPass}


class RecipeError(EpitaxyError):
    """A recipe or an override that cannot be read, names an unknown key, or holds a value of the wrong kind."""


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _without_kind(value: Any) -> Any:
    """The settings of an objective, which is of the one kind there is once ``normalise`` has looked at it."""
    return {key: held for key, held in value.items() if key != "kind"} if isinstance(value, Mapping) else value


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Section):
    """The frozen model: ``reference-vit``, a directory or a hub name, and the type of its weights."""

    source: str = "reference-vit"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Recipe(Section):
    """A whole run.

    ``out`` is the run directory; ``name`` that of the adapter; ``method`` a list of mappings with the key ``method``;
    ``objective`` replaces the plain loss, with its ``kind`` and settings; ``samples`` counts the pictures, sounds or
    texts shown in the report.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_\-]*$")] = "adapter"
    out: Path = Path("runs/adapter")
    base: Annotated[Base, BeforeValidator(_source)] = Base()
    method: tuple[dict[str, Any], ...]
    data: Annotated[DataSpec, BeforeValidator(_source)]
    train: TrainConfig = TrainConfig()
    objective: Annotated[TwoPass | None, BeforeValidator(_without_kind)] = None
    samples: Annotated[int, Field(ge=0, le=200)] = 24

    @property
    def full(self) -> bool:
        """Whether the base itself trains."""
        return bool(self.method[0]["method"] == FULL)

    def adapter_method(self) -> Any:
        """The method or composition; raises for full fine-tuning, which has none."""
        return from_config(list(self.method))

    def to_dict(self) -> dict[str, Any]:
        """As plain data that ``from_dict`` reads back."""
        return {
            "name": self.name,
            "out": str(self.out),
            "base": self.base.model_dump(),
            "method": [_plain(entry) for entry in self.method],
            "data": _plain(asdict(self.data)),
            "train": _plain(asdict(self.train)),
            "objective": None if self.objective is None else {"kind": "two_pass", **asdict(self.objective)},
            "samples": self.samples,
        }

    def to_yaml(self) -> str:
        """As a recipe file: every key with the value in force."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


KEYS: Mapping[str, tuple[str, ...]] = {
    "": tuple(Recipe.model_fields),
    "base": tuple(Base.model_fields),
    "data": tuple(field.name for field in fields(DataSpec)),
    "data.audio": tuple(field.name for field in fields(AudioSpec)),
    "data.image": tuple(field.name for field in fields(ImageSpec)),
    "data.audio.augment": tuple(field.name for field in fields(Augment)),
    "train": tuple(field.name for field in fields(TrainConfig)),
    "objective": ("kind", *(field.name for field in fields(TwoPass))),
}


_SECTIONS = {"": Recipe, "base": Base, "data": DataSpec, "train": TrainConfig, "objective": TwoPass}
_HINTS = {section: typing.get_type_hints(kind) for section, kind in _SECTIONS.items()}
_SAID = {  # where pydantic speaks of its own types
    "dataclass_type": "expected keys and their values",
    "model_type": "expected keys and their values",
    "tuple_type": "expected a list",
    "path_type": "expected a path",
}


def from_dict(values: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe from plain data; ``origin`` is what messages call it."""
    return validate(normalise(values, origin), origin, {})


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, the run directory aside."""
    first, second = _flat(one.to_dict()), _flat(other.to_dict())
    missing = object()
    keys = dict.fromkeys([*first, *second])
    return [key for key in keys if key != "out" and first.get(key, missing) != second.get(key, missing)]


def normalise(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The same mapping with every short form written out and every key known; raises ``RecipeError`` if not."""
    result = dict(values)
    for key in ("base", "data"):
        if key in result:
            result[key] = _source(result[key])
    if "objective" in result:
        result["objective"] = _kind(result["objective"])
    if "method" in result:
        result["method"] = _method_entries(result["method"], origin)
    _refuse_unknown(result, "", origin)
    for section in filter(None, KEYS):
        found: Any = result
        for part in section.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            _refuse_unknown(found, section, origin)
    return result


def _refuse_unknown(keys: Iterable[Any], section: str, origin: str) -> None:
    for key in keys:
        if key not in KEYS[section]:
            dotted = f"{section}.{key}" if section else str(key)
            raise RecipeError(f"{origin}: {dotted!r} is no key of a recipe{nearest(str(key), KEYS[section])}")


def _method_entries(value: Any, origin: str) -> list[dict[str, Any]]:
    entries = value if isinstance(value, (list, tuple)) else [value]
    if not entries:
        raise RecipeError(f"{origin}: method: expected at least one method, found an empty list")
    result = []
    for entry in entries:
        mapping = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, dict) or not isinstance(mapping.get("method"), str):
            raise RecipeError(
                f"{origin}: method: expected a name such as lora or a mapping with the key 'method', found {entry!r}"
            )
        result.append(dict(mapping))
    if any(entry["method"] == FULL for entry in result) and (len(result) > 1 or len(result[0]) > 1):
        raise RecipeError(f"{origin}: method: 'full' trains the whole base; it stands alone and has no fields")
    return result


def validate(values: Mapping[str, Any], file: str, origins: Mapping[tuple[str, ...], str]) -> Recipe:
    """Check every value; ``origins`` tells in which file or override a key was written."""
    for key in ("method", "data"):
        if key not in values:
            raise RecipeError(f"{file}: the key {key!r} is missing")
    _check_objective(values.get("objective"), origins.get(("objective", "kind"), origins.get(("objective",), file)))
    resolved = {**values, "method": _resolved(values["method"], origins.get(("method",), file))}
    found = _odd_value(resolved)
    if found is None:
        try:
            recipe = Recipe.model_validate(resolved)
            return recipe.model_copy(update={"out": recipe.out.expanduser()})
        except ValidationError as error:
            found = _complaint(error.errors()[0], values)
    path, complaint = found
    origin = next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), file)
    raise RecipeError(f"{origin}: {complaint}")


def _check_objective(value: Any, origin: str) -> None:
    """Raise for an objective of no known kind."""
    if not isinstance(value, Mapping):
        return
    kind = value.get("kind")
    if kind is None:
        raise RecipeError(f"{origin}: the key 'objective.kind' is missing{nearest('', OBJECTIVES)}")
    if kind not in OBJECTIVES:
        raise RecipeError(f"{origin}: objective.kind: no objective is called {kind!r}{nearest(str(kind), OBJECTIVES)}")


def _odd_value(values: Mapping[str, Any]) -> tuple[tuple[str, ...], str] | None:
    """The first value that pydantic would let pass: true and false as numbers, a source that is empty."""
    for section, hints in _HINTS.items():
        held = values.get(section, {}) if section else values
        if not isinstance(held, Mapping):
            continue
        for key, value in held.items():
            path = (section, key) if section else (key,)
            if isinstance(value, bool) and hints.get(key) is not bool:
                return path, f"{'.'.join(path)}: expected a number or a name, found {str(value).lower()}"
            if key == "source" and isinstance(value, str) and not value.strip():
                return path, f"{'.'.join(path)}: it is empty"
    return None


def _complaint(error: Any, values: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """The key that is meant, and what is wrong with it."""
    location = tuple(str(part) for part in error["loc"])
    path = _within(location, values)
    if error["type"] == "missing":
        return path, f"the key {'.'.join(location)!r} is missing"
    if error["type"] == "value_error":  # raised by the section itself, whose message begins with the key
        said = str(error["msg"]).removeprefix("Value error, ")
        return (*path, *said.partition(" ")[0].rstrip(":").split(".")[1:]), said
    return path, f"{'.'.join(path)}: {_expected(error)}"


def _resolved(entries: list[dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    """The methods with every field written out, so that a run keeps its meaning when a default changes."""
    if entries[0]["method"] == FULL:
        return entries
    try:
        method = from_config(entries)
        for part in methods_in(method):
            _check_types(part)
        return to_config(method)
    except EpitaxyError as error:
        raise RecipeError(f"{origin}: method: {error}") from None


def _check_types(method: Any) -> None:
    """Check the fields of a method against their annotations, which dataclasses themselves do not."""
    kind: Any = type(method)
    for name, adapter in _adapters(kind).items():
        try:
            adapter.validate_python(getattr(method, name), strict=True)
        except ValidationError as error:
            raise EpitaxyError(f"{method.method_name}.{name}: {_expected(error.errors()[0])}") from None


@lru_cache(maxsize=64)
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    """What checks each field of a method."""
    hints, config = typing.get_type_hints(kind), ConfigDict(arbitrary_types_allowed=True)
    return {field.name: TypeAdapter(hints[field.name], config=config) for field in fields(kind)}


def _within(path: tuple[str, ...], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The part of a pydantic location that stands in the recipe; the rest names branches of a union."""
    value: Any = values
    for end, part in enumerate(path):
        if not isinstance(value, Mapping) or part not in value:
            return path[:end]
        value = value[part]
    return path


def _expected(error: Any) -> str:
    message = _SAID.get(error["type"], str(error["msg"]))
    return f"{message[:1].lower()}{message[1:]}, found {error['input']!r}"


def _plain(value: Any) -> Any:
    """Tuples as lists: what YAML and JSON hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists of them as one mapping with dotted keys."""
    if isinstance(values, Mapping) and values:
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list) and values and all(isinstance(item, Mapping) for item in values):
        items = enumerate(values)
    else:
        return {path: values}
    return {
        key: leaf for name, item in items for key, leaf in _flat(item, f"{path}.{name}" if path else str(name)).items()
    }
