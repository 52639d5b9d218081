"""Build the small sound sets that are shipped with the package, as zip files of class folders.

None of the classes were in the pretraining pool of the reference audio model, and no voice or recording is in two parts
of a set.  The sounds are mono, 16 kHz, Opus in Ogg at 24 kbit/s.  The same version of libsndfile gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import struct
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator
from scripts.archives import SHIPPED, Archive, update_index, write_archive
from scripts.reference_ast.assets import DEFAULT_CACHE
from scripts.reference_ast.data import set_level
from scripts.reference_ast.events import EVENTS, HELD_OUT_EVENTS, RATE, Wave
from scripts.reference_ast.soundfont import HELD_OUT_INSTRUMENTS, open_soundfont
from scripts.reference_ast.speech import ACCENTS, HELD_OUT_VARIANTS, HELD_OUT_WORDS, Espeak

WORD_CLIPS = {"train": 24, "val": 8, "test": 20}  # for each word
NOTE_CLIPS = {"train": 20, "val": 6, "test": 14}  # for each instrument
EVENT_CLIPS = {"train": 20, "val": 8, "test": 20}  # for each event
NOTE_SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
SECONDS = 1.1
OPUS_LEVEL = 0.928  # 24 kbit/s on libsndfile's scale from 0 (256) to 1 (6)


def _checksum_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_TABLE = _checksum_table()


def _ogg_checksum(page: bytes) -> int:
    """The checksum of an Ogg page (RFC 3533): 32 bits, polynomial 0x04c11db7, nothing inverted."""
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ _TABLE[value >> 24 ^ byte]
    return value


def with_fixed_serial(data: bytes) -> bytes:
    """The same Ogg stream with serial number 1: encoders draw it at random, which would change the file each time."""
    pages, at = [], 0
    while at < len(data):
        segments = data[at + 26]
        size = 27 + segments + sum(data[at + 27 : at + 27 + segments])
        page = bytearray(data[at : at + size])
        page[14:18], page[22:26] = struct.pack("<I", 1), bytes(4)
        page[22:26] = struct.pack("<I", _ogg_checksum(page))
        pages.append(bytes(page))
        at += size
    return b"".join(pages)


def encode(wave: Wave, rng: Generator) -> bytes:
    """One sound as a file: cut to ``SECONDS``, at a random level, over a faint noise of its own."""
    wave = set_level(wave[: int(SECONDS * RATE)], rng)
    noise = np.cumsum(rng.standard_normal(len(wave))) * rng.uniform(0, 0.3) + rng.standard_normal(len(wave))
    noise -= np.linspace(noise[0], noise[-1], len(noise))
    loudness = np.sqrt((wave**2).mean()) / np.sqrt((noise**2).mean())
    wave = wave + noise * loudness * 10 ** rng.uniform(-2.5, -1.0)
    wave = wave * min(1.0, 0.98 / np.abs(wave).max())
    stream = io.BytesIO()
    soundfile.write(stream, wave, RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
    return with_fixed_serial(stream.getvalue())


def words_unseen(cache: Path) -> Archive:
    """Ten words in English, by voices that the reference model never heard; each part has voices of its own."""
    archive = Archive(
        "Ten spoken words, synthesised, by voices never heard in pretraining",
        "made with espeak-ng 1.52 for this project",
        "Apache-2.0 (this project's own recordings)",
        "ogg",
    )
    espeak, rng = Espeak(cache), np.random.default_rng(11)
    for word in HELD_OUT_WORDS:
        for part, count in WORD_CLIPS.items():
            voices = HELD_OUT_VARIANTS[part]
            for number in range(count):
                voice = f"{rng.choice(ACCENTS)}+{voices[number % len(voices)]}"
                pace, pitch, melody = (int(rng.integers(*limits)) for limits in ((120, 230), (20, 85), (20, 90)))
                spoken = espeak.say(word, voice, pace, pitch, melody)
                pads = rng.integers(0, RATE // 8, 2)
                archive.samples.append((part, word, encode(np.pad(spoken, (int(pads[0]), int(pads[1]))), rng)))
    return archive


def instruments_unseen(cache: Path) -> Archive:
    """Ten instruments that the reference model never heard; no recorded note is in two parts."""
    archive = Archive(
        "Single notes of ten instruments never heard in pretraining",
        "recordings of the FluidR3 sound font, Frank Wen and others, transposed and shortened",
        "MIT",
        "ogg",
    )
    font, rng = open_soundfont(cache), np.random.default_rng(12)
    for source, name in HELD_OUT_INSTRUMENTS.items():
        notes = [font.notes[source][row] for row in rng.permutation(len(font.notes[source]))]
        start = 0.0
        for part, count in NOTE_CLIPS.items():
            end = start + NOTE_SHARES[part]
            own = notes[round(start * len(notes)) : round(end * len(notes))]
            for number in range(count):
                wave = font.play(own[number % len(own)], rng.uniform(-3, 3), rng)
                archive.samples.append((part, name, encode(wave, rng)))
            start = end
    return archive


def events_unseen(cache: Path) -> Archive:
    """Ten kinds of sound made from formulas that the pretraining pool lacks."""
    archive = Archive(
        "Ten kinds of synthetic sound never heard in pretraining", "made for this project", "Apache-2.0", "ogg"
    )
    rng = np.random.default_rng(13)
    for name in HELD_OUT_EVENTS:
        for part, count in EVENT_CLIPS.items():
            archive.samples += [(part, name, encode(EVENTS[name](rng), rng)) for _ in range(count)]
    return archive


def main() -> None:
    """Build all sets and put them into the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="where the zip files are written")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    builders = {"words-unseen.zip": words_unseen, "instruments-unseen.zip": instruments_unseen}
    index = {}
    for filename, build in builders.items():
        index[filename] = write_archive(build(arguments.cache), arguments.output / filename)
        print(f"{filename}: {(arguments.output / filename).stat().st_size} bytes")
    update_index(index, arguments.output)


if __name__ == "__main__":
    main()
