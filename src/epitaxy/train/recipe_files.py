"""Reading recipes: YAML files built on one another with ``extends:``, then ``key=value`` overrides.

The layers are merged key by key, the later one winning; ``method`` is replaced as a whole, because the fields of one
method mean nothing to another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.core.registry import lookup
from epitaxy.train.recipe import FULL, KEYS, Recipe, RecipeError, normalise, validate
from epitaxy.train.strict_yaml import parse, read

SHIPPED = "shipped:"
Origins = dict[tuple[str, ...], str]


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, with ``key=value`` overrides.

    Raises ``RecipeError`` naming the file or the override, the dotted key and what was expected.
    """
    file = find_recipe(str(name))
    stem = re.sub(r"[^A-Za-z0-9_\-]+", "-", file.stem).lstrip("-") or "adapter"
    merged: dict[str, Any] = {"name": stem, "out": f"runs/{stem}"}
    origins: Origins = {}
    for origin, values in _layers(file, ()):
        _merge(merged, values, origin, origins)
    for override in overrides:
        _override(merged, override, origins)
    return validate(merged, str(file), origins)


def change(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """``recipe`` with ``key=value`` overrides."""
    merged, origins = recipe.to_dict(), Origins()
    for override in overrides:
        _override(merged, override, origins)
    return validate(merged, recipe.name, origins)


def with_keys(recipe: Recipe, keys: Mapping[str, Any], origin: str) -> Recipe:
    """``recipe`` with dotted keys set; ``origin`` is what messages call them."""
    merged, origins = recipe.to_dict(), Origins()
    for key, value in keys.items():
        _put(merged, key, value, origin, origins)
    return validate(merged, recipe.name, origins)


def compose(file: Path, layers: Sequence[tuple[str, Mapping[str, Any]]], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in ``file``, under ``layers`` of (what messages call it, keys), under ``key=value`` overrides.

    The keys of a layer are nested as in a recipe, or dotted as in an override.
    """
    merged: dict[str, Any] = {"name": "adapter", "out": "runs/adapter"}
    origins: Origins = {}
    for origin, values in _layers(file, ()):
        _merge(merged, values, origin, origins)
    for origin, keys in layers:
        for key, value in keys.items():
            if "." in key:
                _put(merged, key, value, origin, origins)
            else:
                _merge(merged, normalise({key: value}, origin), origin, origins)
    for override in overrides:
        _override(merged, override, origins)
    return validate(merged, str(file), origins)


def own_keys(file: Path) -> dict[str, Any]:
    """What a recipe file says itself, without what it extends."""
    return _layers(file, ())[-1][1]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {name: file for name, file in _shipped().items() if not is_grid(file)}


def shipped_grids() -> dict[str, Path]:
    """The grids of runs that come with the package, by name."""
    return {name: file for name, file in _shipped().items() if is_grid(file)}


def is_grid(file: Path) -> bool:
    """Whether a file describes a grid of runs: it has rows."""
    return re.search(r"^rows:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


def _shipped() -> dict[str, Path]:
    """All shipped files by name; those that begin with an underscore are parts of others."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return {
                file.relative_to(folder).with_suffix("").as_posix(): file
                for file in sorted(folder.rglob("*.yaml"))
                if not file.name.startswith("_")
            }
    raise RecipeError(f"{package / 'recipes'}: the shipped recipes are missing; install epitaxy again")


def find_recipe(name: str, beside: Path | None = None, grid: bool = False) -> Path:
    """The file of a recipe: a path (relative to ``beside``), or the name of a shipped one such as ``demo/lora``.

    With ``grid`` the file of a grid is looked for.
    """
    what = "grid" if grid else "recipe"
    plain = name.removeprefix(SHIPPED)
    path = (beside or Path()) / Path(plain).expanduser()
    if not name.startswith(SHIPPED):
        if path.is_file():
            return path
        if path.is_dir():
            raise RecipeError(f"{path}: expected a {what} file, found a directory")
        if beside is not None:
            raise RecipeError(f"{path}: no such {what} file")
    known = shipped_grids() if grid else shipped_recipes()
    if plain.removesuffix(".yaml") in known:
        return known[plain.removesuffix(".yaml")]
    if name.startswith(SHIPPED):
        raise RecipeError(f"no shipped {what} is called {plain!r}{nearest(plain, known)}")
    raise RecipeError(f"{path}: no such {what} file, and no shipped {what} of that name{nearest(plain, known)}")


def _layers(file: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file, its mapping) for ``file`` and all that it extends, the most basic first."""
    here = file.resolve()
    if here in chain:
        circle = " -> ".join(path.name for path in (*chain[chain.index(here) :], here))
        raise RecipeError(f"{file}: recipes extend each other in a circle: {circle}")
    values = read(file)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise RecipeError(f"{file}: expected a mapping of keys such as base, method and data, found {found}")
    if "rows" in values:
        raise RecipeError(f"{file}: a grid of runs, not a recipe; carry it out with epitaxy bench")
    parent = values.pop("extends", None)
    if parent is None:
        return [(str(file), normalise(values, str(file)))]
    if not isinstance(parent, str):
        raise RecipeError(f"{file}: extends: expected the path of one recipe, found {parent!r}")
    try:
        base = find_recipe(parent, beside=file.parent)
    except RecipeError as error:
        raise RecipeError(f"{file}: extends: {error}") from None
    return [*_layers(base, (*chain, here)), (str(file), normalise(values, str(file)))]


def _merge(
    into: dict[str, Any], values: Mapping[str, Any], origin: str, origins: Origins, path: tuple[str, ...] = ()
) -> None:
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, origins, here)
            continue
        into[key] = deepcopy(value)  # what is merged into it later must not reach the layer it came from
        for overruled in [known for known in origins if known[: len(here)] == here]:
            del origins[overruled]
        origins[here] = origin


def _override(merged: dict[str, Any], text: str, origins: Origins) -> None:
    key, equals, written = text.partition("=")
    origin = f"override {text!r}"
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{origin}: expected key=value with a dotted key, such as train.learning_rate=3e-4")
    _put(merged, key, parse(written, origin), origin, origins)


def _put(merged: dict[str, Any], key: str, value: Any, origin: str, origins: Origins) -> None:
    """Set one dotted key."""
    path = tuple(key.split("."))
    if path[0] == "method" and len(path) > 1:
        merged["method"] = _with_field(merged.get("method", []), path[1:], value, origin)
        origins["method",] = origin
        return
    nested = value
    for part in reversed(path):
        nested = {part: nested}
    values = normalise(nested, origin)
    if len(path) > 1 and ".".join(path[:-1]) not in KEYS:
        raise RecipeError(f"{origin}: {'.'.join(path[:-1])!r} is one value, there are no keys below it")
    _merge(merged, values, origin, origins)


def _with_field(
    entries: Sequence[dict[str, Any]], path: Sequence[str], value: Any, origin: str
) -> list[dict[str, Any]]:
    """The methods with one field set: ``method.rank``, ``method.lora.rank`` or ``method.0.rank``."""
    names = [entry["method"] for entry in entries]
    if len(path) > 2:
        raise RecipeError(f"{origin}: expected method.FIELD or method.NAME.FIELD")
    place, field = ("", path[0]) if len(path) == 1 else path
    if place:
        chosen = [number for number, name in enumerate(names) if place in (name, str(number))]
    else:
        chosen = [number for number, name in enumerate(names) if field in _fields(name, origin)]
        chosen = chosen or [0][: len(names)]  # no method has it: the first one says what it has instead
    if not chosen:
        raise RecipeError(f"{origin}: the recipe's method is {' + '.join(names) or 'missing'}")
    if len(chosen) > 1:
        exact = " or ".join(f"method.{number}.{field}" for number in chosen)
        raise RecipeError(f"{origin}: {len(chosen)} methods of the recipe have that field; write {exact}")
    known = _fields(names[chosen[0]], origin)
    if field not in known:
        raise RecipeError(f"{origin}: method {names[chosen[0]]!r} has no field {field!r}{nearest(field, known)}")
    return [{**entry, field: value} if number == chosen[0] else entry for number, entry in enumerate(entries)]


def _fields(method: str, origin: str) -> list[str]:
    if method == FULL:
        return []
    try:
        return [field.name for field in fields(lookup(method))]
    except EpitaxyError as error:
        raise RecipeError(f"{origin}: {error}") from None
