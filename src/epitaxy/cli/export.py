"""``epitaxy export``: write an adapter in another program's format, and say what comes through exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter, in any known format, or a run directory.")],
    to: Annotated[str, typer.Option("--to", help="The format: peft, epitaxy.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="A new directory for the result.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The base it was made for.", show_default="what the adapter says")
    ] = None,
) -> None:
    """Write an adapter in another format.

    What the format cannot hold is refused with the reason; nothing is left out silently.
    """
    from epitaxy.cli.console import say
    from epitaxy.cli.opening import adapter_in, open_base, source_of
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.core.files import format_named
    from epitaxy.core.storage import require_free
    from epitaxy.interop import inspect, load, save

    if format_named(to).write is None:
        raise EpitaxyError(f"format {to!r} can be read but not written")
    require_free(out)
    file = adapter_in(adapter)
    contents = inspect(file)
    source = base or source_of(contents)
    opened = open_base(source, contents)
    loaded = load(opened.model, file)
    save(opened.model, out, loaded.name, to)
    written = inspect(out)
    say(f"{contents.path} ({contents.format}) -> {out} ({written.format}), base {source}")
    exact = _same(loaded.tensors(), opened.model, out)
    say(
        f"{written.parameters:,} of {contents.parameters:,} values written, {written.bytes:,} bytes; read back: {exact}"
    )


def _same(tensors: Mapping[str, Any], model: Any, out: Path) -> str:
    """Read the export back onto the same base and compare every tensor."""
    import torch

    from epitaxy.core.host import detach
    from epitaxy.interop import load

    again = load(model, out, "read_back")
    try:
        changes = []
        for key, tensor in again.tensors().items():
            before = tensors.get(key)
            if before is not None and before.shape == tensor.shape:
                changes.append(
                    0.0 if torch.equal(before, tensor) else float((before.float() - tensor.float()).abs().max())
                )
            else:
                return "the tensors are laid out differently there, so they were not compared one by one"
        largest = max(changes, default=0.0)
        return "exact, every value equal" if largest == 0.0 else f"largest difference {largest:.1e}"
    finally:
        detach(model, "read_back")
