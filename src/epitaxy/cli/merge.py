"""``epitaxy merge``: fold an adapter into its base and save the result as a plain transformers model.

With ``--parts`` the parts of an adapter are merged into one plain adapter, and this is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[str, typer.Argument(help="The base: reference-vit, reference-ast, a directory, or a hub name.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter to merge, or a run directory.")],
    out: Annotated[
        Path, typer.Option("--out", help="A new directory for the merged model or adapter.", show_default=False)
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative drift of the outputs that is accepted.", show_default="by type"),
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Merge the parts of a MoSA adapter into a plain adapter, and save that.")
    ] = False,
) -> None:
    """Fold an adapter into its base.

    Outputs are compared before and after, and the drift is printed.
    """
    from epitaxy.cli.console import say
    from epitaxy.cli.opening import adapter_in, open_base
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.core.merge import merge
    from epitaxy.interop import inspect, load, save
    from epitaxy.train.hearing import FRONT_END
    from epitaxy.train.saving import require_free, save_model, weight_bytes

    if parts and tolerance is not None:
        raise EpitaxyError("--tolerance: nothing is folded into the base with --parts, which is exact")
    require_free(out)
    file = adapter_in(adapter)
    contents = inspect(file)
    opened = open_base(base, contents)
    loaded = load(opened.model, file)
    if parts:
        from epitaxy.methods.merge_parts import merge_parts

        before = loaded.config[0]["method"]
        merged = merge_parts(opened.model, loaded.name)
        save(opened.model, out, merged.name)
        say(f"merged the parts of {merged.name!r} ({before}) into {merged}")
        say(f"saved {out}; it opens as any adapter does")
        return
    report = merge(opened.model, loaded.name, tolerance=tolerance)
    front_end = contents.provenance.get(FRONT_END)
    save_model(opened.model, opened.processor, out, front_end if isinstance(front_end, dict) else None)
    say(str(report))
    say(f"saved {out} ({weight_bytes(out):,} bytes); it opens as any transformers model does, without epitaxy")
