"""The Typer application: its options, its verbs, and how warnings look."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from epitaxy.cli import bench, demo, doctor, eval, export, inspect, merge, methods, plan, predict, report, train
from epitaxy.version import __version__

EPILOG = "Recipes ship with the package: try `epitaxy plan demo/lora`, then `epitaxy train demo/lora`."

app = typer.Typer(
    name="epitaxy",
    help="Thin, trainable layers on frozen models: adapt, measure, merge and share them.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"epitaxy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before or after any verb."""


for verb in (demo, train, eval, predict, plan, bench, inspect, methods, merge, export, report, doctor):
    app.command(verb.__name__.rpartition(".")[2])(verb.command)


def plain_warnings() -> None:
    """Print warnings as one line on stderr, without the line of code they came from."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:  # what developers are warned of has other categories
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show
