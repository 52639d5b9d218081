"""Epitaxy: thin, trainable layers on frozen models.

The public calls.  They are imported on first use, so that ``import epitaxy`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from epitaxy.version import __version__

_PUBLIC = {
    "attach": "epitaxy.core.host",
    "detach": "epitaxy.core.host",
    "activate": "epitaxy.core.host",
    "adapters": "epitaxy.core.host",
    "route": "epitaxy.core.host",
    "merge": "epitaxy.core.merge",
    "fold": "epitaxy.core.fold",
    "unmerge": "epitaxy.core.merge",
    "save": "epitaxy.interop",
    "load": "epitaxy.interop",
    "inspect": "epitaxy.interop",
    "explain": "epitaxy.core.explain",
    "merge_parts": "epitaxy.methods.merge_parts",
    "methods": "epitaxy.core.registry",
    "method": "epitaxy.core.registry",
    "Adapter": "epitaxy.core.adapter",
    "Layout": "epitaxy.core.layouts",
    "Part": "epitaxy.core.layouts",
    "EpitaxyError": "epitaxy.core.errors",
    "BitFit": "epitaxy.methods.bitfit",
    "Bottleneck": "epitaxy.methods.bottleneck",
    "Conformer": "epitaxy.methods.conformer",
    "Convpass": "epitaxy.methods.convpass",
    "DenseMoA": "epitaxy.methods.dense_moa",
    "GridConv": "epitaxy.methods.grid_conv",
    "Head": "epitaxy.methods.head",
    "LoRA": "epitaxy.methods.lora",
    "MoSA": "epitaxy.methods.mosa",
    "MoSALoRA": "epitaxy.methods.mosa_lora",
    "NormTuning": "epitaxy.methods.norm_tuning",
    "Prefix": "epitaxy.methods.prefix",
    "Prompt": "epitaxy.methods.prompt",
    "SoftMoA": "epitaxy.methods.soft_moa",
    "TwoPass": "epitaxy.tasks.two_pass",
}

if TYPE_CHECKING:
    from epitaxy.core.adapter import Adapter as Adapter
    from epitaxy.core.errors import EpitaxyError as EpitaxyError
    from epitaxy.core.explain import explain as explain
    from epitaxy.core.fold import fold as fold
    from epitaxy.core.host import activate as activate
    from epitaxy.core.host import adapters as adapters
    from epitaxy.core.host import attach as attach
    from epitaxy.core.host import detach as detach
    from epitaxy.core.host import route as route
    from epitaxy.core.layouts import Layout as Layout
    from epitaxy.core.layouts import Part as Part
    from epitaxy.core.merge import merge as merge
    from epitaxy.core.merge import unmerge as unmerge
    from epitaxy.core.registry import method as method
    from epitaxy.core.registry import methods as methods
    from epitaxy.interop import inspect as inspect
    from epitaxy.interop import load as load
    from epitaxy.interop import save as save
    from epitaxy.methods.bitfit import BitFit as BitFit
    from epitaxy.methods.bottleneck import Bottleneck as Bottleneck
    from epitaxy.methods.conformer import Conformer as Conformer
    from epitaxy.methods.convpass import Convpass as Convpass
    from epitaxy.methods.dense_moa import DenseMoA as DenseMoA
    from epitaxy.methods.grid_conv import GridConv as GridConv
    from epitaxy.methods.head import Head as Head
    from epitaxy.methods.lora import LoRA as LoRA
    from epitaxy.methods.merge_parts import merge_parts as merge_parts
    from epitaxy.methods.mosa import MoSA as MoSA
    from epitaxy.methods.mosa_lora import MoSALoRA as MoSALoRA
    from epitaxy.methods.norm_tuning import NormTuning as NormTuning
    from epitaxy.methods.prefix import Prefix as Prefix
    from epitaxy.methods.prompt import Prompt as Prompt
    from epitaxy.methods.soft_moa import SoftMoA as SoftMoA
    from epitaxy.tasks.two_pass import TwoPass as TwoPass

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'epitaxy' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
