"""What the readers of official layouts share: the root, its tables, the fold, and checks against the known numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epitaxy.core.errors import EpitaxyError, FormatError, nearest
from epitaxy.data.spec import DataSpec, Pool, Row
from epitaxy.data.stored import Tree
from epitaxy.data.table import separated


def require_own_splits(spec: DataSpec, title: str) -> None:
    """Raise when ``spec`` chooses splits itself: those of ``title`` are set by its authors."""
    for name, plain in (("train", "train"), ("validation", None), ("test", None)):
        if getattr(spec, name) != plain:
            raise EpitaxyError(
                f"data.{name}: the splits of {title} are those of its authors, chosen by data.protocol and data.fold; "
                f"leave data.{name} out"
            )


def chosen_protocol(spec: DataSpec, title: str, known: Sequence[str]) -> str:
    """The protocol asked for, or the first of ``known``."""
    require_own_splits(spec, title)
    if spec.protocol is None:
        return known[0]
    if spec.protocol not in known:
        raise EpitaxyError(f"data.protocol: {title} has no protocol {spec.protocol!r}{nearest(spec.protocol, known)}")
    return spec.protocol


def chosen_fold(spec: DataSpec, title: str, count: int) -> int:
    """The fold that is tested, from 1."""
    if spec.fold is None:
        raise EpitaxyError(f"data.fold: {title} has {count} folds; say which one is tested, 1 to {count}")
    if spec.fold > count:
        raise EpitaxyError(f"data.fold: {title} has folds 1 to {count}, got {spec.fold}")
    return spec.fold


def refuse_fold(spec: DataSpec, title: str) -> None:
    """Raise when a fold is asked for of a set that has none."""
    if spec.fold is not None:
        raise EpitaxyError(f"data.fold: {title} has one division and no folds; leave data.fold out")


def rooted(tree: Tree, marker: str, title: str) -> Tree:
    """The part of ``tree`` in which ``marker`` lies where ``title`` has it; raises when there is none, or several."""
    places = [path.removesuffix(marker) for path in tree.files if path == marker or path.endswith(f"/{marker}")]
    if not places:
        raise FormatError(
            f"{tree.root}: not the layout of {title}: {marker} is missing; "
            f"found {', '.join(sorted({path.split('/')[0] for path in tree.files})[:6]) or 'no file'}"
        )
    if len(places) > 1:
        raise FormatError(f"{tree.root}: holds {len(places)} copies of {title}; name one of them")
    (prefix,) = places
    if not prefix:
        return tree
    inner = Tree(f"{tree.root}/{prefix.rstrip('/')}")
    inner.files = {path.removeprefix(prefix): file for path, file in tree.files.items() if path.startswith(prefix)}
    inner.folders = {path.removeprefix(prefix) for path in tree.folders if path.startswith(prefix)} - {""}
    return inner


def text_of(tree: Tree, path: str) -> str:
    """The text of a file of the tree; raises ``FormatError`` when it is missing or no UTF-8."""
    if path not in tree.files:
        raise FormatError(f"{tree.root}/{path}: no such file")
    try:
        return tree.files[path].read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{tree.root}/{path}: not a text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise FormatError(f"{tree.root}/{path}: cannot be read ({error.strerror or error})") from None


def table_of(tree: Tree, path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a CSV table as (how messages call the line, its cells); raises when a column is missing."""
    name = f"{tree.root}/{path}"
    lines = list(separated(Path(name), text_of(tree, path)))
    if not lines:
        raise FormatError(f"{name}: the table has no rows")
    for column in columns:
        if column not in lines[0][1]:
            raise FormatError(f"{name}: no column is called {column!r}; found {', '.join(lines[0][1])}")
    return ((f"{name}:{number}", {key: str(value).strip() for key, value in line.items()}) for number, line in lines)


def whole(where: str, cells: Mapping[str, str], column: str, low: int, high: int) -> int:
    """A cell as a whole number within bounds."""
    text = cells[column]
    if not text.isdigit() or not low <= int(text) <= high:
        raise FormatError(f"{where}: {column}: expected a whole number from {low} to {high}, found {text!r}")
    return int(text)


def add(pool: Pool, tree: Tree, path: str, label: str, split: str) -> Row | None:
    """Add the file at ``path``; one that is not there goes to ``pool.missing``."""
    name = f"{tree.root}/{path}"
    if path not in tree.files:
        pool.missing.append((name, "no such file"))
        return None
    row = Row(tree.files[path], label, split, name)
    pool.rows.append(row)
    return row


@contextmanager
def usable(pool: Pool, spec: DataSpec, where: str) -> Iterator[None]:
    """What is wrong with one line ends the reading, or with ``on_bad="skip"`` that line is left out and listed."""
    try:
        yield
    except FormatError as error:
        if spec.on_bad != "skip":
            raise
        pool.missing.append((where, str(error).removeprefix(f"{where}: ")))


def verify(pool: Pool, tree: Tree, spec: DataSpec, counts: Mapping[str, tuple[Any, Any]]) -> None:
    """Compare what was found with the official numbers, ``{what: (found, official)}``.

    With ``spec.verify`` the first difference raises ``FormatError``, else all differences become notes.
    """
    for what, (found, official) in counts.items():
        if found != official:
            told = f"{tree.root}: an incomplete or altered copy: {what}: expected {official}, found {found}"
            if spec.verify:
                raise FormatError(f"{told}; fetch it again, or go on as it is with data.verify: false")
            pool.notes.append(told)


def disjoint(pool: Pool, tree: Tree, spec: DataSpec, what: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Check that no recording or speaker lies on two sides: ``groups`` is {side: {group: an example of it}}."""
    sides = list(groups)
    for place, side in enumerate(sides):
        for other in sides[place + 1 :]:
            common = sorted(groups[side].keys() & groups[other].keys())
            if common:
                told = (
                    f"{tree.root}: {what} {common[0]} is in {side} ({groups[side][common[0]]}) and in {other} "
                    f"({groups[other][common[0]]}), as {len(common)} in all; the score would be too good"
                )
                if spec.verify:
                    raise FormatError(f"{told}; fetch the set again, or go on as it is with data.verify: false")
                pool.notes.append(told)
