"""``epitaxy report``: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run directory, or several to compare.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the page goes.", show_default="report.html in the (first) run")
    ] = None,
) -> None:
    """Build the page of a run, or compare several."""
    from epitaxy.cli.console import say
    from epitaxy.report import build_comparison, build_report

    several = len(runs) > 1
    say(str(build_comparison(runs, out or runs[0] / "comparison.html") if several else build_report(runs[0], out)))
