"""Where a run happened: versions, machine, device and the state of the git repository around it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("epitaxy", "torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "diffusers", "peft")


def describe_environment() -> dict[str, Any]:
    """Plain data for ``environment.json``; absent packages and repositories are left out."""
    import torch

    versions = {name: known for name in PACKAGES if (known := installed(name)) is not None}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device_name(),
        "packages": versions,
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
    }
    git = git_state()
    if git is not None:
        found["git"] = git
    return found


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """The accelerator that training will use, or the processor."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU ({platform.processor() or platform.machine()})"


def git_state() -> dict[str, Any] | None:
    """Commit of the repository around the working directory and whether files in it are changed, or None."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
