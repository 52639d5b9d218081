"""``epitaxy doctor``: is this environment fit to work in?"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from epitaxy.cli import arguments

NEEDED = {"torch": "2.6", "transformers": "5.0", "accelerate": "1.10", "safetensors": "0.5", "numpy": "1.26"}
OPTIONAL = {"diffusers": "0.36", "peft": "0.20", "datasets": "3", "soundfile": "0.12", "soxr": "0.5", "timm": "0"}
BELOW = {"transformers": "6", "diffusers": "1"}
FREE = 2 * 1000**3  # bytes


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``bad`` breaks something needed, ``warn`` something that may be wanted."""

    state: Literal["ok", "warn", "bad"]
    what: str
    found: str


def command(json: arguments.Json = False) -> None:
    """Check that this environment is fit to work in.

    Versions, known traps, device, disk space, shipped files and other packages' methods.  The exit code is 1 when
    something that epitaxy needs is broken.
    """
    from epitaxy.cli.console import say, say_json, table

    findings = list(examine())
    if json:
        say_json([asdict(finding) for finding in findings])
    else:
        table(["", "checked", "found"], [[finding.state, finding.what, finding.found] for finding in findings])
        worst = [finding for finding in findings if finding.state == "bad"]
        say(f"{len(worst)} of {len(findings)} checks found something broken" if worst else "everything needed works")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Every check, in order; a check that fails itself is a finding too."""
    for check in (_python, _packages, _torchvision, _device, _disk, _bases, _data, _recipes, _methods):
        try:
            yield from check()
        except Exception as error:
            yield Finding("bad", check.__name__.lstrip("_"), _line(error))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok" if sys.version_info >= (3, 11) else "bad", "python >= 3.11", found)


def _packages() -> Iterator[Finding]:
    from epitaxy.train.environment import installed

    for wanted, state in ((NEEDED, "bad"), (OPTIONAL, "warn")):
        for name, least in wanted.items():
            found, limit = installed(name), BELOW.get(name)
            what = f"{name} >= {least}" + (f", < {limit}" if limit else "")
            if found is None:
                if state == "bad":
                    yield Finding("bad", what, "not installed")
                else:
                    yield Finding("ok", what, "not installed; only needed for what it does")
            elif _number(found) < _number(least) or (limit and _number(found) >= _number(limit)):
                yield Finding("bad" if state == "bad" else "warn", what, found)
            else:
                yield _import(name, what, found, needed=state == "bad")


def _import(name: str, what: str, found: str, needed: bool) -> Finding:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken package can raise anything at all
        return Finding("bad" if needed else "warn", what, f"{found}, but it does not import ({_line(error)})")
    return Finding("ok", what, found)


def _number(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def _torchvision() -> Iterator[Finding]:
    from epitaxy.train.environment import installed

    found = installed("torchvision")
    if found is None:
        yield Finding("ok", "torchvision", "not installed, and not needed")
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield Finding(
            "bad",
            "torchvision",
            f"{found} does not load beside torch {installed('torch')} ({_line(error)}), which breaks transformers' "
            "picture processors; remove it or install the build that fits",
        )
        return
    yield Finding("ok", "torchvision", f"{found}, loads")


def _device() -> Iterator[Finding]:
    import torch

    from epitaxy.train.environment import device_name

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding("ok", "device", f"{device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    else:
        yield Finding("ok", "device", f"{device_name()}, {torch.get_num_threads()} threads; no accelerator is in use")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("ok" if free > FREE else "warn", "disk space here", f"{free / 1e9:.1f} GB free")


def _bases() -> Iterator[Finding]:
    import torch

    from epitaxy.core.errors import EpitaxyError
    from epitaxy.models.opening import SHIPPED, open_classifier

    for name in SHIPPED:
        try:
            opened = open_classifier(name, ["one", "two"])
        except EpitaxyError as error:
            yield Finding("bad", name, str(error))
            continue
        count = sum(parameter.numel() for parameter in opened.model.parameters())
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in opened.model.parameters())
        found = f"opens, {count:,} parameters" + ("" if finite else ", some of them NaN or infinite")
        yield Finding("ok" if finite else "bad", name, found)


def _data() -> Iterator[Finding]:
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.data.shipped import PREFIX, shipped_archive, shipped_names

    for name in shipped_names():
        try:
            path = shipped_archive(name)
            yield Finding("ok", PREFIX + name, f"{path.stat().st_size:,} bytes, digest as shipped")
        except EpitaxyError as error:
            yield Finding("bad", PREFIX + name, str(error))


def _recipes() -> Iterator[Finding]:
    from epitaxy.core.errors import EpitaxyError
    from epitaxy.train.recipe_files import load_recipe, shipped_recipes

    known = shipped_recipes()
    broken = 0
    for name in known:
        try:
            load_recipe(name)
        except EpitaxyError as error:
            broken += 1
            yield Finding("bad", f"recipe {name}", str(error))
    yield Finding("ok" if known else "bad", "shipped recipes", f"{len(known) - broken} of {len(known)} are readable")


def _methods() -> Iterator[Finding]:
    from importlib.metadata import entry_points

    from epitaxy.core.registry import ENTRY_POINT, methods

    outside = list(entry_points(group=ENTRY_POINT))
    broken = 0
    for point in outside:
        try:
            point.load()
        except Exception as error:  # another package's code can raise anything at all
            broken += 1
            yield Finding("bad", f"method {point.name}", f"{point.value} does not import ({_line(error)})")
    if not broken:
        known = methods()
        yield Finding("ok", "methods", f"{len(known)} known, {len(outside)} announced by other packages")
