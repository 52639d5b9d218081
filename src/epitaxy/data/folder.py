"""Folders of pictures or sounds: ``split/class/...`` or ``class/...``, on disk or in a zip archive."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from epitaxy.core.errors import FormatError, nearest
from epitaxy.data.decode import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from epitaxy.data.spec import SPLITS, DataSpec, Modality, Pool, Row
from epitaxy.data.stored import Tree

WHAT = {"vision": "pictures", "audio": "sounds", "text": "texts"}


def read_folder(tree: Tree, spec: DataSpec, modality: Modality) -> Pool:
    """The rows of a folder: the first folder level is the split where it is named as one, the next is the class.

    Files may lie at any depth below their class folder.  Files outside every class folder become unlabelled rows.
    Raises ``FormatError`` for a folder without files or classes.
    """
    suffixes = IMAGE_SUFFIXES if modality == "vision" else AUDIO_SUFFIXES
    if not any(_suffix(path) in suffixes for path in tree.files):
        raise FormatError(f"{tree.root}: no {WHAT[modality]} in this folder; {_found(tree)}")
    tree = tree.unwrapped()
    splits = split_folders(tree, spec)
    pool = Pool([], modality, "image_folder" if modality == "vision" else "audio_folder")
    foreign: list[str] = []
    for folder in splits or [""]:
        split = folder or None
        classes = tree.children(folder)
        filled: Counter[str] = Counter()
        for path in tree.below(folder):
            if _suffix(path) not in suffixes:
                foreign.append(path)
                continue
            inner = PurePosixPath(path).relative_to(folder) if folder else PurePosixPath(path)
            label = inner.parts[0] if len(inner.parts) > 1 else None
            if label is not None:
                filled[label] += 1
            pool.rows.append(Row(tree.files[path], label, split, f"{tree.root}/{path}"))
        if not classes:
            where = f"{tree.root}/{folder}".rstrip("/")
            raise FormatError(f"{where}: expected one folder per class, found {len(tree.below(folder))} files and none")
        pool.empty += [(split, label) for label in classes if not filled[label]]
    if splits:
        unused = sorted(set(tree.children("")) - set(splits))
        if unused:
            pool.notes.append(f"{tree.root}: beside the splits, these folders are not used: {', '.join(unused)}")
    if foreign:
        pool.notes.append(
            f"{tree.root}: {len(foreign)} files are no {WHAT[modality]} and are left out, the first is {foreign[0]}"
        )
    return pool


def modality_of(tree: Tree) -> Modality | None:
    """What a tree holds, by file names; None when neither pictures nor sounds.  Raises when both."""
    pictures = sum(_suffix(path) in IMAGE_SUFFIXES for path in tree.files)
    sounds = sum(_suffix(path) in AUDIO_SUFFIXES for path in tree.files)
    if pictures and sounds:
        raise FormatError(
            f"{tree.root}: holds {pictures} pictures and {sounds} sounds; "
            "say which to use with kind: image_folder or kind: audio_folder"
        )
    return "vision" if pictures else "audio" if sounds else None


def split_folders(tree: Tree, spec: DataSpec) -> list[str]:
    """The top folders that are splits; none when the top folders are classes.

    A class may be called "train" too: its folder holds files and no folders.
    """
    tops = tree.children("")
    roles = {name: role for role, aliases in SPLITS.items() for name in aliases}
    roles.update({getattr(spec, role): role for role in SPLITS if isinstance(getattr(spec, role), str)})
    named = [top for top in tops if top in roles]
    trains = [top for top in named if roles[top] == "train"]
    if any(tree.children(top) for top in trains):
        return [top for top in tops if tree.children(top) or top in named]
    if len(named) == len(tops) and len({roles[top] for top in named}) > 1:  # splits without a class below train
        if not trains:
            raise FormatError(f"{tree.root}: found the splits {', '.join(named)} but no folder {spec.train!r}")
        return named
    if spec.train not in SPLITS["train"]:
        raise FormatError(f"{tree.root}: no folder is called {spec.train!r}{nearest(spec.train, tops)}")
    return []


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _found(tree: Tree) -> str:
    if not tree.files:
        return "it is empty" if not tree.folders else f"it has {len(tree.folders)} folders and no file"
    kinds = Counter(_suffix(path) or "no suffix" for path in tree.files)
    return "it holds " + ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
