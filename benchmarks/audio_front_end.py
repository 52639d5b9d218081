"""(d) What the audio front end costs, against the extractor of transformers, and what its cache saves.

    python -m benchmarks.audio_front_end [--quick] [--rounds 15] [--threads 1] [--clock cpu]

Both sides turn the same 10-second sounds in memory into the input of an AST.  For the cache the sounds are files of
44.1 kHz in stereo, as many data sets have them: an epoch that decodes, resamples and computes, against one that reads.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import ASTFeatureExtractor

from benchmarks.output import Report, arguments, parsed, progress
from epitaxy.bench.measure import Case, interleave, quartiles, ratios
from epitaxy.bench.tables import seconds, table
from epitaxy.data.audio.front_end import build
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.spec import AudioSpec
from epitaxy.data.audio.waveform import Waveform
from epitaxy.data.splits import Example
from epitaxy.data.stored import File


def against_transformers(length: float, count: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Row of the first table: ``count`` sounds of ``length`` seconds."""
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, 0.1, round(length * 16000)).astype(np.float32) for _ in range(count)]
    examples = [Example(Waveform(sound, 16000), 0, "sound") for sound in sounds]
    extractor = ASTFeatureExtractor()
    front_end = build(AudioSpec(), extractor)
    cases = {
        "transformers": Case(lambda: extractor(sounds, sampling_rate=16000, return_tensors="pt")),
        "epitaxy": Case(lambda: front_end.inputs(examples)),
    }
    spent = interleave(cases, rounds, warmup=1, clock=options.timer)
    return {
        "sounds": f"{count} of {length:g} s",
        "transformers": seconds(quartiles(spent["transformers"])),
        "epitaxy": seconds(quartiles(spent["epitaxy"])),
        "epitaxy / transformers": ratios(spent["epitaxy"], spent["transformers"]),
    }


def with_cache(length: float, count: int, rounds: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Row of the second table: epochs over ``count`` files without and with a filled cache."""
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.wav" for number in range(count)]
    for file in files:
        soundfile.write(file, rng.normal(0, 0.1, (round(length * 44100), 2)), 44100)

    def epoch(front_end: Any) -> None:
        for file in files:
            front_end.inputs([Example(Sound(File(str(file)), file.name), 0, file.name)])

    plain = build(AudioSpec(), ASTFeatureExtractor())
    cached = build(AudioSpec(cache=str(folder / "cache")), ASTFeatureExtractor())
    epoch(cached)
    cases = {"computed": Case(lambda: epoch(plain)), "cached": Case(lambda: epoch(cached))}
    spent = interleave(cases, rounds, warmup=1, clock=options.timer)
    return {
        "files": f"{count} of {length:g} s, 44.1 kHz stereo",
        "computed": seconds(quartiles(spent["computed"])),
        "from the cache": seconds(quartiles(spent["cached"])),
        "cached / computed": ratios(spent["cached"], spent["computed"]),
    }


def run(report: Report, options: argparse.Namespace) -> None:
    """Measure everything of this comparison and put it into ``report``."""
    rounds = options.rounds or (2 if options.quick else 15)
    count = 2 if options.quick else 16
    rows = []
    for length in (1.0, 10.0):
        progress(f"front end, {length:g} s")
        rows.append(against_transformers(length, count, rounds, options))
    report.add(
        "extractor", "Log-mel features of AST: our front end against the extractor of transformers", rows, table(rows)
    )
    progress("cache")
    with tempfile.TemporaryDirectory() as folder:
        rows = [with_cache(5.0, count, rounds, Path(folder), options)]
    report.add("cache", "An epoch's features: computed, and from the cache", rows, table(rows))


def main() -> None:
    options = parsed(arguments(__doc__))
    report = Report("audio_front_end", options)
    run(report, options)
    report.finish()


if __name__ == "__main__":
    main()
