"""The papers' sound data sets, read in the layout their authors publish them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from epitaxy.data.audio_sets.esc50 import read_esc50
from epitaxy.data.audio_sets.fluent_speech_commands import read_fluent_speech_commands
from epitaxy.data.audio_sets.iemocap import read_iemocap
from epitaxy.data.audio_sets.speech_commands import read_speech_commands
from epitaxy.data.audio_sets.urbansound8k import read_urbansound8k
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

READERS: Mapping[str, Callable[[Tree, DataSpec], Pool]] = {
    "esc50": read_esc50,
    "urbansound8k": read_urbansound8k,
    "speech_commands": read_speech_commands,
    "fluent_speech_commands": read_fluent_speech_commands,
    "iemocap": read_iemocap,
}

__all__ = ["READERS"]
