"""Sounds made from formulas: about fifty kinds, from plain tones to rain, engines and struck objects.

Every function takes a random generator and returns one clip of ``LENGTH`` samples at ``RATE`` Hz, level not yet set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

RATE = 16_000
FRAMES = 144  # 1.45 s of sound, a little more than the model takes, so that it can be cropped
LENGTH = 400 + (FRAMES - 1) * 160

Wave = NDArray[np.float64]
TIME: Wave = np.arange(LENGTH) / RATE


def _log(rng: Generator, low: float, high: float) -> float:
    """A value whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _phase(frequency: float | Wave) -> Wave:
    """Angle of an oscillator whose frequency in Hz may change."""
    return 2 * np.pi * np.cumsum(np.broadcast_to(frequency, LENGTH)) / RATE


def _noise(rng: Generator, low: float = 0, high: float = RATE / 2, slope: float = 0.0) -> Wave:
    """Noise between two frequencies with soft edges, falling with ``slope`` (1: pink, 2: brown) in power."""
    frequency = np.fft.rfftfreq(LENGTH, 1 / RATE)
    shape = np.maximum(frequency, 20.0) ** (-slope / 2)
    shape = shape / (1 + (low / np.maximum(frequency, 1)) ** 8) / (1 + (frequency / high) ** 8)
    spectrum = np.fft.rfft(rng.standard_normal(LENGTH)) * shape
    wave = np.fft.irfft(spectrum, LENGTH)
    return wave / (wave.std() + 1e-9)


def _slow(rng: Generator, rate: float, floor: float = 0.0) -> Wave:
    """A random envelope between ``floor`` and 1 that changes ``rate`` times a second."""
    points = rng.uniform(floor, 1, max(3, int(rate * LENGTH / RATE) + 2))
    return np.interp(TIME, np.linspace(0, TIME[-1], len(points)), points)


def _strike(frequencies: Wave, decays: Wave, amplitudes: Wave, rng: Generator) -> Wave:
    """Decaying partials of something struck at time zero."""
    phases = rng.uniform(0, 2 * np.pi, len(frequencies))
    partials = np.exp(-TIME[:, None] / decays) * np.sin(2 * np.pi * TIME[:, None] * frequencies + phases)
    return partials @ amplitudes


def _place(grains: list[tuple[float, Wave]]) -> Wave:
    """Add grains, each starting at its time in seconds."""
    wave = np.zeros(LENGTH)
    for start, grain in grains:
        at = int(start * RATE)
        if 0 <= at < LENGTH:
            part = grain[: LENGTH - at]
            wave[at : at + len(part)] += part
    return wave


def _regular(rng: Generator, rate: float, jitter: float) -> list[float]:
    """Start times of a beat."""
    first = rng.uniform(0, 1 / rate)
    return [max(0.0, t + rng.normal(0, jitter / rate)) for t in np.arange(first, TIME[-1], 1 / rate)]


def _burst(rng: Generator, seconds: float, low: float, high: float) -> Wave:
    count = max(16, int(5 * seconds * RATE))
    return (_noise(rng, low, high) * np.exp(-TIME / seconds))[:count]


def _harmonics(frequency: float | Wave, weights: Wave) -> Wave:
    phase = _phase(frequency)
    return sum((w * np.sin((k + 1) * phase) for k, w in enumerate(weights)), np.zeros(LENGTH))


def _delayed(wave: Wave, rng: Generator, most: float = 0.5) -> Wave:
    """Start later, with silence before."""
    return _place([(rng.uniform(0, most), wave)])


def _chirp(rng: Generator, start: float, end: float) -> Wave:
    seconds = rng.uniform(0.3, 1.2)
    path = start * (end / start) ** np.clip(TIME / seconds, 0, 1)
    return _delayed(np.sin(_phase(path)) * (seconds > TIME), rng, 0.3)


def sine(rng: Generator) -> Wave:
    return np.sin(_phase(_log(rng, 100, 6000)))


def square(rng: Generator) -> Wave:
    frequency = _log(rng, 60, 1500)
    return _harmonics(frequency, np.array([(k % 2) / k for k in range(1, min(60, int(7900 / frequency) + 1) + 1)]))


def sawtooth(rng: Generator) -> Wave:
    frequency = _log(rng, 60, 1500)
    return _harmonics(frequency, np.array([1 / k for k in range(1, min(60, int(7900 / frequency) + 1) + 1)]))


