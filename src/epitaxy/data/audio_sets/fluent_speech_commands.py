"""Fluent Speech Commands: 30,043 spoken orders to a smart home, 31 intents.  Lugosch et al., Interspeech 2019.

``data/{train,valid,test}_data.csv`` name the sounds below ``wavs/speakers``.  A class is an intent: the triple of
action, object and location, written ``activate-lights-kitchen``; the classes stand in the order of the sorted triples.
Transcriptions hold commas, so the tables are read as CSV.  No speaker is in two splits.
"""

from __future__ import annotations

from epitaxy.core.errors import FormatError
from epitaxy.data.layout import add, chosen_protocol, disjoint, refuse_fold, rooted, table_of, usable, verify
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

TITLE, INTENTS = "Fluent Speech Commands", 31
TABLES = {
    "train": ("data/train_data.csv", 23_132),
    "validation": ("data/valid_data.csv", 3_118),
    "test": ("data/test_data.csv", 3_793),
}
SLOTS = ("action", "object", "location")


def read_fluent_speech_commands(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of Fluent Speech Commands with their splits; raises ``FormatError`` naming the line that is wrong."""
    chosen_protocol(spec, TITLE, ("official",))
    refuse_fold(spec, TITLE)
    tree = rooted(tree, TABLES["train"][0], TITLE)
    pool = Pool([], "audio", "fluent_speech_commands")
    intents: set[tuple[str, ...]] = set()
    seen: dict[str, str] = {}
    speakers: dict[str, dict[str, str]] = {split: {} for split in TABLES}
    counts: dict[str, tuple[int, int]] = {}
    for split, (name, official) in TABLES.items():
        lines = list(table_of(tree, name, ("path", "speakerId", *SLOTS)))
        counts[name] = (len(lines), official)
        for where, cells in lines:
            with usable(pool, spec, where):
                intent = tuple(cells[slot] for slot in SLOTS)
                if not all(intent):
                    raise FormatError(
                        f"{where}: expected an action, an object and a location, found {', '.join(intent)!r}"
                    )
                path = cells["path"]
                if path in seen:
                    raise FormatError(f"{where}: {path} is named already in {seen[path]}")
                seen[path] = where
                intents.add(intent)
                speakers[split].setdefault(cells["speakerId"], path)
                add(pool, tree, path, "-".join(intent), split)
    verify(pool, tree, spec, {**counts, "intents": (len(intents), INTENTS)})
    disjoint(pool, tree, spec, "speaker", speakers)
    pool.declared = tuple("-".join(intent) for intent in sorted(intents))
    return pool
