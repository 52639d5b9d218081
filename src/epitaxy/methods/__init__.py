"""Adaptation methods, one file each: paper, module, config, placement.

``epitaxy.methods`` is this package and also the public call ``epitaxy.methods()``, so the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self) -> dict[str, type[Any]]:
        """Every known method by name."""
        from epitaxy.core.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Callable