def chord(rng: Generator) -> Wave:
    root = _log(rng, 110, 700)
    steps = np.array([0, rng.choice([3, 4, 5]), 7, rng.choice([10, 11, 12])])
    weights = np.array([1, 0.5, 0.25, 0.12])
    return sum((_harmonics(root * 2 ** (s / 12), weights) for s in steps), np.zeros(LENGTH))


def vibrato(rng: Generator) -> Wave:
    depth, rate = rng.uniform(0.01, 0.06), rng.uniform(4, 9)
    path = _log(rng, 200, 3000) * (1 + depth * np.sin(2 * np.pi * rate * TIME))
    return _harmonics(path, np.array([1, rng.uniform(0, 0.5), rng.uniform(0, 0.3)]))


def tremolo(rng: Generator) -> Wave:
    return sine(rng) * (1 + np.sin(2 * np.pi * rng.uniform(4, 14) * TIME))


def trill(rng: Generator) -> Wave:
    low, high = _log(rng, 300, 2500), rng.uniform(1.1, 1.5)
    return np.sin(_phase(np.where(np.sin(2 * np.pi * rng.uniform(5, 14) * TIME) > 0, low, low * high)))


def rising_chirp(rng: Generator) -> Wave:
    start = _log(rng, 100, 1500)
    return _chirp(rng, start, start * rng.uniform(2, 5))


def falling_chirp(rng: Generator) -> Wave:
    start = _log(rng, 600, 6000)
    return _chirp(rng, start, start / rng.uniform(2, 6))


def siren(rng: Generator) -> Wave:
    centre, rate = _log(rng, 500, 1500), rng.uniform(0.8, 3)
    path = centre * (1 + rng.uniform(0.2, 0.5) * np.sin(2 * np.pi * rate * TIME + rng.uniform(0, 6)))
    return _harmonics(path, np.array([1, 0.4, 0.3, 0.1]))


def bird_song(rng: Generator) -> Wave:
    grains = []
    centre = _log(rng, 2000, 5500)
    for start in _regular(rng, rng.uniform(3, 9), 0.2):
        seconds = rng.uniform(0.04, 0.14)
        count = int(seconds * RATE)
        x = np.linspace(0, 1, count)
        path = centre * (1 + rng.uniform(-0.3, 0.3) * x + rng.uniform(0, 0.15) * np.sin(2 * np.pi * 3 * x))
        grains.append((start, np.sin(2 * np.pi * np.cumsum(path) / RATE) * np.sin(np.pi * x)))
    return _place(grains)


def cricket(rng: Generator) -> Wave:
    frequency, pulse = _log(rng, 3500, 7000), rng.uniform(25, 60)
    gate = (np.sin(2 * np.pi * rng.uniform(2, 5) * TIME + rng.uniform(0, 6)) > rng.uniform(-0.3, 0.4)).astype(float)
    return np.sin(_phase(frequency)) * np.maximum(0, np.sin(2 * np.pi * pulse * TIME)) * gate


def frog(rng: Generator) -> Wave:
    grains = []
    pulse, centre = rng.uniform(20, 45), _log(rng, 400, 1400)
    for start in _regular(rng, rng.uniform(1.2, 3), 0.1):
        count = int(rng.uniform(0.15, 0.35) * RATE)
        t = np.arange(count) / RATE
        tone = np.sin(2 * np.pi * centre * t) + 0.6 * np.sin(2 * np.pi * 2 * centre * t)
        grains.append((start, tone * np.maximum(0, np.sin(2 * np.pi * pulse * t)) ** 2 * np.hanning(count)))
    return _place(grains)


def insect_buzz(rng: Generator) -> Wave:
    path = _log(rng, 120, 500) * (1 + 0.12 * (_slow(rng, 6) - 0.5))
    return _harmonics(path, 0.8 ** np.arange(14) * rng.uniform(0.3, 1, 14)) * _slow(rng, 4, 0.3)


def alarm(rng: Generator) -> Wave:
    gate = (np.sin(2 * np.pi * rng.uniform(2, 8) * TIME) > rng.uniform(-0.4, 0.4)).astype(float)
    return _harmonics(_log(rng, 700, 3000), np.array([1, 0, 0.3])) * gate


def dial_tone(rng: Generator) -> Wave:
    low, high = rng.choice([697.0, 770.0, 852.0, 941.0]), rng.choice([1209.0, 1336.0, 1477.0, 1633.0])
    return np.sin(_phase(low)) + np.sin(_phase(high))


