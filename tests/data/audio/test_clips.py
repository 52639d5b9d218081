"""Which stretches of a long clip are taken, how a short one is filled up, and masks of training examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epitaxy.core.errors import EpitaxyError
from epitaxy.data.audio.augment import mask
from epitaxy.data.audio.clips import fit, starts
from epitaxy.data.audio.filterbank import SILENCE
from epitaxy.data.audio.spec import AudioSpec, Augment
from epitaxy.data.audio.statistics import measure
from epitaxy.data.chance import chance


def test_stretches_of_long_clips() -> None:
    assert starts(300, 100, "cut", 4, None) == [0]
    assert starts(300, 100, "center", 4, None) == [100]
    assert starts(300, 100, "random", 4, None) == [100]  # evaluation knows no chance
    assert starts(1000, 100, "windows", 4, None) == [0, 300, 600, 900]
    assert starts(250, 100, "windows", 4, None) == [0, 75, 150]  # no more than cover the clip
    for long in ("cut", "center", "random", "windows"):
        assert starts(100, 100, long, 4, None) == starts(7, 100, long, 4, chance((0, 0, 0))) == [0]  # type: ignore[arg-type]


@pytest.mark.parametrize("long", ["random", "windows"])
def test_training_takes_one_random_stretch_and_reaches_both_ends(long: str) -> None:
    taken = [starts(13, 10, long, 4, chance((1, 0, row))) for row in range(200)]  # type: ignore[arg-type]
    assert {tuple(found) for found in taken} == {(0,), (1,), (2,), (3,)}


def test_short_clips_are_filled_up() -> None:
    clip = torch.arange(6.0).view(3, 2)
    for short, level in (("pad", 0.0), ("silence", SILENCE), ("mean", -4.5)):
        found = fit(clip, 5, short, -4.5)  # type: ignore[arg-type]
        assert torch.equal(found[:3], clip)
        assert (found[3:] == torch.tensor(level)).all()
    assert torch.equal(fit(clip, 8, "repeat", 0.0), torch.cat([clip, clip, clip[:2]]))
    assert torch.equal(fit(clip, 2, "pad", 0.0), clip[:2])


def test_masks_stay_below_their_bounds_and_are_as_frequent() -> None:
    ones, widths = torch.ones(50, 20), []
    for row in range(600):
        masked = mask(ones, Augment(frequency=6, time=11), chance((3, 0, row)))
        bins, frames = (masked == 0).all(0), (masked == 0).all(1)
        assert torch.equal(masked == 0, bins[None, :] | frames[:, None])  # two stretches and nothing else
        for hidden in (bins, frames):
            places = hidden.nonzero().flatten()
            assert len(places) == 0 or int(places[-1] - places[0]) + 1 == len(places)
        widths.append((int(bins.sum()), int(frames.sum())))
    assert {width for width, _ in widths} == set(range(6))
    assert {width for _, width in widths} == set(range(11))
    assert np.mean([width for width, _ in widths]) == pytest.approx(2.5, abs=0.25)
    assert torch.equal(ones, torch.ones(50, 20))


def test_masks_wider_than_the_input_and_none_at_all() -> None:
    ones = torch.ones(4, 3)
    hidden = [int((mask(ones, Augment(time=500), chance((row,))) == 0).all(1).sum()) for row in range(100)]
    assert set(hidden) == {0, 1, 2, 3, 4}
    assert torch.equal(mask(ones, Augment(), chance((0,))), ones)


def test_a_draw_alone_decides() -> None:
    noise, augment = torch.randn(60, 30), Augment(10, 20)
    first = mask(noise, augment, chance((5, 2, 17)))
    assert torch.equal(first, mask(noise, augment, chance((5, 2, 17))))
    others = [mask(noise, augment, chance(draw)) for draw in ((5, 2, 18), (5, 3, 17), (6, 2, 17))]
    assert sum(torch.equal(first, other) for other in others) == 0


def test_statistics_are_those_of_all_values_together() -> None:
    torch.manual_seed(0)
    clips = [torch.randn(length, 4) * scale + 1e4 for length, scale in ((3, 0.1), (500, 2.0), (1, 1.0), (80, 0.5))]
    together = torch.cat(clips).double()
    mean, std = measure(iter(clips))
    assert mean == pytest.approx(float(together.mean()), rel=1e-12)
    assert std == pytest.approx(float(together.std()), rel=1e-9)
    for nothing in ([], [torch.full((5, 2), -3.0)]):
        with pytest.raises(EpitaxyError, match="no variance"):
            measure(nothing)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short": "loop"}, "data.audio.short is one of pad, silence, mean, repeat, got 'loop'"),
        ({"long": "windos"}, "got 'windos'; did you mean 'windows'"),
        ({"statistics": "esc-50"}, r"or \[mean, std\], got 'esc-50'; did you mean 'esc50'"),
        ({"statistics": (1.0, 0.0)}, "std above 0"),
        ({"frames": 0}, "data.audio.frames must be at least 1, got 0"),
        ({"cache_gigabytes": 0}, "data.audio.cache_gigabytes must be above 0"),
        ({"legacy": "zero"}, "data.audio.legacy is one of zeroed, got 'zero'"),
    ],
)
def test_settings_without_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(EpitaxyError, match=message):
        AudioSpec(**values)  # type: ignore[arg-type]
    with pytest.raises(EpitaxyError, match=r"augment\.time must not be negative, got -1"):
        Augment(time=-1)


def test_stored_settings_come_back() -> None:
    spec = AudioSpec(frames=500, statistics=(-6.6, 5.4), long="windows", augment=Augment(24, 80), cache="x")
    stored = spec.stored()
    again = AudioSpec.from_stored(stored, "a")
    assert again == AudioSpec(frames=500, statistics=(-6.6, 5.4), long="windows")
    with pytest.raises(EpitaxyError, match=r"^a: its front end has the unknown setting 'frame'; did you mean 'frames'"):
        AudioSpec.from_stored({"frame": 3}, "a")
    with pytest.raises(EpitaxyError, match=r"^a: its front end cannot be read"):
        AudioSpec.from_stored({"frames": "many"}, "a")
