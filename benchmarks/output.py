"""Command-line options all comparisons share, and where their results go: JSON, and Markdown on the screen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from epitaxy.bench.measure import Clock, Quartiles, machine

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shared options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: proves that the code runs")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds (default: by comparison)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall" if torch.cuda.is_available() else "cpu",
        help="cpu: seconds the process held a core, steady on a machine in use; only for one thread",
    )
    parser.add_argument("--out", type=Path, default=None, help="directory of the JSON files; default: none if --quick")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, checked, and torch's threads set."""
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the time of all threads; give --clock wall with more than one")
    torch.set_num_threads(options.threads)
    options.timer = CLOCKS[options.clock]
    return options


def progress(text: str) -> None:
    """Say on the error stream what is measured now."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Report:
    """Collects the tables of one comparison."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.folder: Path | None = options.out or (None if options.quick else RESULTS)
        self.quick: bool = options.quick
        self.clock = f"{options.clock} time"
        self.tables: list[dict[str, Any]] = []

    def add(self, key: str, title: str, rows: list[dict[str, Any]], text: str) -> None:
        """Take one table and show it."""
        self.tables.append({"key": key, "title": title, "rows": rows, "table": text})
        print(f"\n### {title}\n\n{text}\n", flush=True)

    def finish(self) -> None:
        """Write the JSON file."""
        if self.folder is None:
            return
        content = {
            "name": self.name,
            "quick": self.quick,
            "machine": {**machine(), "clock": self.clock},
            "tables": self.tables,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=_plain) + "\n"
        (self.folder / f"{self.name}.json").write_text(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Quartiles):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot store {type(value).__name__}")
