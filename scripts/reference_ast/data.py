"""The pretraining pool (made once, with the teacher's features) and the batches drawn from it.

A batch depends only on the seed and the step number, so a run that is stopped and resumed hears the same sounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from scripts.reference_ast.assets import unpack
from scripts.reference_ast.events import EVENTS, FRAMES, HELD_OUT_EVENTS, LENGTH, RATE, Wave
from scripts.reference_ast.features import BINS, FLOOR, log_mel
from scripts.reference_ast.model import CLIP_FRAMES, PATCH
from scripts.reference_ast.soundfont import HELD_OUT_INSTRUMENTS, INSTRUMENTS, open_soundfont
from scripts.reference_ast.speech import ACCENTS, LANGUAGES, VARIANTS, WORDS, Espeak, random_number
from scripts.reference_ast.teacher import WIDTH, Teacher
from torch import Tensor

from epitaxy.data.decode import decode_audio

CLIPS_PER_WORD, CLIPS_PER_LANGUAGE, CLIPS_PER_EVENT, CLIPS_PER_INSTRUMENT, CLIPS_PER_SAMPLE = 40, 60, 90, 50, 8
TEACHER_DIMENSIONS = 128
SLOT = 4  # frames of 10 ms that share one feature of the teacher
NO_LABEL = -1


@dataclass
class Pool:
    """All sounds with their labels (``NO_LABEL`` where there is none) and the teacher's view of them."""

    sounds: Tensor  # (n, FRAMES, BINS) log-mel powers, half precision
    label: Tensor  # index into label_names()
    identity: Tensor  # index into the voices and recordings
    end: Tensor  # frame after which nothing but silence follows
    teacher: Tensor  # (n, FRAMES / SLOT, TEACHER_DIMENSIONS), unit length, half precision


Item = tuple[Wave, str, str | None]  # clip, class, who or what made it


def label_names(cache: Path) -> list[str]:
    """The classes of the exported classifier."""
    groups = {f"sample: {path.stem.split('_')[0]}" for path in _recordings(cache)}
    return [
        *sorted(f"event: {name}" for name in EVENTS if name not in HELD_OUT_EVENTS),
        *sorted(f"instrument: {name.lower()}" for name in INSTRUMENTS),
        *sorted(f"language: {name}" for name in LANGUAGES),
        *sorted(groups),
        *sorted(f"word: {word}" for word in WORDS),
    ]


def identity_names(cache: Path) -> list[str]:
    """The voices and the single recordings, which a second head tells apart."""
    return [*(f"voice: {name}" for name in VARIANTS), *(f"recording: {path.stem}" for path in _recordings(cache))]


def _recordings(cache: Path) -> list[Path]:
    # Bells are among the events that are held out.
    folder = unpack("samples", cache) / "usr/share/sonic-pi/samples"
    return sorted(path for path in folder.glob("*.flac") if "bell" not in path.stem.split("_")[-1])


def set_level(wave: Wave, rng: Generator) -> Wave:
    """Scale so that the peak is between -20 dB and full scale."""
    return wave * (10 ** rng.uniform(-1.0, -0.02) / (np.abs(wave).max() + 1e-9))


def _say(cache: Path, label: str, count: int, seed: list[int], sink: Connection) -> None:
    """Speak ``count`` clips of a word or a language into ``sink``."""
    espeak, rng = Espeak(cache, seed[-1]), np.random.default_rng(seed)
    kind, text = label.split(": ")
    for _ in range(count):
        variant = str(rng.choice(VARIANTS))
        if kind == "word":
            clip = espeak.clip(text, f"{rng.choice(ACCENTS)}+{variant}", rng)
        else:
            clip = espeak.clip(random_number(rng), f"{text}+{variant}", rng)
        sink.send((clip, f"voice: {variant}"))
    sink.close()


def _speech(cache: Path, seed: int) -> Iterator[Item]:
    """Every word and language in a process of its own: after thousands of clips the synthesiser can break down."""
    forking = get_context("fork")
    groups = [(f"word: {word}", CLIPS_PER_WORD) for word in WORDS]
    groups += [(f"language: {language}", CLIPS_PER_LANGUAGE) for language in LANGUAGES]
    for number, (label, count) in enumerate(groups):
        receiver, sender = forking.Pipe(duplex=False)
        speaker = forking.Process(target=_say, args=(cache, label, count, [seed, 3, number], sender))
        speaker.start()
        sender.close()
        for _ in range(count):
            clip, maker = receiver.recv()
            yield clip, label, maker
        speaker.join()


