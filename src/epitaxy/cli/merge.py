"""``epitaxy merge``: fold an adapter into its base and save the result as a plain transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[str, typer.Argument(help="The base: reference-vit, reference-ast, a directory, or a hub name.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter to merge, or a run directory.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for the merged model.", show_default=False)],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative drift of the outputs that is accepted.", show_default="by type"),
    ] = None,
) -> None:
    """Fold an adapter into its base.

    Outputs are compared before and after, and the drift is printed.
    """
    from epitaxy.cli.console import say
    from epitaxy.cli.opening import adapter_in, open_base
    from epitaxy.core.merge import merge
    from epitaxy.interop import inspect, load
    from epitaxy.train.hearing import FRONT_END
    from epitaxy.train.saving import require_free, save_model, weight_bytes

    require_free(out)
    file = adapter_in(adapter)
    contents = inspect(file)
    opened = open_base(base, contents)
    loaded = load(opened.model, file)
    report = merge(opened.model, loaded.name, tolerance=tolerance)
    front_end = contents.provenance.get(FRONT_END)
    save_model(opened.model, opened.processor, out, front_end if isinstance(front_end, dict) else None)
    say(str(report))
    say(f"saved {out} ({weight_bytes(out):,} bytes); it opens as any transformers model does, without epitaxy")
