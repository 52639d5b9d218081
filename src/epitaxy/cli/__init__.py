"""The command line: ``epitaxy <verb> [recipe.yaml] [key=value ...]``, one verb per file.

Nothing heavy is imported before a verb runs, so that ``epitaxy --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

CRASH, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error of the input or the program, 2 for wrong usage.

    An error is one sentence on stderr; ``--debug``, anywhere on the line, shows the traceback instead.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from epitaxy.cli.app import app, plain_warnings
    from epitaxy.cli.eval import spread

    plain_warnings()
    try:
        app(spread([word for word in given if word != "--debug"]), prog_name="epitaxy")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's own translation of Ctrl-C
            print("interrupted", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else CRASH if stop.code else 0
    except Exception as error:
        if debug:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return CRASH
    return 0


def _sentence(error: Exception) -> str:
    from epitaxy.core.errors import EpitaxyError

    text = " ".join(str(error).split())
    if isinstance(error, EpitaxyError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    return f"{type(error).__name__}: {text} (unexpected; --debug shows where)"


__all__ = ["main"]
