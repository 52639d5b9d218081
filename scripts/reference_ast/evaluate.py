"""Measure the reference model on sounds of classes it was not trained on.

Each set is judged by a linear probe and by the nearest neighbours on the frozen pooled token, next to a model of the
same shape with random weights.  Every seed draws its own three quarters of the training sounds, and its own random
weights.  Two sets are shipped; synthetic events are made here; the human speakers are read from a Debian package.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from scripts.archives import PARTS, SHIPPED
from scripts.demo_sounds import events_unseen
from scripts.probing import NEIGHBOURS, Split, judge, show
from scripts.reference_ast.assets import DEFAULT_CACHE, unpack
from scripts.reference_ast.events import RATE
from scripts.reference_ast.model import build_model
from scripts.reference_ast.train import DEFAULT_OUTPUT as MODEL
from torch import Tensor
from transformers import ASTFeatureExtractor, ASTForAudioClassification

from epitaxy.data.decode import decode_audio

# Spoken captions of pictures, by one human speaker for each of these languages.
SPEAKERS = {
    "be": "Belarusian", "bg": "Bulgarian", "ca": "Catalan", "da": "Danish", "el": "Greek", "es": "Spanish",
    "fr": "French", "ro": "Romanian", "ru": "Russian",
}  # fmt: skip
SPEAKER_CLIPS = {"train": 40, "val": 15, "test": 45}  # for each speaker
SECONDS = 1.3

Sound = tuple[str, str, bytes]  # part, class, encoded sound


def shipped_sounds(name: str) -> Iterator[Sound]:
    """A set that comes with the package."""
    with zipfile.ZipFile(SHIPPED / f"{name}.zip") as archive:
        for entry in archive.namelist():
            part, label, _ = entry.split("/")
            yield part, label, archive.read(entry)


def human_speakers(cache: Path, clips: Mapping[str, int] = SPEAKER_CLIPS) -> Iterator[Sound]:
    """Captions, the same pictures in the same part for all speakers; ``clips`` of each speaker by part."""
    folder = unpack("captions", cache) / "usr/share/tuxpaint/stamps"
    found = {
        code: {path.name.removesuffix(f"_desc_{code}.ogg"): path for path in folder.rglob(f"*_desc_{code}.ogg")}
        for code in SPEAKERS
    }
    pictures = sorted(set().union(*found.values()))
    # The class must be told by the voice and the language, not by which pictures are named.
    part_of = dict(
        zip(pictures, np.random.default_rng(14).choice(PARTS, len(pictures), p=(0.4, 0.2, 0.4)), strict=True)
    )
    for code, language in SPEAKERS.items():
        order = np.random.default_rng(15).permutation(sorted(found[code]))
        for part, count in clips.items():
            for picture in [name for name in order if part_of[name] == part][:count]:
                yield part, language, found[code][picture].read_bytes()


def read_set(sounds: Iterator[Sound], model: Path) -> dict[str, Split]:
    """Decode, cut to the model's length from the first loud moment, and extract features as its files say."""
    extract = ASTFeatureExtractor.from_pretrained(model)
    inputs: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    classes: dict[str, list[str]] = {part: [] for part in PARTS}
    for part, label, encoded in sounds:
        wave = decode_audio(encoded, label, RATE).samples
        loud = np.flatnonzero(np.abs(wave) > 0.05 * np.abs(wave).max())
        start = max(0, int(loud[0]) - RATE // 20) if len(wave) > SECONDS * RATE else 0
        wave = wave[start : start + int(SECONDS * RATE)]
        inputs[part].append(extract(wave, sampling_rate=RATE, return_tensors="pt")["input_values"][0])
        classes[part].append(label)
    order = {label: index for index, label in enumerate(sorted(set(classes["train"])))}
    return {
        part: Split(torch.stack(inputs[part]), torch.tensor([order[label] for label in classes[part]]))
        for part in PARTS
    }


@torch.inference_mode()
def look(model: ASTForAudioClassification, parts: dict[str, Split]) -> dict[str, Split]:
    """The same parts with the pooled token, which the classifier reads, in place of the inputs."""
    model.eval()
    trunk = model.audio_spectrogram_transformer
    return {
        part: Split(torch.cat([trunk(batch).pooler_output for batch in split.inputs.split(64)]), split.labels)
        for part, split in parts.items()
    }


def main() -> None:
    """Print the table of the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="cache folder (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = ASTForAudioClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    labels = [trained.config.id2label[index] for index in range(trained.config.num_labels)]
    sets = {
        "words-unseen": shipped_sounds("words-unseen"),
        "instruments-unseen": shipped_sounds("instruments-unseen"),
        "events-unseen": iter(events_unseen(arguments.cache).samples),
        "human-speakers": human_speakers(arguments.cache),
    }
    print(f"| {'set':18s} | {'model':7s} | linear probe % | {NEIGHBOURS} neighbours % |")
    print("|---|---|---|---|")
    for name, sounds in sets.items():
        parts = read_set(sounds, arguments.model)
        for kind in ("trained", "random"):
            once = look(trained, parts) if kind == "trained" else None
            scores = [judge(once or look(build_model(labels, seed), parts), seed) for seed in range(arguments.seeds)]
            probes, neighbours = zip(*scores, strict=True)
            print(f"| {name:18s} | {kind:7s} | {show(list(probes))} | {show(list(neighbours))} |", flush=True)


if __name__ == "__main__":
    main()
