"""Grids: a table of a paper as a file.  Rows are mostly methods, columns data sets; every cell is one or more runs.

A grid file names a base ``recipe``, ``rows``, ``columns``, ``seeds``, and the ``published`` numbers to compare with.  A
row or column is a mapping of

* ``recipe``: a recipe file of which the keys count that the file says itself, not those it extends;
* ``set``: keys of a recipe, nested or dotted;
* ``folds`` (columns): values of ``data.fold``, over which the cell is averaged;
* ``curve`` and ``at`` (columns): the chart this column is a point of, and its place there;
* ``group`` (columns): the group whose mean this column is a part of; see ``groups``;
* ``select`` (rows): as the grid's, instead of it.
* ``metric`` and ``also`` (columns): the metric of this column, where it is another than the grid's, and further ones,
  which get a column each.

A cell's recipe is the base recipe, under the row, under the column, under the exceptions in ``cells``.

``select`` is a mapping of dotted keys to lists of values.  Every combination is tried and measured on validation data,
and the best one makes the cell's runs; see ``choosing``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from epitaxy.bench.choosing import Choice, Option, Trial, described, options_of, trial_keys
from epitaxy.core.errors import EpitaxyError, nearest
from epitaxy.core.registry import lookup
from epitaxy.tasks.metrics import OTHER_NAMES
from epitaxy.train.recipe import Recipe, RecipeError, Section
from epitaxy.train.recipe_files import compose, find_recipe, own_keys, with_keys
from epitaxy.train.strict_yaml import parse

GROUPS_MEAN = "Mean of groups"
PERCENT = Annotated[float, Field(ge=0, le=100)]


def _entry(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else {} if value is None else value


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Row(Section):
    """One line of the table."""

    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    select: dict[str, list[Any]] | None = None


class Column(Section):
    """One column of the table."""

    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    folds: tuple[int, ...] = ()
    curve: str | None = None
    at: float | None = None
    group: str | None = None
    metric: str | None = None
    also: tuple[str, ...] = ()


class Grid(Section):
    """A grid file; ``published`` holds percent, of columns or their groups.

    ``cells`` are exceptions by row and column (``skip: true``: no such cell); ``seed_keys`` are the keys that a seed
    sets, those of a method (``method.NAME.FIELD``) in the cells that have it; ``average`` adds a column with the mean
    over all columns; ``compare_with`` names a row, or several, from which the others' differences are shown, seed by
    seed.  The trials of ``select`` are made with ``select_seeds`` (default: the first of ``seeds``) and have the keys
    of ``select_set``.
    """

    title: str
    recipe: str
    out: Path
    rows: dict[str, Annotated[Row, BeforeValidator(_entry)]]
    columns: dict[str, Annotated[Column, BeforeValidator(_entry)]]
    cells: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    seed_keys: tuple[str, ...] = ("train.seed",)
    select: dict[str, list[Any]] = Field(default_factory=dict)
    select_seeds: tuple[int, ...] = ()
    select_set: dict[str, Any] = Field(default_factory=dict)
    metric: str = "accuracy"
    published: dict[str, dict[str, PERCENT]] = Field(default_factory=dict)
    average: bool = False
    compare_with: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """One run of a cell; where settings are chosen, ``recipe`` is the one without them."""

    recipe: Recipe
    fold: int | None
    seed: int

    @property
    def title(self) -> str:
        """What tells it from the other runs of the cell."""
        return (f"fold {self.fold} " if self.fold is not None else "") + f"seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """One row on one column: its runs, the published percentage where there is one, and what is chosen before them."""

    row: str
    column: str
    runs: tuple[Planned, ...]
    published: float | None
    metric: str = "accuracy"
    also: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def title(self) -> str:
        """``row / column``."""
        return f"{self.row} / {self.column}"

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials of all choices."""
        return tuple(trial for choice in self.choices for trial in choice.trials())

    def choice(self, fold: int | None) -> Choice | None:
        """What the runs of ``fold`` are chosen by."""
        return next((choice for choice in self.choices if choice.fold == fold), None)


def load_grid(name: str) -> tuple[Path, Grid]:
    """A grid file, or a shipped one by name; raises ``RecipeError`` naming the key that is wrong."""
    file = find_recipe(name, grid=True)
    values = parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(values, dict) or "rows" not in values:
        raise RecipeError(f"{file}: not a grid: expected the keys recipe, rows and columns; a recipe runs with train")
    for key in values:
        if key not in Grid.model_fields:
            raise RecipeError(f"{file}: {key!r} is no key of a grid{nearest(str(key), Grid.model_fields)}")
    try:
        grid = Grid.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{file}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    _check(file, grid)
    return file, grid