def telephone_ring(rng: Generator) -> Wave:
    low = _log(rng, 400, 1200)
    ring = np.sin(_phase(low)) + np.sin(_phase(low * rng.uniform(1.15, 1.4)))
    gate = (rng.uniform(0.4, 1.2) > (TIME + rng.uniform(0, 1)) % 1.5).astype(float)
    return ring * np.maximum(0, np.sin(2 * np.pi * rng.uniform(15, 28) * TIME)) * gate


def white_noise(rng: Generator) -> Wave:
    return _noise(rng)


def pink_noise(rng: Generator) -> Wave:
    return _noise(rng, slope=1.0)


def brown_noise(rng: Generator) -> Wave:
    return _noise(rng, slope=2.0)


def band_noise(rng: Generator) -> Wave:
    low = _log(rng, 150, 4000)
    return _noise(rng, low, low * rng.uniform(1.2, 1.8))


def swept_noise(rng: Generator) -> Wave:
    """A narrow band of noise that moves: noise on a gliding carrier."""
    start, end = _log(rng, 300, 6000), _log(rng, 300, 6000)
    path = start * (end / start) ** (TIME / TIME[-1])
    return _noise(rng, 0, rng.uniform(40, 250)) * np.sin(_phase(path))


def wind(rng: Generator) -> Wave:
    whistle = _noise(rng, 0, 40) * np.sin(_phase(300 + 900 * _slow(rng, 2)))
    return (_noise(rng, 60, rng.uniform(300, 900), 1.0) + rng.uniform(0.1, 0.8) * whistle) * _slow(rng, 3, 0.2)


def surf(rng: Generator) -> Wave:
    swell = 0.15 + np.sin(np.pi * ((TIME + rng.uniform(0, 3)) / rng.uniform(1.6, 3.5) % 1)) ** 2
    return _noise(rng, 50, rng.uniform(2000, 7000), 0.8) * swell


def rain(rng: Generator) -> Wave:
    drops = np.zeros(LENGTH)
    count = int(rng.uniform(150, 900))
    drops[rng.integers(0, LENGTH, count)] = rng.exponential(1, count)
    tail = np.exp(-np.arange(200) / rng.uniform(5, 40)) * rng.standard_normal(200)
    return np.convolve(drops, tail)[:LENGTH] + rng.uniform(0.05, 0.4) * _noise(rng, 1000, 7500)


def fire(rng: Generator) -> Wave:
    crackles = [
        (rng.uniform(0, 1.4), rng.exponential(1) * _burst(rng, rng.uniform(0.001, 0.01), 500, 7500))
        for _ in range(int(rng.uniform(8, 40)))
    ]
    return _place(crackles) + rng.uniform(0.05, 0.25) * _noise(rng, 40, 500, 1.0) * _slow(rng, 8, 0.3)


def clicks(rng: Generator) -> Wave:
    wave = np.zeros(LENGTH)
    wave[rng.integers(0, LENGTH, int(rng.uniform(5, 60)))] = 1.0
    return np.convolve(wave, rng.standard_normal(12) * np.exp(-np.arange(12) / 4))[:LENGTH]


def dripping(rng: Generator) -> Wave:
    grains = []
    for start in _regular(rng, rng.uniform(1.5, 5), 0.25):
        frequency, decay = _log(rng, 700, 3000), rng.uniform(0.01, 0.05)
        t = np.arange(int(6 * decay * RATE)) / RATE
        grains.append((start, np.sin(2 * np.pi * frequency * t * (1 + 2 * t)) * np.exp(-t / decay)))
    return _place(grains)


def footsteps(rng: Generator) -> Wave:
    low, crunch = rng.uniform(60, 200), rng.uniform(0.1, 1)
    grains = []
    for start in _regular(rng, rng.uniform(1.5, 3.2), 0.05):
        grains.append((start, _burst(rng, rng.uniform(0.02, 0.05), low, 3 * low)))
        grains.append((start + 0.03, crunch * _burst(rng, rng.uniform(0.03, 0.08), 1500, 6000)))
    return _place(grains)


def knocking(rng: Generator) -> Wave:
    ratios = np.array([1, 2.1, 3.4, 4.9])
    frequency, decay = _log(rng, 150, 600), rng.uniform(0.01, 0.04)
    knock = _strike(frequency * ratios, decay / ratios**0.5, np.array([1, 0.7, 0.4, 0.3]), rng)[:4000]
    return _place([(start, knock * rng.uniform(0.6, 1)) for start in _regular(rng, rng.uniform(3, 7), 0.05)])


