"""``epitaxy methods``: every method there is, with its fields, its paper and what it cannot do."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from typing import Annotated, Any

import typer

from epitaxy.cli import arguments

OURS = "epitaxy"


def command(
    pattern: Annotated[
        str, typer.Argument(metavar="[GLOB]", help="Only methods whose name matches, such as '*o*'.")
    ] = "*",
    json: arguments.Json = False,
) -> None:
    """List every method, its fields and its limits.

    Methods of other installed packages are included.
    """
    from epitaxy.cli.console import say, say_json, shown, table
    from epitaxy.core.errors import EpitaxyError, nearest
    from epitaxy.core.registry import methods

    known = methods()
    chosen = {name: cls for name, cls in known.items() if fnmatch.fnmatchcase(name, pattern)}
    if not chosen:
        raise EpitaxyError(f"no method matches {pattern!r}{nearest(pattern, known)}")
    found = [describe(name, cls) for name, cls in chosen.items()]
    if json:
        say_json(found)
        return
    rows = [
        [
            method["name"] if method["package"] == OURS else f"{method['name']} (from {method['package']})",
            " ".join(f"{name}={shown(value)}" for name, value in method["fields"].items()),
            "; ".join(f"{ability}: {reason}" for ability, reason in method["cannot"].items()) or "-",
            method["paper"],
        ]
        for method in found
    ]
    table(["method", "fields", "cannot", "paper"], rows)
    say("\nIn recipes there is also `full`: every parameter of the base trains, and no adapter is made.")


def describe(name: str, cls: type[Any]) -> dict[str, Any]:
    """What is known of a method, as plain data."""
    document = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip()
    return {
        "name": name,
        "paper": document.splitlines()[0] if document else "",
        "package": cls.__module__.partition(".")[0],
        "fields": {field.name: _default(field) for field in dataclasses.fields(cls)},
        "cannot": dict(cls.cannot),
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required"
