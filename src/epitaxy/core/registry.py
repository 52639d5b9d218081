"""Methods by name: ours, and those that other packages announce through the entry point ``epitaxy.methods``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_type_hints, runtime_checkable

from epitaxy.core.errors import EpitaxyError, nearest

if TYPE_CHECKING:
    from epitaxy.core.edits import Edit
    from epitaxy.core.sites import Site

ENTRY_POINT = "epitaxy.methods"
_METHODS: dict[str, type[Any]] = {}
_loaded = False


@runtime_checkable
class Method(Protocol):
    """What a method is: a frozen dataclass with sites to sit at and the edits it puts there.

    ``at`` and ``layers`` choose the sites; ``cannot`` declares, with reasons, what the method is unable to do.
    """

    method_name: ClassVar[str]
    cannot: ClassVar[Mapping[str, str]]

    @property
    def at(self) -> str | tuple[str, ...]: ...

    @property
    def layers(self) -> tuple[int, ...] | None: ...

    def edits(self, site: Site) -> Iterator[Edit]: ...


@dataclasses.dataclass(frozen=True)
class Composition:
    """Several methods in one adapter: ``LoRA() + Prefix() + BitFit()``."""

    parts: tuple[Any, ...]

    def __add__(self, other: Any) -> Composition:
        return Composition(self.parts + methods_in(other))


T = TypeVar("T")


def method(name: str, cannot: Mapping[str, str] | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: register a frozen dataclass as the method ``name``.

    ``cannot`` maps abilities (``identity``, ``merge``, ``route`` ...) to the reason why the method lacks them.
    """

    def register(cls: type[T]) -> type[T]:
        target: Any = cls
        if not dataclasses.is_dataclass(cls) or not callable(getattr(cls, "edits", None)):
            raise EpitaxyError(f"method {name!r} must be a frozen dataclass with a method `edits(site)`")
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise EpitaxyError(f"two methods are called {name!r}: {known.__module__} and {cls.__module__}")
        target.method_name = name
        target.cannot = dict(cannot or {})
        target.__add__ = _add
        if not any(field.name == "layers" for field in dataclasses.fields(cls)):
            target.layers = None
        _METHODS[name] = cls
        return cls

    return register


def declare(method: Any, ability: str, reason: str) -> None:
    """Note that this method, with the fields it was given, lacks an ability its class has."""
    object.__setattr__(method, "cannot", {ability: reason, **method.cannot})


def _add(self: Any, other: Any) -> Composition:
    return Composition((self, *methods_in(other)))


def methods_in(value: Any) -> tuple[Any, ...]:
    """The single methods of a method or a composition; raises when ``value`` is neither."""
    if isinstance(value, Composition):
        return value.parts
    if isinstance(value, type) or not isinstance(getattr(value, "method_name", None), str):
        shown = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r}"
        raise EpitaxyError(f"expected a method such as LoRA(rank=8), found {shown}")
    return (value,)


def methods() -> dict[str, type[Any]]:
    """Every known method by name, those of other installed packages included."""
    global _loaded
    if not _loaded:
        package = importlib.import_module("epitaxy.methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"epitaxy.methods.{module.name}")
        for point in entry_points(group=ENTRY_POINT):
            point.load()
        _loaded = True
    return dict(sorted(_METHODS.items()))


def lookup(name: str) -> type[Any]:
    """The method called ``name``; raises with the nearest names when there is none."""
    known = _METHODS.get(name) or methods().get(name)
    if known is None:
        raise EpitaxyError(f"no method is called {name!r}{nearest(name, methods())}")
    return known


def to_config(value: Any) -> list[dict[str, Any]]:
    """A method or composition as plain data."""
    return [{"method": part.method_name, **dataclasses.asdict(part)} for part in methods_in(value)]


def from_config(config: Any) -> Any:
    """The inverse of ``to_config``; unknown methods and fields raise with the nearest names."""
    entries = config if isinstance(config, list) else [config]
    if not entries:
        raise EpitaxyError("an adapter needs at least one method")
    parts = [_one(entry) for entry in entries]
    return parts[0] if len(parts) == 1 else Composition(tuple(parts))


def _one(entry: Any) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise EpitaxyError(f"a method is a mapping with the key 'method', found {entry!r}")
    cls = lookup(entry["method"])
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {key: value for key, value in entry.items() if key != "method"}
    for key in values:
        if key not in fields:
            raise EpitaxyError(f"method {entry['method']!r} has no field {key!r}{nearest(key, fields)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    _check_types(cls, values)
    try:
        return cls(**values)
    except EpitaxyError:
        raise
    except (TypeError, ValueError) as error:
        raise EpitaxyError(f"method {entry['method']!r}: {error}") from None


def check_fields(value: Any) -> None:
    """Raise where a field of a method, or of one in a composition, is not of its type: files could not hold it."""
    for part in methods_in(value):
        if dataclasses.is_dataclass(part):
            fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
            fields = {key: tuple(field) if isinstance(field, list) else field for key, field in fields.items()}
            _check_types(type(part), fields)


@cache
def _kinds(cls: type[Any]) -> Mapping[str, Any]:
    """What validates each field of a method, as far as the annotations can be read."""
    from pydantic import ConfigDict, TypeAdapter

    try:
        hints = get_type_hints(cls)
    except NameError:  # annotations that exist for type checkers only
        return {}
    names = [field.name for field in dataclasses.fields(cls)]
    config = ConfigDict(arbitrary_types_allowed=True, strict=True)
    return {name: TypeAdapter(hints[name], config=config) for name in names}


def _check_types(cls: type[Any], values: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    name, kinds = getattr(cls, "method_name", cls.__name__), _kinds(cls)  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in kinds:
            continue
        try:
            kinds[key].validate_python(value)
        except ValidationError as error:
            wanted = dict.fromkeys(part["msg"].removeprefix("Input should be ") for part in error.errors())
            expected = " or ".join(wanted)
            raise EpitaxyError(f"{name}.{key}: expected {expected}, found {value!r}") from None
