"""From examples to a model's input: our own log-mel features for spectrogram models, else the model's processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.data.audio import statistics
from epitaxy.data.audio.augment import mask
from epitaxy.data.audio.cache import FeatureCache
from epitaxy.data.audio.clips import fit, starts
from epitaxy.data.audio.filterbank import Filterbank
from epitaxy.data.audio.sound import Sound
from epitaxy.data.audio.spec import PUBLISHED, AudioSpec
from epitaxy.data.audio.waveform import Samples, Waveform, resampled_length
from epitaxy.data.chance import Draw, chance

WHOLE = 60.0  # seconds; of longer files only the stretches that are used are read, and nothing is cached
VERSION = 1  # of the features; another number makes cached ones void


class Example(Protocol):
    """A sound and how messages call it."""

    @property
    def value(self) -> Any: ...
    @property
    def name(self) -> str: ...


class LogMel:
    """Normalised log-mel features, ``(z - mean) / (2 std)``, of ``frames`` frames and ``mels`` bins.

    ``spec`` has every default resolved.  With default settings equal to transformers' AST feature extractor.
    """

    def __init__(self, spec: AudioSpec, rate: int) -> None:
        assert spec.frames is not None and spec.mels is not None and not isinstance(spec.statistics, str)  # noqa: PT018
        self.spec, self.frames, (self.mean, self.std) = spec, spec.frames, spec.statistics
        self.filterbank = Filterbank(spec.mels, rate, subtract_clip_mean=spec.subtract_clip_mean)
        self.cache = FeatureCache(spec.cache, round(spec.cache_gigabytes * 1e9)) if spec.cache else None

    def inputs(self, examples: Sequence[Example], draws: Sequence[Draw] | None = None) -> dict[str, Tensor]:
        """``input_values``, ``b frames mels``; with long: windows also ``windows``, how many rows each example has.

        ``draws`` marks training: it decides the random crop and the masks of each example.  Raises ``FormatError``
        naming the example that cannot be read.
        """
        rows, counts = [], []
        for number, example in enumerate(examples):
            source = None if draws is None else chance(draws[number])
            pieces = self._pieces(example, source)
            for piece in pieces:
                row = (fit(piece, self.frames, self.spec.short, self.mean) - self.mean) / (self.std * 2)
                rows.append(row if source is None else mask(row, self.spec.augment, source))
            counts.append(len(pieces))
        inputs = {"input_values": torch.stack(rows)}
        return {**inputs, "windows": torch.tensor(counts)} if self.spec.long == "windows" else inputs

    def features(self, sound: Waveform | Sound, name: str) -> Tensor:
        """All log-mel values of a sound, ``frames mels``, not normalised; from the cache where they are there."""
        if self.cache is None or not isinstance(sound, Sound):
            return self._computed(sound.at(self.filterbank.rate).samples, name)
        content, settings = sound.digest(), self._settings(sound)
        found = self.cache.find(content, settings)
        if found is None:
            found = self._computed(sound.at(self.filterbank.rate).samples, name)
            self.cache.keep(content, settings, found)
        return found

    def _pieces(self, example: Example, source: np.random.Generator | None) -> list[Tensor]:
        sound, spec, bank = example.value, self.spec, self.filterbank
        cached = self.cache.find(sound.digest(), self._settings(sound)) if self.cache and _stored(sound) else None
        if cached is None and _stored(sound) and sound.seconds > WHOLE:
            total = bank.frames(resampled_length(sound.count, sound.rate, bank.rate))
            wanted = bank.samples(self.frames)
            return [
                self._computed(sound.stretch(start * bank.hop, wanted, bank.rate), example.name)
                for start in starts(total, self.frames, spec.long, spec.windows, source)
            ]
        features = self.features(sound, example.name) if cached is None else cached
        chosen = starts(len(features), self.frames, spec.long, spec.windows, source)
        return [features[start : start + self.frames] for start in chosen]

    def _computed(self, samples: Samples, name: str) -> Tensor:
        _require_finite(samples, name)
        features, _ = self.filterbank([torch.from_numpy(samples)])
        return features[0]

    def _settings(self, sound: Sound) -> dict[str, Any]:
        return {**asdict(self.filterbank), "mono": sound.mono, "version": VERSION}


class Processed:
    """The model's own processor (Wav2Vec2, HuBERT, WavLM, Whisper) on clips of chosen length.

    With ``spec.frames`` a long clip is cut to so many frames of 10 ms by the same rules as spectrograms are, and a
    model without attention mask, or with features of its own, gets every clip filled up to that length, so that an
    example's input does not depend on the batch it is in.  Without ``frames`` clips stay as long as they are.
    """

    def __init__(self, spec: AudioSpec, processor: Any) -> None:
        self.spec, self.processor, self.rate = spec, processor, int(processor.sampling_rate)
        self.wanted = None if spec.frames is None else spec.frames * self.rate // 100

    def inputs(self, examples: Sequence[Example], draws: Sequence[Draw] | None = None) -> dict[str, Tensor]:
        """What the processor makes of ``examples``; ``draws`` and ``windows`` as for ``LogMel``."""
        pieces, counts = [], []
        for number, example in enumerate(examples):
            found = self._pieces(example, None if draws is None else chance(draws[number]))
            pieces += found
            counts.append(len(found))
        made = self.processor(pieces, sampling_rate=self.rate, return_tensors="pt", **self._padding())
        inputs = {key: value for key, value in made.items() if isinstance(value, Tensor)}
        return {**inputs, "windows": torch.tensor(counts)} if self._windows else inputs

    @property
    def _windows(self) -> bool:
        return self.spec.long == "windows" and self.wanted is not None

    def _pieces(self, example: Example, source: np.random.Generator | None) -> list[Samples]:
        sound, spec = example.value, self.spec
        if self.wanted is None:
            pieces = [sound.at(self.rate).samples]
        else:
            total = resampled_length(sound.count, sound.rate, self.rate)
            chosen = starts(total, self.wanted, spec.long, spec.windows, source)
            if _stored(sound):
                pieces = [sound.stretch(start, self.wanted, self.rate) for start in chosen]
            else:
                samples = sound.at(self.rate).samples
                pieces = [samples[start : start + self.wanted] for start in chosen]
        for samples in pieces:
            _require_finite(samples, example.name)
        return [self._filled(samples) for samples in pieces]

    def _filled(self, samples: Samples) -> Samples:
        """Repeated up to the wanted length if that is asked for, and at least one frame of 25 ms."""
        if self.wanted is not None and self.spec.short == "repeat":
            samples = np.resize(samples, self.wanted)
        missing = self.rate // 40 - len(samples)
        return np.pad(samples, (0, missing)) if missing > 0 else samples

    def _padding(self) -> dict[str, Any]:
        raw = self.processor.model_input_names[0] == "input_values"
        if self.wanted is None:
            return {"padding": True} if raw else {}  # spectrograms have a length of their own
        if raw and getattr(self.processor, "return_attention_mask", False):
            return {"padding": True}
        return {"padding": "max_length", "max_length": max(self.wanted, self.rate // 40), "truncation": True}


FrontEnd = LogMel | Processed


def build(spec: AudioSpec, processor: Any, training: Iterable[Example] = ()) -> FrontEnd:
    """The front end for the model that ``processor`` belongs to.

    ``training`` gives the sounds that statistics="train" are computed over.  The processor is set to the same size and
    statistics, so that saved with the model it goes on to make the same features.  Raises ``EpitaxyError`` for
    settings that the model's input does not have.
    """
    if not _is_log_mel(processor):
        _require_plain(spec, processor)
        return Processed(spec, processor)
    own = (float(processor.mean), float(processor.std)) if processor.do_normalize else (0.0, 0.5)
    spec = replace(spec, frames=spec.frames or int(processor.max_length), mels=spec.mels or int(processor.num_mel_bins))
    rate, wanted = int(processor.sampling_rate), spec.statistics
    if wanted == "train":
        raw = LogMel(replace(spec, statistics=own), rate)
        wanted = statistics.measure(_features(raw, training))
    elif wanted == "model":
        wanted = own
    elif isinstance(wanted, str):
        wanted = PUBLISHED[wanted]
    if wanted != own:
        processor.do_normalize, (processor.mean, processor.std) = True, wanted
    return LogMel(replace(spec, statistics=wanted), rate)


def _features(front_end: LogMel, training: Iterable[Example]) -> Iterator[Tensor]:
    for example in training:
        if example.value.seconds <= WHOLE or not _stored(example.value):
            yield front_end.features(example.value, example.name)
        else:
            yield from front_end._pieces(example, None)


def _is_log_mel(processor: Any) -> bool:
    """Whether it makes AST's features."""
    return all(hasattr(processor, name) for name in ("num_mel_bins", "max_length", "mean", "std", "do_normalize"))


def _require_plain(spec: AudioSpec, processor: Any) -> None:
    default = AudioSpec()
    for name in ("mels", "statistics", "subtract_clip_mean", "augment", "cache", "positions", "legacy"):
        if getattr(spec, name) != getattr(default, name):
            raise EpitaxyError(
                f"data.audio.{name} is for models that read log-mel spectrograms as AST does; "
                f"this model's input is made by {type(processor).__name__}"
            )
    if spec.short not in ("pad", "repeat"):
        raise EpitaxyError(f"data.audio.short: {type(processor).__name__} knows pad and repeat, got {spec.short!r}")


def _stored(sound: Any) -> bool:
    return isinstance(sound, Sound)


def _require_finite(samples: Samples, name: str) -> None:
    if not len(samples):
        raise FormatError(f"{name}: holds no sound")
    if not np.isfinite(samples).all():
        raise FormatError(f"{name}: holds NaN or infinite samples")
