"""Food-101: 101,000 pictures of 101 dishes.  Bossard et al., ECCV 2014.

``images/<class>/<id>.jpg`` and ``meta/{train,test}.txt`` with lines ``<class>/<id>``, or the same as ``.json``, a
mapping of classes to such names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from epitaxy.core.errors import FormatError
from epitaxy.data.image_sets.official import Official, settle
from epitaxy.data.layout import add, rooted, text_of, usable
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

FOOD101 = Official("food101", "Food-101", 101, {"train": 75_750, "test": 25_250})


def read_food101(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of Food-101; raises ``FormatError`` naming the line or file that is wrong."""
    suffix = "txt" if any(path.endswith("meta/test.txt") for path in tree.files) else "json"
    tree = rooted(tree, f"meta/test.{suffix}", FOOD101.title)
    pool = Pool([], "vision", "food101")
    seen: dict[str, str] = {}
    for split in FOOD101.counts:
        for where, name in _names(tree, f"meta/{split}.{suffix}"):
            with usable(pool, spec, where):
                dish, slash, picture = name.partition("/")
                if not slash or not dish or not picture or "/" in picture:
                    raise FormatError(f"{where}: expected class/id, found {name!r}")
                if name in seen:
                    raise FormatError(f"{where}: {name} is named already in {seen[name]}")
                seen[name] = where
                add(pool, tree, f"images/{name}.jpg", dish, split)
    return settle(pool, spec, FOOD101, tree.root)


def _names(tree: Tree, file: str) -> Iterator[tuple[str, str]]:
    """(How messages call the place, ``class/id``)."""
    text, where = text_of(tree, file), f"{tree.root}/{file}"
    if file.endswith(".txt"):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{where}:{number}", line.strip()
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(names, list) for names in values.values()):
        raise FormatError(f"{where}: expected a mapping of classes to lists of names")
    for names in values.values():
        for name in names:
            yield where, str(name)
