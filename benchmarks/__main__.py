"""Run every comparison: ``python -m benchmarks [--quick] [--only NAME] [--docs]``.

``--docs`` writes the tables of the stored results into docs/benchmarks.md without measuring anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.output import RESULTS, arguments

COMPARISONS = (
    "lora_vs_peft",
    "many_adapters",
    "inactive",
    "moa",
    "audio_front_end",
    "adapter_training",
    "mosa_training",
    "fold",
)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks --docs` from what `make bench` measured; never by hand.

Every number is a ratio against a named peer, or comes with one, taken on one machine in one run. A round times each
side once, in an order drawn anew; ratios are taken within rounds, and tables show their median with first and third
quartile. Sides share the same base weights at the same addresses. Times depend on the machine, ratios less so.
"""


def page(folder: Path) -> str:
    """The page of all stored results."""
    parts = [INTRODUCTION]
    for name in COMPARISONS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        content: dict[str, Any] = json.loads(file.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        parts += [f"## {entry['title']}\n\n{entry['table']}\n" for entry in content["tables"]]
        parts.append(f"Measured with: {machine}.\n")
    return "\n".join(parts)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=COMPARISONS, help="run one comparison")
    parser.add_argument("--docs", action="store_true", help="only write the page")
    options = parser.parse_args()
    folder: Path = options.out or RESULTS
    if not options.docs:
        for name in [options.only] if options.only else COMPARISONS:
            given = [argument for argument in sys.argv[1:] if argument not in ("--only", options.only)]
            result = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], check=False)
            if result.returncode:
                return result.returncode
    if not options.quick:
        PAGE.write_text(page(folder))
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
