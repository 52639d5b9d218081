"""``epitaxy inspect``: what lies in an adapter's file, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from epitaxy.cli import arguments


def command(
    path: Annotated[Path, typer.Argument(help="An adapter in any known format, or a run directory.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape.")] = False,
    json: arguments.Json = False,
) -> None:
    """Tell what lies in an adapter's file."""
    from epitaxy.cli.console import facts, say, say_json, table
    from epitaxy.cli.opening import adapter_in
    from epitaxy.interop import inspect
    from epitaxy.report.figures import size

    contents = inspect(adapter_in(path))
    folds = _folds(contents.methods)
    if json:
        say_json(
            {
                "path": str(contents.path),
                "format": contents.format,
                "name": contents.name,
                "methods": contents.methods,
                "base": dict(contents.base),
                "provenance": dict(contents.provenance),
                "parameters": contents.parameters,
                "bytes": contents.bytes,
                "folds": folds,
                "tensors": {key: list(shape) for key, shape in contents.shapes.items()},
            }
        )
        return
    facts(
        [
            ("adapter", contents.name),
            ("format", contents.format),
            *(("method", _method(entry)) for entry in contents.methods),
            *((f"base {key}", str(value)) for key, value in contents.base.items() if value),
            ("stores", f"{contents.parameters:,} values in {len(contents.shapes)} tensors"),
            *([("folds", folds)] if folds else []),
            ("file", f"{contents.bytes:,} bytes ({size(contents.bytes)})"),
            *((str(key), _short(value)) for key, value in contents.provenance.items()),
        ]
    )
    if tensors:
        say()
        rows = [[key, " x ".join(map(str, shape)) or "scalar"] for key, shape in contents.shapes.items()]
        table(["tensor", "shape"], rows)


def _folds(methods: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether some model can take the adapter into its weights; None where a method is not known here."""
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.core.fold import fold_obstacle
    from epitaxy.core.registry import from_config, methods_in

    try:
        method = from_config([dict(entry) for entry in methods])
    except EpitaxyError:
        return None
    obstacle = fold_obstacle(method)
    if obstacle is not None:
        return f"no, {obstacle}"
    units = [part.activation for part in methods_in(method) if hasattr(part, "fold_obstacle")]
    if not units:
        return "yes, all of it merges"
    return f"yes, where the feed-forwards have the activation {' and '.join(dict.fromkeys(units))}"


def _method(entry: Mapping[str, Any]) -> str:
    from epitaxy.cli.console import shown

    fields = ", ".join(f"{key}={shown(value)}" for key, value in entry.items() if key != "method" and value is not None)
    return f"{entry['method']} ({fields})" if fields else str(entry["method"])


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."
