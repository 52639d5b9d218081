"""Words and numbers spoken by espeak-ng, through its C interface."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scripts.reference_ast.assets import unpack
from scripts.reference_ast.events import LENGTH, RATE, Wave

from epitaxy.data.decode import Waveform

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# espeak-ng's voice variants, by the names of its own files: those of the pool, and others that it never hears.
VARIANTS = (
    "f1", "f2", "f3", "m1", "m2", "m3", "m4", "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene",
    "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "RicishayMax", "adam", "anika", "antonio", "aunty", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "gustave", "iven", "iven2", "klatt", "klatt2", "klatt3",
    "linda", "marcelo", "pablo", "rob", "steph", "whisper",
)  # fmt: skip
HELD_OUT_VARIANTS = {
    "train": (
        "f4", "m5", "Gene2", "Michael", "RicishayMax2", "grandma", "ian", "iven3", "john", "klatt4", "max",
        "paul",
    ),
    "val": ("m6", "Reed", "norbert", "steph2", "travis", "kaukovalta"),
    "test": (
        "f5", "m7", "m8", "Mike", "Nguyen", "RicishayMax3", "edward2", "iven4", "klatt5", "klatt6", "michel", "miguel",
        "pedro", "robert", "sandro", "shelby", "steph3", "victor", "zac", "grandpa",
    ),
}  # fmt: skip
HELD_OUT_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
WORDS = (
    "apple", "arm", "baby", "ball", "banana", "bed", "bird", "blue", "boat", "book", "bottle", "box", "bread", "bridge",
    "brother", "brown", "bus", "butter", "button", "camera", "car", "cat", "chair", "cheese", "child", "church", "city",
    "clock", "cloud", "coffee", "cold", "cow", "cup", "dance", "dark", "day", "dog", "door", "dream", "drink", "ear",
    "earth", "egg", "eye", "family", "farm", "father", "finger", "fire", "fish", "flower", "food", "foot", "friend",
    "fruit", "garden", "girl", "glass", "gold", "grass", "green", "hair", "hand", "happy", "hat", "head", "heart",
    "horse", "house", "ice", "island", "job", "juice", "jump", "key", "kitchen", "knife", "lamp", "leaf", "letter",
    "lion", "machine", "market", "milk", "money", "monkey", "moon", "morning", "mother", "mountain", "mouse", "music",
    "night", "nose", "ocean", "orange", "paper", "pencil", "people", "phone", "picture", "plane", "plate", "potato",
    "queen", "rabbit", "radio", "rain", "red", "river", "road", "school", "shirt", "shoe", "silver", "sister", "sky",
    "snow", "song", "spoon", "star", "stone", "street", "sugar", "summer", "sun", "table", "teacher", "thunder",
    "tiger", "time", "tree", "village", "voice", "water", "wheel", "window", "winter", "yellow", "zebra",
)  # fmt: skip
# Languages of the pool: none of those that the human speakers of the evaluation use.
LANGUAGES = (
    "af", "ar", "cmn", "cs", "cy", "de", "eo", "et", "eu", "fa", "fi", "ga", "hi", "hr", "hu", "id", "is", "it", "ja",
    "ka", "ko", "lv", "mk", "mt", "nb", "pl", "pt", "sk", "sl", "sq", "sv", "sw", "ta", "tr", "uk", "vi",
)  # fmt: skip


class Espeak:
    """The synthesiser.  It holds global state: make one, and use it from one thread."""

    def __init__(self, cache: Path, seed: int = 0) -> None:
        package = unpack("speech", cache) / "espeakng_loader"
        self._library: Any = ctypes.CDLL(str(package / "libespeak-ng.so"))
        self._pieces: list[NDArray[np.int16]] = []
        retrieval = 2  # AUDIO_OUTPUT_SYNCHRONOUS
        self.rate = self._library.espeak_Initialize(retrieval, 0, os.fsencode(package / "espeak-ng-data"), 0)
        if self.rate <= 0:
            raise RuntimeError("espeak-ng did not start")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # otherwise breath and hoarseness differ each time
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept, or it would be collected while the library holds it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int, tone_range: int) -> Wave:
        """Speech at 16 kHz without the silence around it; ``rate`` in words a minute, pitch and range 0 to 100."""
        self._pieces = []
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        for number, value in ((1, rate), (3, pitch), (4, tone_range)):
            self._library.espeak_SetParameter(number, value, 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, 1, None, None)
        self._library.espeak_Synchronize()
        if not self._pieces:
            raise RuntimeError(f"espeak-ng said nothing for {text!r} with {voice!r}")
        samples = np.concatenate(self._pieces).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
        if len(loud):
            samples = samples[loud[0] : loud[-1] + 1]
        return Waveform(samples, self.rate).at(RATE).samples.astype(np.float64)

    def clip(self, text: str, voice: str, rng: Generator) -> Wave:
        """One clip of ``LENGTH`` samples: random speed, pitch and melody, at a random place."""
        wave = self.say(text, voice, int(rng.integers(120, 230)), int(rng.integers(20, 85)), int(rng.integers(20, 90)))
        if len(wave) >= LENGTH:
            start = int(rng.integers(0, len(wave) - LENGTH + 1))
            return wave[start : start + LENGTH]
        before = int(rng.integers(0, min(LENGTH - len(wave), int(0.3 * RATE)) + 1))
        return np.pad(wave, (before, LENGTH - len(wave) - before))


def random_number(rng: Generator) -> str:
    """Something that every language says in its own way, and that the synthesiser can read: a number."""
    return str(int(rng.choice([rng.integers(11, 100), rng.integers(100, 1000), rng.integers(1000, 100_000)])))
