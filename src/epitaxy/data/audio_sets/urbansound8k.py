"""UrbanSound8K: 8,732 excerpts of up to four seconds in ten classes.  Salamon, Jacoby and Bello, ACM Multimedia 2014.

``audio/fold1`` to ``fold10`` and ``metadata/UrbanSound8K.csv``.  The ten folds are the authors'; they are never
shuffled, because excerpts of one recording would come to lie on both sides.  ``data.fold`` is the fold that is tested;
the protocols are

* ``official``: nine folds are left for training; the one before the test fold (cyclic) validates, eight train.
* ``legacy``: all nine train and the test fold doubles as validation, as published; what is chosen by validation is then
  chosen on the test data.
"""

from __future__ import annotations

from collections import Counter

from epitaxy.core.errors import FormatError
from epitaxy.data.layout import add, chosen_fold, chosen_protocol, disjoint, rooted, table_of, usable, verify, whole
from epitaxy.data.spec import DataSpec, Pool, Row
from epitaxy.data.stored import Tree

TITLE, TABLE, FOLDS = "UrbanSound8K", "metadata/UrbanSound8K.csv", 10
SIZES = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)
CLASSES = (
    "air_conditioner",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "gun_shot",
    "jackhammer",
    "siren",
    "street_music",
)
PROTOCOLS = ("official", "legacy")


def read_urbansound8k(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of UrbanSound8K with their splits; raises ``FormatError`` naming the line or file that is wrong."""
    protocol, tested = chosen_protocol(spec, TITLE, PROTOCOLS), chosen_fold(spec, TITLE, FOLDS)
    tree = rooted(tree, TABLE, TITLE)
    pool = Pool([], "audio", "urbansound8k", declared=CLASSES)
    before = (tested - 2) % FOLDS + 1
    sizes: Counter[int] = Counter()
    recordings: dict[str, dict[str, str]] = {f"fold {fold}": {} for fold in range(1, FOLDS + 1)}
    lies_in = {path.rpartition("/")[2]: path for path in tree.files if path.startswith("audio/fold")}
    for where, cells in table_of(tree, TABLE, ("slice_file_name", "fsID", "fold", "classID", "class")):
        with usable(pool, spec, where):
            fold, number = whole(where, cells, "fold", 1, FOLDS), whole(where, cells, "classID", 0, len(CLASSES) - 1)
            name, label = cells["slice_file_name"], cells["class"]
            if label != CLASSES[number]:
                raise FormatError(f"{where}: class {number} is {CLASSES[number]!r}, found {label!r}")
            path = f"audio/fold{fold}/{name}"
            if path not in tree.files and name in lies_in:
                raise FormatError(
                    f"{where}: {name} belongs to fold {fold}, but lies in {lies_in[name].rpartition('/')[0]}"
                )
            sizes[fold] += 1
            recordings[f"fold {fold}"].setdefault(cells["fsID"], name)
            split = "test" if fold == tested else "validation" if protocol == "official" and fold == before else "train"
            add(pool, tree, path, label, split)
    verify(pool, tree, spec, {f"clips of fold {fold}": (sizes[fold], SIZES[fold - 1]) for fold in range(1, FOLDS + 1)})
    disjoint(pool, tree, spec, "recording", recordings)
    if protocol == "legacy":
        pool.rows += [Row(row.content, row.label, "validation", row.name) for row in pool.rows if row.split == "test"]
        pool.notes.append(f"{spec.source}: protocol legacy: the test fold doubles as validation")
    else:
        pool.notes.append(f"{spec.source}: fold {tested} tests, fold {before} validates, the other eight train")
    return pool