def bell(rng: Generator) -> Wave:
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.51, 3.01, 4.1]) * rng.uniform(0.99, 1.01, 8)
    decays = rng.uniform(0.4, 1.5) / ratios**0.7
    return _delayed(_strike(_log(rng, 200, 900) * ratios, decays, rng.uniform(0.2, 1, 8), rng), rng)


def glass(rng: Generator) -> Wave:
    ratios = np.array([1, 2.32, 4.25, 6.63]) * rng.uniform(0.97, 1.03, 4)
    frequency = _log(rng, 900, 2500)
    keep = frequency * ratios < 7800
    wave = _strike(frequency * ratios[keep], rng.uniform(0.1, 0.5) / ratios[keep], np.ones(int(keep.sum())), rng)
    return _delayed(wave, rng)


def metal_plate(rng: Generator) -> Wave:
    frequencies = np.sort(_log(rng, 120, 400) * (1 + rng.exponential(3, 24)))
    frequencies = frequencies[frequencies < 7800]
    return _delayed(
        _strike(frequencies, rng.uniform(0.1, 0.7, len(frequencies)), rng.uniform(0, 1, len(frequencies)), rng), rng
    )


def drum(rng: Generator) -> Wave:
    path = _log(rng, 50, 200) * (1 + rng.uniform(0.3, 1.5) * np.exp(-TIME / 0.03))
    body = np.sin(_phase(path)) * np.exp(-TIME / rng.uniform(0.06, 0.3))
    return _delayed(body + rng.uniform(0, 0.5) * _noise(rng, 300, 5000) * np.exp(-TIME / 0.02), rng)


def plucked_string(rng: Generator) -> Wave:
    period = int(RATE / _log(rng, 80, 800))
    loss = rng.uniform(0.985, 0.999)
    cycles = [rng.uniform(-1, 1, period)]
    while len(cycles) * period < LENGTH:
        last = cycles[-1]
        cycles.append(loss * 0.5 * (last + np.roll(last, 1)))
    return _delayed(np.concatenate(cycles)[:LENGTH], rng)


def _engine(rng: Generator, path: Wave) -> Wave:
    firing = np.maximum(0, np.sin(_phase(path))) ** rng.uniform(3, 10)
    rough = firing * (1 + 0.4 * _noise(rng, 200, 3000)) * (1 + rng.uniform(0, 0.5) * np.sin(_phase(path / 4)))
    frequency = np.fft.rfftfreq(LENGTH, 1 / RATE)
    pipe = 1 / (1 + (frequency / rng.uniform(400, 1500)) ** 2) * (1 + 2 * np.exp(-((frequency / 300 - 1) ** 2) * 4))
    return np.fft.irfft(np.fft.rfft(rough - rough.mean()) * pipe, LENGTH)


def engine_idle(rng: Generator) -> Wave:
    return _engine(rng, rng.uniform(12, 35) * (1 + 0.04 * _slow(rng, 5)))


def engine_revving(rng: Generator) -> Wave:
    start = rng.uniform(25, 60)
    return _engine(rng, start * rng.uniform(2, 4) ** (TIME / TIME[-1]))


def helicopter(rng: Generator) -> Wave:
    chop = np.maximum(0, np.sin(2 * np.pi * rng.uniform(9, 22) * TIME)) ** rng.uniform(2, 6)
    return _noise(rng, 40, rng.uniform(600, 2500), 1.0) * (0.1 + chop) + 0.3 * np.sin(_phase(rng.uniform(60, 120)))


def sawing(rng: Generator) -> Wave:
    stroke = np.abs(np.sin(2 * np.pi * rng.uniform(1, 3) * TIME + rng.uniform(0, 3)))
    teeth = 1 + 0.8 * np.sin(_phase(200 + 250 * stroke))
    return _noise(rng, rng.uniform(500, 1500), 7000) * stroke**2 * teeth


def hiss(rng: Generator) -> Wave:
    onset = 1 - np.exp(-TIME / rng.uniform(0.02, 0.3))
    return _delayed(_noise(rng, rng.uniform(2500, 4500), 7900) * onset * np.exp(-TIME / rng.uniform(0.4, 3)), rng)


def explosion(rng: Generator) -> Wave:
    boom = _noise(rng, 20, rng.uniform(200, 700), 1.0) * np.exp(-TIME / rng.uniform(0.2, 0.7))
    return _delayed(boom + rng.uniform(0.2, 0.8) * _noise(rng, 500, 7000) * np.exp(-TIME / 0.08), rng, 0.4)


def radio_static(rng: Generator) -> Wave:
    gate = (rng.uniform(0, 1, 40) > rng.uniform(0.3, 0.7)).astype(float)
    return _noise(rng, 400, 4000) * gate[np.minimum(39, (TIME * 27).astype(int))]


