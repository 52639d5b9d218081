"""The command line answers at once: nothing heavy is imported before a verb runs."""

from __future__ import annotations

import resource
import subprocess
import sys

HEAVY = ("torch", "transformers", "matplotlib", "pydantic_core", "numpy", "rich.console", "jinja2", "yaml", "PIL")
CPU_SECONDS = 0.3


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)


def _cpu_seconds(*words: str) -> float:
    """Processor time of a command: unlike the clock, it does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert _run(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_version_take_little_time() -> None:
    for option in ("--help", "--version"):
        spent = sorted(_cpu_seconds("-m", "epitaxy.cli", option) for _ in range(5))
        assert spent[2] < CPU_SECONDS, f"{option} takes {spent[2]:.2f} s of processor time"


def test_nothing_heavy_is_imported() -> None:
    code = f"import sys, epitaxy.cli.app; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert _run("-c", code).stdout.strip() == "[]"


def test_version() -> None:
    from epitaxy import __version__

    assert _run("-m", "epitaxy.cli", "--version").stdout == f"epitaxy {__version__}\n"


def test_help_without_a_terminal_is_plain_text() -> None:
    done = _run("-m", "epitaxy.cli", "--help")
    assert done.stdout.isascii()
    for verb in ("demo", "train", "eval", "plan", "inspect", "methods", "merge", "export", "report", "doctor"):
        assert f"  {verb} " in done.stdout
