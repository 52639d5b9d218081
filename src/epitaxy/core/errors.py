"""The errors a user can meet.  Each message is one sentence: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EpitaxyError(ValueError):
    """Base of every error raised on purpose; the command line prints it without a traceback."""


class SiteError(EpitaxyError):
    """A role or path pattern that matches nothing in the model, or matches something an edit cannot sit on."""


class UnsupportedError(EpitaxyError):
    """A method cannot do this on this model, by its nature; the message says why."""


class FormatError(EpitaxyError):
    """A file that is broken, foreign, or does not fit the model it is loaded into."""


class StateError(EpitaxyError):
    """A call that contradicts the present state: unknown or duplicate names, merging twice, and the like."""


def expect_one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise ``EpitaxyError`` when ``value`` of the field ``what`` is not among the ``known``."""
    choices = tuple(known)
    if value not in choices:
        raise EpitaxyError(f"{what}: expected one of {', '.join(choices)}, found {value!r}")


def expect_dropout(value: float) -> None:
    """Raise ``EpitaxyError`` when ``value`` is no rate of dropout."""
    if not 0 <= value < 1:
        raise EpitaxyError(f"dropout must be from 0 to below 1, got {value}")


def meant(word: str, known: Iterable[str]) -> str:
    """As ``nearest`` where a known word is close, and nothing where none is: for messages that list them anyway."""
    hint = nearest(word, known)
    return hint if "did you mean" in hint else ""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean a, b?"`` for the known words closest to ``word``, or their list when none is close."""
    choices = list(known)
    lowered: dict[str, str] = {}
    for choice in choices:
        lowered.setdefault(choice.lower(), choice)
    close = [lowered[match] for match in difflib.get_close_matches(word.lower(), lowered, n=count, cutoff=0.5)]
    if close:
        return f"; did you mean {' or '.join(repr(match) for match in close)}?"
    return f"; known: {', '.join(sorted(choices)[:12])}" if choices else ""
