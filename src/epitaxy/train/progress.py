"""What a person sees while a run goes on, or is prepared: a bar with rate and remaining time, or plain lines without
a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

PLAIN_INTERVAL = 20.0  # seconds between two lines
T = TypeVar("T")


class Progress:
    """Shows nothing when ``shown`` is False; writes to the error stream otherwise."""

    def __init__(self, steps: int, start: int, shown: bool) -> None:
        self.steps, self.first, self.shown = steps, start, shown
        self._began = self._spoke = time.monotonic()
        self._bar: RichProgress | None = None
        console = Console(stderr=True)
        if shown and console.is_interactive:
            self._bar, self._task = _bar(console, steps, start)
            self._bar.start()
        if shown and start:
            self._say(f"going on at step {start} of {steps}")

    def update(self, step: int, record: Mapping[str, Any] | None) -> None:
        """One more step done; ``record`` is its line of the log, if it has one."""
        if not self.shown:
            return
        text = describe(record) if record else None
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if text:
                self._bar.update(self._task, text=text)
            return
        now = time.monotonic()
        evaluated = record is not None and any(key.startswith("validation_") for key in record)
        if text and (evaluated or now - self._spoke >= PLAIN_INTERVAL or step == self.steps):
            self._spoke = now
            rate = (step - self.first) / max(now - self._began, 1e-9)
            left = (self.steps - step) / max(rate, 1e-9)
            self._say(f"step {step}/{self.steps}  {text}  {rate:.1f} steps/s  {_clock(left)} left")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def counted(items: Iterable[T], total: int, what: str, shown: bool) -> Iterator[T]:
    """``items``, of which there are ``total``, shown as they go by: ``what`` says what they go through.

    Without a terminal a line comes every 20 seconds, and one at the end when there were others; short passes say
    nothing.
    """
    if not shown:
        yield from items
        return
    console = Console(stderr=True)
    began = spoke = time.monotonic()
    bar = _pass_bar(console) if console.is_interactive else None
    task = None if bar is None else bar.add_task(what, total=total)
    done = 0
    with nullcontext() if bar is None else bar:
        for item in items:
            yield item
            done += 1
            if bar is not None and task is not None:
                bar.update(task, completed=done)
                continue
            now = time.monotonic()
            if now - spoke >= PLAIN_INTERVAL and done < total:
                spoke = now
                rate = done / max(now - began, 1e-9)
                left = _clock((total - done) / max(rate, 1e-9))
                print(f"{what}: {done}/{total}  {rate:.1f}/s  {left} left", file=sys.stderr, flush=True)
    if bar is None and spoke != began:
        print(f"{what}: {done} in {_clock(time.monotonic() - began)}", file=sys.stderr, flush=True)


def describe(record: Mapping[str, Any]) -> str:
    """The numbers of a log line that a person follows."""
    parts = [f"loss {record['loss']:.4f}"] if isinstance(record.get("loss"), float) else []
    parts += [f"skipped {record['skipped_steps']}"] if record.get("skipped_steps") else []
    scores = [
        f"{key.removeprefix('validation_')} {value:.4f}"
        for key, value in record.items()
        if key.startswith("validation_") and isinstance(value, float)
    ]
    return "  ".join([*parts, *([f"validation: {', '.join(scores)}"] if scores else [])])


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}{self.unit}/s", style="progress.data.speed")


def _pass_bar(console: Console) -> RichProgress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(""), TimeRemainingColumn())
    return RichProgress(*columns, console=console, transient=True)


def _bar(console: Console, steps: int, start: int) -> tuple[RichProgress, TaskID]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(" steps"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    bar = RichProgress(*columns, console=console, transient=True)
    return bar, bar.add_task("train", total=steps, completed=start, text="")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
