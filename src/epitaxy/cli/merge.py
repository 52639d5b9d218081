"""``epitaxy merge``: put an adapter into its base and save the result as a plain transformers model.

With ``--fold`` bottlenecks widen the feed-forwards.  With ``--parts`` the parts of an adapter are merged into one plain
adapter, and this is saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn


def command(
    base: Annotated[str, typer.Argument(help="The base: reference-vit, reference-ast, a directory, or a hub name.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter to merge, or a run directory.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for the merged model.", show_default=False)],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative drift of the outputs that is accepted.", show_default="by type"),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Make bottlenecks hidden units of the feed-forwards; merge the rest.")
    ] = False,
    timm: Annotated[bool, typer.Option("--timm", help="With --fold: write a ViT under timm's names.")] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Merge the parts of a MoSA adapter into a plain adapter, and save that.")
    ] = False,
) -> None:
    """Put an adapter into its base.

    What is linear is merged, and the drift of the outputs is printed. With --fold, bottlenecks beside a feed-forward
    widen it; the model keeps its class.
    """
    from epitaxy.cli.console import say
    from epitaxy.cli.opening import adapter_in, open_base
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.core.fold import fold as fold_adapter
    from epitaxy.core.merge import merge
    from epitaxy.core.storage import require_free
    from epitaxy.interop import inspect, load, save
    from epitaxy.interop.timm import save_timm
    from epitaxy.train.front_ends import FRONT_END
    from epitaxy.train.saving import save_model, weight_bytes

    if parts and fold:
        raise EpitaxyError("--parts saves an adapter and --fold a model, which merges the parts too; leave one out")
    if parts and tolerance is not None:
        raise EpitaxyError("--tolerance: nothing is folded into the base with --parts, which is exact")
    if fold and tolerance is not None:
        raise EpitaxyError("--tolerance limits the drift of a merge, and --fold has its own limit; leave one out")
    if timm and not fold:
        raise EpitaxyError("--timm writes a folded model; give --fold too, which also merges what is linear")
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
    model = opened.model
    if fold:
        model = fold_adapter(model, loaded.name)
        done = f"folded {loaded.name!r}: {_weights(opened.model):,} parameters of the base, {_weights(model):,} now"
    else:
        done = str(merge(model, loaded.name, tolerance=tolerance))
    if timm:
        save_timm(model, out)
        opens = "the arguments of timm's VisionTransformer are in timm.json"
    else:
        front_end = contents.provenance.get(FRONT_END)
        save_model(model, opened.processor, out, front_end if isinstance(front_end, dict) else None)
        opens = "it opens as any transformers model does, without epitaxy"
    say(done)
    say(f"saved {out} ({weight_bytes(out):,} bytes); {opens}")


def _weights(model: nn.Module) -> int:
    """Parameters of a model, its adapters' left out."""
    return sum(value.numel() for name, value in model.named_parameters() if "epitaxy" not in name.split("."))
