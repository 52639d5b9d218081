"""Command-line options all comparisons share, and where their results go: JSON, and Markdown on the screen."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from epitaxy.bench.measure import Quartiles, machine

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shared options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: proves that the code runs")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds (default: by comparison)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=None, help="directory of the JSON files; default: none if --quick")
    return parser


class Report:
    """Collects the tables of one comparison."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.folder: Path | None = options.out or (None if options.quick else RESULTS)
        self.quick: bool = options.quick
        self.tables: list[dict[str, Any]] = []

    def add(self, key: str, title: str, rows: list[dict[str, Any]], text: str) -> None:
        """Take one table and show it."""
        self.tables.append({"key": key, "title": title, "rows": rows, "table": text})
        print(f"\n### {title}\n\n{text}\n", flush=True)

    def finish(self) -> None:
        """Write the JSON file."""
        if self.folder is None:
            return
        content = {"name": self.name, "quick": self.quick, "machine": machine(), "tables": self.tables}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=_plain) + "\n"
        (self.folder / f"{self.name}.json").write_text(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Quartiles):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot store {type(value).__name__}")
