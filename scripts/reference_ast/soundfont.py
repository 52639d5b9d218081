"""Recorded notes of musical instruments from the FluidR3 sound font (MIT licence)."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scripts.reference_ast.assets import unpack
from scripts.reference_ast.events import LENGTH, RATE, Wave

from epitaxy.data.decode import Waveform

# Records of the SoundFont 2.01 specification, sections 7.6 to 7.10.
_HEADER = np.dtype(
    [("name", "S20"), *((name, "<u4") for name in ("start", "end", "loop_start", "loop_end", "rate")), ("rest", "V6")]
)
_INSTRUMENT = np.dtype([("name", "S20"), ("zone", "<u2")])
_ZONE = np.dtype([("generator", "<u2"), ("modulator", "<u2")])
_GENERATOR = np.dtype([("kind", "<u2"), ("amount", "<u2")])
_SAMPLE_ID = 53  # the generator that names a zone's sample, SoundFont 2.01 specification, section 8.1.2
HELD_OUT_INSTRUMENTS = {
    "Alto Sax": "alto sax",
    "Bassoon": "bassoon",
    "Cello": "cello",
    "Ahh Choir": "choir",
    "Church Organ": "church organ",
    "Clarinet": "clarinet",
    "Orchestral Harp": "harp",
    "Harpsichord": "harpsichord",
    "Trombone": "trombone",
    "Xylophone": "xylophone",
}
# Instruments of the pretraining pool: those with recordings of their own, under the sound font's names.
INSTRUMENTS = (
    "Harmonica", "Slap Bass", "Sitar", "Dulcimer", "Pop Bass", "Tenor Sax", "Soprano Sax", "Baritone", "Shenai",
    "Flute", "Piccolo", "Accordian", "Pizzicato", "Violin", "Viola", "Pan Flute", "Reed Organ", "Hi Hats",
    "Jazz Guitar", "Fretless Bass", "Contrabass", "Tuba", "Oboe", "English Horn", "Banjo", "Clean Guitar",
    "Palm Muted Guitar", "Overdrive Guitar", "Distortion Guitar", "BagPipe", "Strings", "Shamisen", "Koto",
    "Muted Trumpet", "Steel Drum", "Synth Brass", "Brass Right", "Marimba", "Legend EP 2", "Celesta", "Trumpet",
    "Rhodes EP 1", "Synth Voice", "Ohh Voices", "Picked Bass", "Fingered Bass", "Steel String Guitar", "Nylon Guitar",
    "Rock Organ", "Percussive Organ", "French Horns", "Power Toms", "Std Tom", "Brush Snares", "TR-808",
    "Electronic Snares", "Hand Perc", "Crashes & Rides", "Percussion", "Misc. Percussion", "Timpani", "Solo Vox",
    "Yamaha Grand Piano", "Vibraphone", "Electric Piano", "Music Box", "Acoustic Bass", "Clavinet", "Recorder",
    "Guitar Harmonics", "Ocarina", "Kalimba", "Orchestra Hit", "Glockenspiel", "Applause", "Gun", "Sea Shore",
    "Telephone",
)  # fmt: skip


@dataclass(frozen=True)
class Note:
    """One recording: where its 16-bit samples lie, where it loops (in samples from its start), and its rate in Hz."""

    name: str
    start: int
    length: int
    loop: tuple[int, int]
    rate: int


def _chunks(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        (size,) = struct.unpack_from("<I", data, start + 4)
        if data[start : start + 4] == b"LIST":
            yield from _chunks(data, start + 12, start + 8 + size)
        else:
            yield data[start : start + 4], start + 8, size
        start += 8 + size + size % 2


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("latin1").strip()


def take_name(name: str) -> str:
    """The name of a recording without its stereo side: both sides are one recording."""
    return re.sub(r"\s*(\(L\)?|\(R\)?|(?<=\d)[LR])$", "", name)


class SoundFont:
    """The recordings of each instrument of an SF2 file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        where = {name: (start, size) for name, start, size in _chunks(self._data, 12, len(self._data))}
        self._samples = where[b"smpl"][0]

        def records(name: bytes, layout: np.dtype) -> np.ndarray:
            start, size = where[name]
            return np.frombuffer(self._data, layout, size // layout.itemsize, start)

        headers, instruments = records(b"shdr", _HEADER), records(b"inst", _INSTRUMENT)
        zones, generators = records(b"ibag", _ZONE)["generator"], records(b"igen", _GENERATOR)
        self.notes: dict[str, list[Note]] = {}
        for here, following in pairwise(instruments):
            own = generators[zones[here["zone"]] : zones[following["zone"]]]
            takes: dict[str, Note] = {}
            for header in headers[sorted(set(own["amount"][own["kind"] == _SAMPLE_ID].tolist()))]:
                start = int(header["start"])
                loop = int(header["loop_start"]) - start, int(header["loop_end"]) - start
                name = take_name(_text(header["name"]))
                note = Note(name, start, int(header["end"]) - start, loop, int(header["rate"]))
                if note.length > 400:
                    takes.setdefault(note.name, note)
            self.notes[_text(here["name"])] = list(takes.values())

    def play(self, note: Note, semitones: float, rng: Generator) -> Wave:
        """One clip of ``LENGTH`` samples: the note transposed by playing it faster or slower, held by its loop."""
        raw = np.frombuffer(self._data, np.int16, note.length, self._samples + 2 * note.start) / 32768
        speed = 2 ** (semitones / 12)
        needed = int((LENGTH / RATE + 0.1) * note.rate * speed)
        start, end = note.loop
        if 0 < start < end <= note.length and end - start > 8 and needed > end:
            repeats = -(-(needed - end) // (end - start))
            raw = np.concatenate([raw[:end], np.tile(raw[start:end], repeats)])
        # A rate that shares a factor with the model's keeps the resampler's filter table small: 200 Hz are 8 cents.
        rate = 200 * round(note.rate * speed / 200)
        wave = Waveform(raw[:needed].astype(np.float32), rate).at(RATE).samples.astype(np.float64)[:LENGTH]
        # Released at a random time: the recordings themselves would go on for as long as the key is held.
        release = rng.uniform(0.5, 1.5)
        wave = wave * np.exp(-np.maximum(0, np.arange(len(wave)) / RATE - release) / 0.1)
        return np.pad(wave, (0, LENGTH - len(wave)))


def open_soundfont(cache: Path) -> SoundFont:
    """The FluidR3 font from the package."""
    return SoundFont(unpack("instruments", cache) / "usr/share/sounds/sf2/FluidR3_GM.sf2")