def cells_of(
    file: Path, grid: Grid, only: Sequence[str] = (), overrides: Sequence[str] = (), out: Path | None = None
) -> list[Cell]:
    """The cells that ``only`` leaves, column by column.

    ``only`` holds names of rows, of columns, or ``ROW/COLUMN``, with ``*`` for anything.  An override is ``key=value``
    for every cell or ``SCOPE:key=value`` with a scope written like an entry of ``only``.
    """
    scoped = [_scoped(text) for text in overrides]
    _matching(file, grid, [scope for scope, _ in scoped if scope])
    return [_cell(file, grid, row, column, scoped, out or grid.out) for row, column in _matching(file, grid, only)]


def chosen_of(file: Path, grid: Grid, cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Those of all ``cells`` of a grid that ``only`` leaves, written as for ``cells_of``."""
    pairs = set(_matching(file, grid, only))
    return [cell for cell in cells if (cell.row, cell.column) in pairs]


def _matching(file: Path, grid: Grid, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(row, column) of every cell that a pattern names, of all where there is none; raises for one that names none."""
    pairs = [(row, column) for column in grid.columns for row in grid.rows if not _exception(grid, row, column)[0]]
    for pattern in patterns:
        if not any(_matches(pattern, *pair) for pair in pairs):
            raise RecipeError(f"{file}: no cell is called {pattern!r}{nearest(pattern, [*grid.rows, *grid.columns])}")
    return [pair for pair in pairs if not patterns or any(_matches(pattern, *pair) for pattern in patterns)]


def _cell(file: Path, grid: Grid, row: str, column: str, scoped: Sequence[tuple[str, str]], out: Path) -> Cell:
    base = find_recipe(grid.recipe, beside=file.parent)
    layers = [
        *_layers(file, f"rows.{row}", grid.rows[row].recipe, grid.rows[row].set),
        *_layers(file, f"columns.{column}", grid.columns[column].recipe, grid.columns[column].set),
        (f"{file}: cells.{row}.{column}", _exception(grid, row, column)[1]),
    ]
    overrides = [text for scope, text in scoped if not scope or _matches(scope, row, column)]

    def made(seed: int, fold: int | None) -> Recipe:
        name = (f"fold{fold}-" if fold is not None else "") + f"seed{seed}"
        own: dict[str, Any] = dict.fromkeys(seed_keys, seed)
        own |= {} if fold is None else {"data.fold": fold}
        own |= {"name": f"{slug(row)}-{name}", "out": str(out / slug(row) / slug(column) / name)}
        return compose(base, [*layers, (str(file), own)], overrides)

    seed_keys = grid.seed_keys
    if any(key.startswith("method.") for key in seed_keys):
        present = {entry["method"] for entry in compose(base, layers, overrides).method}
        seed_keys = tuple(key for key in seed_keys if not key.startswith("method.") or key.split(".")[1] in present)
    folds = grid.columns[column].folds or (None,)
    runs = tuple(Planned(made(seed, fold), fold, seed) for fold in folds for seed in grid.seeds)
    options = _options(file, grid, row, overrides)
    choices = [Choice(fold, _tried(file, grid, fold, options, made)) for fold in folds if options]
    published = grid.published.get(row, {}).get(column)
    own_metric = grid.columns[column].metric or grid.metric
    return Cell(row, column, runs, published, own_metric, grid.columns[column].also, tuple(choices))


def _options(file: Path, grid: Grid, row: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What is tried in a row; a key that an override sets is not chosen."""
    select = grid.select if grid.rows[row].select is None else grid.rows[row].select
    given = {text.partition("=")[0] for text in overrides}
    return options_of({key: values for key, values in (select or {}).items() if key not in given}, str(file))


def _tried(
    file: Path,
    grid: Grid,
    fold: int | None,
    options: Sequence[dict[str, Any]],
    made: Callable[[int, int | None], Recipe],
) -> tuple[Option, ...]:
    """The options of one fold with their trials, in ``choosing`` beside the runs."""
    found, names = [], [slug(described(values)) for values in options]
    if len(set(names)) < len(names):
        raise RecipeError(f"{file}: select: a value is listed twice: {', '.join(names)}")
    recipes = {seed: made(seed, fold) for seed in grid.select_seeds or grid.seeds[:1]}
    for values, name in zip(options, names, strict=True):
        trials = []
        for seed, recipe in recipes.items():
            place = recipe.out.parent / "choosing" / name / recipe.out.name
            keys = {**trial_keys(recipe), **values, **grid.select_set, "out": str(place)}
            title = (f"fold {fold} " if fold is not None else "") + f"seed {seed}, trying {described(values)}"
            trials.append(Trial(with_keys(recipe, keys, f"{file}: select"), fold, seed, title))
        found.append(Option(values, tuple(trials)))
    return tuple(found)


def _layers(
    file: Path, place: str, recipe: str | None, keys: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if recipe is not None:
        try:
            found = find_recipe(recipe, beside=file.parent)
        except RecipeError as error:
            raise RecipeError(f"{file}: {place}.recipe: {error}") from None
        yield str(found), {key: value for key, value in own_keys(found).items() if key not in ("name", "out")}
    yield f"{file}: {place}.set", dict(keys)


def _exception(grid: Grid, row: str, column: str) -> tuple[bool, dict[str, Any]]:
    """Whether a cell is left out, and the keys it has of its own."""
    keys = dict(grid.cells.get(row, {}).get(column, {}))
    return bool(keys.pop("skip", False)), keys


def _check(file: Path, grid: Grid) -> None:
    if not grid.rows or not grid.columns or not grid.seeds:
        raise RecipeError(f"{file}: a grid needs at least one row, one column and one seed")
    for what, names in (("rows", grid.rows), ("columns", grid.columns)):
        slugs = [slug(name) for name in names]
        for name in names:
            if "/" in name or not slug(name) or slugs.count(slug(name)) > 1:
                raise RecipeError(f"{file}: {what}: {name!r} cannot name a directory of its own; use other letters")
    groups = {column.group for column in grid.columns.values() if column.group is not None}
    for group in groups:
        if group in grid.columns or group == GROUPS_MEAN:
            raise RecipeError(f"{file}: columns: a group may not be called {group!r}, a column is")
    groups |= {GROUPS_MEAN} if len(groups) > 1 else set()
    for what, table in (("published", grid.published), ("cells", grid.cells)):
        for row, columns in table.items():
            if row not in grid.rows:
                raise RecipeError(f"{file}: {what}: no row is called {row!r}{nearest(row, grid.rows)}")
            known = [*grid.columns, *(groups if what == "published" else ())]
            for column in columns:
                if column not in known:
                    raise RecipeError(f"{file}: {what}: no column is called {column!r}{nearest(column, known)}")
    _known(file, "metric", grid.metric)
    for key in grid.seed_keys:
        if key.startswith("method."):
            try:
                lookup(key.split(".")[1])
            except EpitaxyError as error:
                raise RecipeError(f"{file}: seed_keys: {key}: {error}") from None
    for name in grid.compare_with:
        if name not in grid.rows:
            raise RecipeError(f"{file}: compare_with: no row is called {name!r}{nearest(name, grid.rows)}")
    for name, column_of in grid.columns.items():
        if (column_of.curve is None) is not (column_of.at is None):
            raise RecipeError(f"{file}: columns.{name}: curve and at belong together")
        for metric in (column_of.metric or grid.metric, *column_of.also):
            _known(file, f"columns.{name}", metric)
        if any(also_title(name, metric) in grid.columns for metric in column_of.also):
            raise RecipeError(f"{file}: columns.{name}: a further metric has the name of another column")


def _known(file: Path, place: str, metric: str) -> None:
    """Raise for another name of a metric; a result that lacks the metric is refused when it is read."""
    if (meant := OTHER_NAMES.get(metric.lower())) is not None:
        raise RecipeError(f"{file}: {place}: no metric is called {metric!r}; did you mean {meant!r}?")


def _scoped(text: str) -> tuple[str, str]:
    """An override as (its scope or "", ``key=value``)."""
    found = re.fullmatch(r"([^=:]+):([A-Za-z_][\w.]*=.*)", text, re.DOTALL)
    return (found[1], found[2]) if found else ("", text)


def _matches(pattern: str, row: str, column: str) -> bool:
    first, slash, second = (part.lower() for part in pattern.partition("/"))
    if slash:
        return fnmatch.fnmatchcase(row.lower(), first) and fnmatch.fnmatchcase(column.lower(), second)
    return any(fnmatch.fnmatchcase(name.lower(), first) for name in (row, column))


def also_title(column: str, metric: str) -> str:
    """The name of the column of a further metric."""
    return f"{column}, {metric.replace('_', ' ')}"


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
