"""Where files lie: a folder or a zip archive as one flat listing, each file read when it is asked for."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from epitaxy.core.errors import FormatError
from epitaxy.data.spec import Stored

IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True, slots=True)
class File:
    """A file on disk."""

    path: str

    def read(self) -> bytes:
        """Its bytes."""
        return Path(self.path).read_bytes()


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a zip archive, read in place: nothing is unpacked."""

    archive: str
    name: str

    def read(self) -> bytes:
        """Its bytes."""
        try:
            return open_archive(self.archive).read(self.name)
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise OSError(f"damaged in the archive ({error})") from None


def open_archive(path: str) -> zipfile.ZipFile:
    """The open archive at ``path``, kept open; a forked data worker opens its own, so as not to share a position."""
    state = os.stat(path)
    return _open(path, os.getpid(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _open(path: str, process: int, modified: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@dataclass
class Tree:
    """The files below a root by relative path, and its folders (empty ones too)."""

    root: str
    files: dict[str, Stored] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def children(self, folder: str) -> list[str]:
        """Names of the folders directly in ``folder`` ("" is the root)."""
        parent = PurePosixPath(folder)
        return sorted(PurePosixPath(path).name for path in self.folders if PurePosixPath(path).parent == parent)

    def below(self, folder: str) -> list[str]:
        """Paths of all files in ``folder``, at any depth."""
        prefix = f"{folder}/" if folder else ""
        return sorted(path for path in self.files if path.startswith(prefix))

    def unwrapped(self) -> Tree:
        """The tree below folders that hold nothing but one other folder (archives often wrap their content)."""
        tops = self.children("")
        if len(tops) != 1 or any("/" not in path for path in self.files) or not self.children(tops[0]):
            return self
        prefix = tops[0] + "/"
        inner = Tree(f"{self.root}/{tops[0]}")
        inner.files = {path.removeprefix(prefix): stored for path, stored in self.files.items()}
        inner.folders = {path.removeprefix(prefix) for path in self.folders if path.startswith(prefix)}
        return inner.unwrapped()


def list_folder(path: Path) -> Tree:
    """Every file below ``path``; links are followed, hidden files are not looked at.

    Raises ``FormatError`` for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise FormatError(f"{error.filename}: this folder cannot be read ({error.strerror})") from None

    tree, seen = Tree(str(path)), set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _ignored(name))
        relative = PurePosixPath(Path(folder).relative_to(path).as_posix())
        tree.folders.update(str(relative / name) for name in folders)
        for name in names:
            if not _ignored(name):
                tree.files[str(relative / name)] = File(os.path.join(folder, name))
    return tree


def list_archive(path: Path) -> Tree:
    """Every file in the zip archive ``path``.  Raises ``FormatError`` when it is damaged."""
    tree = Tree(str(path))
    try:
        entries = open_archive(str(path)).infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise FormatError(f"{path}: not a readable zip archive ({error})") from None
    for entry in entries:
        inner = PurePosixPath(entry.filename)
        if any(_ignored(part) for part in inner.parts):
            continue
        parents = [str(parent) for parent in inner.parents if str(parent) != "."]
        tree.folders.update(parents)
        if entry.is_dir():
            tree.folders.add(str(inner))
        else:
            tree.files[str(inner)] = Member(str(path), entry.filename)
    return tree


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED
