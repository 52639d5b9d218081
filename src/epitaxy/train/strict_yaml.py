"""YAML as people expect it: ``3e-4`` is a number, ``no`` and dates are words, a key given twice is an error."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from epitaxy.core.errors import EpitaxyError

_BOOL, _INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2's core schema; PyYAML follows 1.1."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _FLOAT, _TIME)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Resolvers are asked in this order: what is no whole number may still be a floating-point one.
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # 010 is ten; in YAML 1.1 it would be eight


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(_INT, _whole)


def read(file: Path) -> Any:
    """The value of a YAML file; raises ``EpitaxyError`` naming the file and the line of a mistake."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EpitaxyError(f"{file}: not a text file in UTF-8") from None
    return parse(text, str(file))


def parse(text: str, source: str) -> Any:
    """The value of a YAML document; raises ``EpitaxyError`` naming ``source`` and the line of a mistake."""
    return deepcopy(_parsed(text, source))


@lru_cache(maxsize=64)
def _parsed(text: str, source: str) -> Any:
    """A document is parsed once: a grid composes hundreds of recipes out of a few files."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise EpitaxyError(f"{source}{line}: not readable as YAML: {problem}") from None