def stream(rng: Generator) -> Wave:
    return _place([(rng.uniform(0, 1.45), _bubble(rng) * rng.exponential(1)) for _ in range(int(rng.uniform(40, 140)))])


def _bubble(rng: Generator) -> Wave:
    frequency, decay = _log(rng, 400, 2500), rng.uniform(0.008, 0.04)
    t = np.arange(int(5 * decay * RATE)) / RATE
    return np.sin(2 * np.pi * frequency * (t + rng.uniform(1, 8) * t**2)) * np.exp(-t / decay)


def bubbles(rng: Generator) -> Wave:
    return _place([(start, _bubble(rng)) for start in _regular(rng, rng.uniform(4, 12), 0.4)])


def laser(rng: Generator) -> Wave:
    start, decay = _log(rng, 2500, 7000), rng.uniform(0.04, 0.15)
    return _delayed(np.sin(_phase(200 + start * np.exp(-TIME / decay))) * np.exp(-TIME / (3 * decay)), rng)


def spring(rng: Generator) -> Wave:
    wobble = 1 + rng.uniform(0.2, 0.5) * np.sin(2 * np.pi * rng.uniform(8, 16) * TIME) * np.exp(-TIME / 0.4)
    path = _log(rng, 120, 400) * wobble
    return _delayed(_harmonics(path, 0.7 ** np.arange(8)) * np.exp(-TIME / rng.uniform(0.2, 0.6)), rng)


def clock(rng: Generator) -> Wave:
    tick, tock = (_burst(rng, rng.uniform(0.002, 0.006), f, 2 * f) for f in (rng.uniform(1500, 3500), 1200.0))
    times = _regular(rng, rng.uniform(3, 6), 0.0)
    return _place([(start, tick if k % 2 else tock) for k, start in enumerate(times)])


def typing(rng: Generator) -> Wave:
    return _place(
        [
            (start, rng.uniform(0.5, 1) * _burst(rng, rng.uniform(0.003, 0.012), rng.uniform(800, 2000), 6000))
            for start in _regular(rng, rng.uniform(6, 14), 0.35)
        ]
    )


def mains_hum(rng: Generator) -> Wave:
    wave = _harmonics(rng.choice([50.0, 60.0]), rng.uniform(0, 1, 12) * 0.85 ** np.arange(12))
    return wave + rng.uniform(0.01, 0.2) * _noise(rng)


def vowel(rng: Generator) -> Wave:
    """A pulse train through three resonances."""
    path = _log(rng, 80, 350) * (1 + 0.08 * (_slow(rng, 4) - 0.5))
    source = np.maximum(0, np.sin(_phase(path))) ** 8 + 0.01 * rng.standard_normal(LENGTH)
    frequency = np.fft.rfftfreq(LENGTH, 1 / RATE)
    formants = rng.uniform([250, 800, 2200], [850, 2200, 3200])
    shape = sum(1 / (1 + ((frequency - f) / (40 + 0.04 * f)) ** 2) for f in formants)
    return np.fft.irfft(np.fft.rfft(source - source.mean()) * shape, LENGTH)


def helium_voice(rng: Generator) -> Wave:
    """Two glides with a resonance: a nonsense syllable pair."""
    path = _log(rng, 250, 700) * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 3) * TIME))
    return _harmonics(path, rng.uniform(0, 1, 10)) * np.abs(np.sin(2 * np.pi * rng.uniform(1, 3) * TIME))


_ALL: tuple[Callable[[Generator], Wave], ...] = (
    sine, square, sawtooth, chord, vibrato, tremolo, trill, rising_chirp, falling_chirp, siren, bird_song, cricket,
    frog, insect_buzz, alarm, dial_tone, telephone_ring, white_noise, pink_noise, brown_noise, band_noise,
    swept_noise, wind, surf, rain, fire, clicks, dripping, footsteps, knocking, bell, glass, metal_plate, drum,
    plucked_string, engine_idle, engine_revving, helicopter, sawing, hiss, explosion, radio_static, stream, bubbles,
    laser, spring, clock, typing, mains_hum, vowel, helium_voice,
)  # fmt: skip
EVENTS = {function.__name__.replace("_", " "): function for function in _ALL}
# Never in the pretraining pool; a set of these is made for the evaluation.
HELD_OUT_EVENTS = (
    "bell", "bird song", "engine revving", "fire", "footsteps", "frog", "helicopter", "laser", "stream", "typing",
)  # fmt: skip