def _instruments(cache: Path, rng: Generator) -> Iterator[Item]:
    font = open_soundfont(cache)
    held_out = {note.start for name in HELD_OUT_INSTRUMENTS for note in font.notes[name]}
    for name in INSTRUMENTS:
        notes = font.notes[name]
        if any(note.start in held_out for note in notes):
            raise RuntimeError(f"{name} shares a recording with an instrument that is held out")
        for number in range(CLIPS_PER_INSTRUMENT):
            wave = font.play(notes[number % len(notes)], rng.uniform(-3, 3), rng)
            yield np.roll(wave, int(rng.integers(0, 3000))), f"instrument: {name.lower()}", None


def _samples(cache: Path, rng: Generator) -> Iterator[Item]:
    for path in _recordings(cache):
        recorded = decode_audio(path.read_bytes(), path.name)
        for _ in range(CLIPS_PER_SAMPLE):
            faster = 200 * round(recorded.rate * 2 ** rng.uniform(-0.25, 0.25) / 200)
            wave = type(recorded)(recorded.samples, faster).at(RATE).samples.astype(np.float64)
            start = int(rng.integers(0, max(1, len(wave) - LENGTH + 1)))
            wave = wave[start : start + LENGTH]
            before = int(rng.integers(0, min(4000, LENGTH - len(wave)) + 1))
            clip = np.pad(wave, (before, LENGTH - len(wave) - before))
            yield clip, f"sample: {path.stem.split('_')[0]}", f"recording: {path.stem}"


def _events(rng: Generator) -> Iterator[Item]:
    for name, make in EVENTS.items():
        if name not in HELD_OUT_EVENTS:
            for _ in range(CLIPS_PER_EVENT):
                yield make(rng), f"event: {name}", None


def _collect(cache: Path, seed: int) -> Iterator[Item]:
    streams = [np.random.default_rng([seed, number]) for number in range(3)]
    yield from _speech(cache, seed)
    yield from _events(streams[0])
    yield from _instruments(cache, streams[1])
    yield from _samples(cache, streams[2])


def _last_sound(sounds: Tensor) -> Tensor:
    """The frame after the last one that is within 40 dB of the loudest."""
    level = sounds.exp().sum(-1).log()
    loud = level > level.amax(1, keepdim=True) - 9.2
    return (loud * torch.arange(1, sounds.shape[1] + 1)).amax(1)


class Compressor:
    """The teacher's main directions, their spread flattened a little, scaled to unit length."""

    def __init__(self, sample: Tensor) -> None:
        rows = sample.reshape(-1, WIDTH)
        self.mean = rows.mean(0)
        centred = rows - self.mean
        spread, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        spread, directions = spread[-TEACHER_DIMENSIONS:], directions[:, -TEACHER_DIMENSIONS:]
        # Dividing by the square root of the standard deviation lets the finer distinctions count.
        self.map = directions / spread.clamp_min(1e-6) ** 0.25

    def __call__(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) @ self.map, dim=-1)


