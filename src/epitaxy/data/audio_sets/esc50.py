"""ESC-50: 2,000 recordings of five seconds in 50 classes of environmental sound.  Piczak, ACM Multimedia 2015.

``audio/{fold}-{clip}-{take}-{target}.wav`` and ``meta/esc50.csv``.  The five folds are the authors', no recording of
one source lies in two of them.  ``data.fold`` is the fold that is tested; the protocols are

* ``published``: three folds train, one validates, one tests, as Cappellazzo et al. (arXiv 2312.03694) do: for test
  fold f validation is f - 1 and training f + 1, f + 2, f + 3, all cyclic.
* ``usual``: the four other folds train; a tenth of their source recordings, class by class, is kept for validation.
* ``legacy``: the four other folds train, the test fold doubles as validation.  Harmless only where nothing is chosen
  by validation (``train.keep_best: false`` and no ``train.patience``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from epitaxy.core.errors import FormatError
from epitaxy.data.divide import cut
from epitaxy.data.layout import add, chosen_fold, chosen_protocol, disjoint, rooted, table_of, usable, verify, whole
from epitaxy.data.spec import DataSpec, Pool, Row
from epitaxy.data.stored import Tree

TITLE, TABLE, FOLDS, CLASSES = "ESC-50", "meta/esc50.csv", 5, 50
PROTOCOLS = ("published", "usual", "legacy")
VALIDATION_SHARE = 0.1


def read_esc50(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of ESC-50 with their splits; raises ``FormatError`` naming the line or file that is wrong."""
    protocol, tested = chosen_protocol(spec, TITLE, PROTOCOLS), chosen_fold(spec, TITLE, FOLDS)
    tree = rooted(tree, TABLE, TITLE)
    pool = Pool([], "audio", "esc50")
    sources: dict[str, dict[str, str]] = {f"fold {fold}": {} for fold in range(1, FOLDS + 1)}
    counts: Counter[tuple[int, int]] = Counter()
    recordings: dict[int, bytes] = {}
    lines = list(table_of(tree, TABLE, ("filename", "fold", "target", "category", "src_file")))
    names = _names(lines)
    for where, cells in lines:
        with usable(pool, spec, where):
            fold, target = whole(where, cells, "fold", 1, FOLDS), whole(where, cells, "target", 0, CLASSES - 1)
            category, file = cells["category"], cells["filename"]
            if names[target] != category:
                raise FormatError(f"{where}: target {target} is {names[target]!r} elsewhere and {category!r} here")
            said = file.removesuffix(".wav").split("-")
            if len(said) != 4 or (said[0], said[3]) != (str(fold), str(target)):
                raise FormatError(f"{where}: the name {file!r} does not fit fold {fold} and target {target}")
            counts[fold, target] += 1
            sources[f"fold {fold}"].setdefault(cells["src_file"], file)
            row = add(pool, tree, f"audio/{file}", category, _split(fold, tested, protocol))
            if row is not None:
                recordings[id(row)] = cells["src_file"].encode()
    _verify(pool, tree, spec, counts)
    disjoint(pool, tree, spec, "source recording", sources)
    pool.declared = tuple(names[target] for target in sorted({target for _, target in counts}))
    _settle_validation(pool, protocol, recordings, spec)
    return pool


def _names(lines: Sequence[tuple[str, dict[str, str]]]) -> dict[int, str]:
    """The category that most lines give each target."""
    votes: dict[int, Counter[str]] = defaultdict(Counter)
    for _, cells in lines:
        if cells["target"].isdigit():
            votes[int(cells["target"])][cells["category"]] += 1
    return {target: found.most_common(1)[0][0] for target, found in votes.items()}


def _split(fold: int, tested: int, protocol: str) -> str:
    if fold == tested:
        return "test"
    before = (tested - 2) % FOLDS + 1
    return "validation" if protocol == "published" and fold == before else "train"


def _settle_validation(pool: Pool, protocol: str, recordings: dict[int, bytes], spec: DataSpec) -> None:
    if protocol == "usual":
        rows = [row for row in pool.rows if row.split == "train"]
        for row in cut(rows, {"validation": VALIDATION_SHARE}, recordings, spec)["validation"]:
            row.split = "validation"
        pool.notes.append(f"{spec.source}: validation is a tenth of the source recordings of the four training folds")
    elif protocol == "legacy":
        pool.rows += [Row(row.content, row.label, "validation", row.name) for row in pool.rows if row.split == "test"]
        pool.notes.append(f"{spec.source}: protocol legacy: the test fold doubles as validation")


def _verify(pool: Pool, tree: Tree, spec: DataSpec, counts: Counter[tuple[int, int]]) -> None:
    folds: dict[int, int] = defaultdict(int)
    for (fold, _), count in counts.items():
        folds[fold] += count
    official = {f"clips of fold {fold}": (folds[fold], 400) for fold in range(1, FOLDS + 1)}
    uneven = sorted(key for key, count in counts.items() if count != 8)
    classes = len({target for _, target in counts})
    verify(
        pool, tree, spec, {**official, "classes": (classes, CLASSES), "class and fold without 8 clips": (uneven, [])}
    )