def build_pool(cache: Path, seed: int) -> Pool:
    """Make every sound and play it to the teacher."""
    labels = {name: index for index, name in enumerate(label_names(cache))}
    identities = {name: index for index, name in enumerate(identity_names(cache))}
    rng = np.random.default_rng([seed, 99])
    waves: list[np.ndarray] = []
    label: list[int] = []
    identity: list[int] = []
    for wave, name, maker in _collect(cache, seed):
        waves.append((set_level(wave, rng) * 32767).astype(np.int16))
        label.append(labels[name])
        identity.append(NO_LABEL if maker is None else identities[maker])
    print(f"{len(waves)} sounds made", flush=True)
    stored = torch.from_numpy(np.stack(waves))

    teacher = Teacher(cache)

    def listen(chunk: Tensor) -> Tensor:
        heard = teacher.features(chunk.float() / 32768)[:, : FRAMES // 2]
        return heard.unflatten(1, (FRAMES // SLOT, SLOT // 2)).mean(2)

    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))
    compress = Compressor(torch.cat([listen(chunk) for chunk in stored[order[:1500]].split(50)]))
    views, sounds = [], []
    for chunk in stored.split(50):
        views.append(compress(listen(chunk)).half())
        sounds.append(log_mel(chunk.float() / 32768).half())
    every = torch.cat(sounds)
    end = torch.cat([_last_sound(chunk.float()) for chunk in every.split(500)])
    return Pool(every, torch.tensor(label), torch.tensor(identity), end, torch.cat(views))


def load_pool(cache: Path, seed: int) -> Pool:
    """The pool from the cache, or a newly built one."""
    path = cache / f"pool-{seed}.pt"
    if not path.exists():
        pool = build_pool(cache, seed)
        partial = path.with_suffix(".partial")
        torch.save({field.name: getattr(pool, field.name) for field in fields(pool)}, partial)
        os.replace(partial, path)
    return Pool(**torch.load(path, weights_only=True))


def statistics(pool: Pool) -> tuple[float, float]:
    """Mean and standard deviation of all log-mel powers of the pool."""
    rows = pool.sounds[:: max(1, len(pool.sounds) // 2000)].float()
    return round(rows.mean().item(), 3), round(rows.std().item(), 3)


def _mask(x: Tensor, dim: int, most: int, filler: Tensor, random: torch.Generator) -> Tensor:
    """Replace one stretch of up to ``most`` rows (dim 1) or bins (dim 2) in each sound."""
    count, size = len(x), x.shape[dim]
    width = torch.rand(count, 1, generator=random) * most
    start = torch.rand(count, 1, generator=random) * (size - width)
    position = torch.arange(size)[None]
    hidden = (position >= start) & (position < start + width)
    hidden = hidden[:, :, None] if dim == 1 else hidden[:, None, :]
    return torch.where(hidden, filler, x)


def augment(sounds: Tensor, others: Tensor, end: Tensor, random: torch.Generator) -> Tensor:
    """Vary log-mel powers ``n t 128``: background, colour, level, pitch, noise floor, masks, padding."""
    count, frames, bins = sounds.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    # Another sound in the background, 3 to 30 dB below in total power, for half of them.
    loudness = [x.exp().sum((1, 2), keepdim=True).log() for x in (sounds, others)]
    below = uniform(-6.9, -0.7, 1, 1) + torch.where(uniform(0, 1, 1, 1) < 0.5, 0.0, -30.0)
    x = torch.logaddexp(sounds, others + loudness[0] - loudness[1] + below)
    # A smooth curve over the bins, as microphones and rooms make it, and the level, 9 dB up or down.
    curve = F.interpolate(torch.randn(count, 1, 6, generator=random), bins, mode="linear", align_corners=True)
    x = x + 0.7 * uniform(0, 1, 1, 1) * curve + uniform(-2, 2, 1, 1)
    shift = torch.randint(-3, 4, (count, 1), generator=random)
    chosen = (torch.arange(bins)[None] + shift).clamp(0, bins - 1)
    x = x.gather(2, chosen[:, None, :].expand(-1, frames, -1))
    # Every recording has a noise floor of its own.
    x = torch.logaddexp(x, uniform(float(np.log(FLOOR)) - 2, -8, 1, 1))
    average = x.mean((1, 2), keepdim=True)
    x = _mask(_mask(x, 1, 24, average, random), 2, 20, average, random)
    # The feature extractor fills what is missing of short sounds with zeros, which are loud: learn to ignore them.
    last = end[:, None] + uniform(0, 20, 1)
    padded = (uniform(0, 1, 1) < 0.3) & (torch.arange(frames)[None] >= last)
    return torch.where(padded[:, :, None], 0.0, x)


@dataclass
class Batch:
    """One training step's worth."""

    inputs: Tensor  # (n, CLIP_FRAMES, BINS), normalised for the model
    label: Tensor
    identity: Tensor
    teacher: Tensor  # (n, CLIP_FRAMES / PATCH, TEACHER_DIMENSIONS): one target for each column of patches


def draw_batch(pool: Pool, step: int, seed: int, count: int, normal: tuple[float, float]) -> Batch:
    """Cropped and augmented sounds of one training step."""
    random = torch.Generator().manual_seed(1_000_003 * seed + step)
    rows, backs = torch.randint(len(pool.label), (2, count), generator=random)
    offsets = SLOT * torch.randint((FRAMES - CLIP_FRAMES) // SLOT + 1, (count,), generator=random)
    window = offsets[:, None] + torch.arange(CLIP_FRAMES)
    sounds = pool.sounds[rows[:, None], window].float()
    inputs = augment(sounds, pool.sounds[backs, :CLIP_FRAMES].float(), pool.end[rows] - offsets, random)
    slots = offsets[:, None] // SLOT + torch.arange(CLIP_FRAMES // SLOT)
    targets = pool.teacher[rows[:, None], slots].float().unflatten(1, (-1, PATCH // SLOT)).mean(2)
    mean, spread = normal
    assert inputs.shape[2] == BINS
    return Batch((inputs - mean) / (2 * spread), pool.label[rows], pool.identity[rows], targets)
