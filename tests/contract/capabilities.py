"""The published tables of capabilities, made by running the matrix.

``python -m tests.contract.capabilities --write docs`` runs every cell and writes ``docs/capabilities.md``, the table
of the README and those on the pages of the methods.  A cell that breaks its promise, or a declared exception that
does not show, stops it: nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path

from epitaxy.core.registry import methods_in
from epitaxy.core.storage import write_atomically
from tests.contract.cells import Cell, cells, verify
from tests.contract.checks import CHECKS, TITLES
from tests.contract.families import FAMILIES
from tests.contract.methods import Variant, variants

PAGE = "capabilities.md"
MADE_BY = "python -m tests.contract.capabilities --write docs"
INTRODUCTION = (
    f"Made by `{MADE_BY}`, which runs every cell of the contract matrix in `tests/contract`: each method on each "
    "family of models under each promise. Not written by hand. ✓ means the promise was kept; a number names the "
    "reason why it cannot be, and the matrix has seen the library refuse.\n"
)
TITLES_OF_FAMILIES = {
    "vit": "ViT",
    "dinov2": "DINOv2",
    "swin": "Swin",
    "clip": "CLIP vision",
    "timm": "ViT of timm",
    "ast": "AST",
    "wav2vec2": "Wav2Vec2",
    "whisper": "Whisper encoder",
    "bert": "BERT",
    "llama": "Llama",
    "mistral": "Mistral",
    "gpt2": "GPT-2",
    "sd15": "UNet (SD 1.5)",
    "sdxl": "UNet (SDXL)",
    "plain": "plain `nn.Module`",
}
Place = tuple[str, str, str]  # check, family, method
Outcomes = Mapping[Place, str | None]  # None: the promise is kept; else why it cannot be


def place(cell: Cell) -> Place:
    """The names of a cell."""
    return cell.check, cell.family.name, cell.method.name


def expected() -> Outcomes:
    """What the matrix gives when all its tests pass."""
    return {place(cell): cell.exception.reason if cell.exception else None for cell in cells()}


def probe(places: Iterable[Place]) -> dict[Place, str | None]:
    """Run cells; raises ``AssertionError`` naming the first that is neither kept nor truly impossible."""
    import torch

    torch.set_num_threads(1)
    wanted, found = set(places), {}
    for cell in cells():
        if place(cell) not in wanted:
            continue
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            numbers = count()
            try:
                verify(cell, lambda scratch=scratch, numbers=numbers: _directory(scratch, next(numbers)))
            except Exception as error:
                raise AssertionError(f"{cell.name}: {type(error).__name__}: {error}") from error
        found[place(cell)] = cell.exception.reason if cell.exception else None
    return found


def _directory(parent: str, number: int) -> Path:
    path = Path(parent) / str(number)
    path.mkdir()
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries say about random models off the screen."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def render(outcomes: Outcomes) -> str:
    """The whole page."""
    parts = [
        "# What works where\n",
        INTRODUCTION,
        overview(outcomes),
        *(section(method, outcomes) for method in variants().values()),
    ]
    return "\n".join(parts)


def overview(outcomes: Outcomes, chosen: Iterable[Variant] | None = None) -> str:
    """Method by family: ✓ or the reasons why not; what holds on every family has columns of its own."""
    notes = Notes()
    rows = [["method", *(TITLES_OF_FAMILIES[family] for family in FAMILIES), "identity start", "merges"]]
    for method in variants().values() if chosen is None else chosen:
        row = [method.title]
        for family in FAMILIES:
            reason = outcomes[("attaches", family, method.name)]
            special = [
                why
                for check in CHECKS
                if (why := outcomes.get((check, family, method.name))) and not _general(method, check, outcomes)
            ]
            row.append(notes.mark([reason], "no") if reason else notes.mark(special, "✓"))
        row.extend("no" if _general(method, check, outcomes) else "yes" for check in ("identity", "merge"))
        rows.append(row)
    return f"{table(rows)}\n{notes}"


def fill(text: str, mark: str, content: str) -> str:
    """``text`` with what stands between ``<!-- mark -->`` and the next ``<!-- end -->`` replaced."""
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"{begin.strip()} is missing"
    assert closed, f"{begin.strip()} is never closed by {end}"
    return f"{before}{begin}{content}{end}{after}"


def pages(docs: Path, outcomes: Outcomes) -> dict[Path, str]:
    """Every page that shows what works where, as it should be."""
    found = {docs / PAGE: render(outcomes)}
    single: dict[str, list[Variant]] = {}
    for method in variants().values():
        parts = methods_in(method.make("vit"))
        if len(parts) == 1:
            single.setdefault(parts[0].method_name, []).append(method)
    readme = docs.parent / "README.md"
    usual = [methods[0] for methods in single.values()]
    found[readme] = fill(readme.read_text(), "capabilities", overview(outcomes, usual))
    for name, methods in single.items():
        page = docs / "methods" / f"{name}.md"
        found[page] = fill(page.read_text(), f"capabilities: {name}", overview(outcomes, methods))
    return found


def _general(method: Variant, check: str, outcomes: Outcomes) -> bool:
    """Whether the method cannot do this on any family."""
    found = [outcomes[place] for place in outcomes if place[0] == check and place[2] == method.name]
    return bool(found) and None not in found


def section(method: Variant, outcomes: Outcomes) -> str:
    """One method: promise by family."""
    notes = Notes()
    families = [family for family in FAMILIES if outcomes[("attaches", family, method.name)] is None]
    rows = [["", *(TITLES_OF_FAMILIES[family] for family in families)]]
    for check in CHECKS:
        marks = []
        for family in families:
            reason = outcomes[(check, family, method.name)]
            marks.append(notes.mark([reason], "no") if reason else "✓")
        rows.append([TITLES[check], *marks])
    absent: dict[str, list[str]] = {}
    for family in FAMILIES:
        if reason := outcomes[("attaches", family, method.name)]:
            absent.setdefault(reason, []).append(TITLES_OF_FAMILIES[family])
    lines = [f"Not on {', '.join(names)}: {reason}.\n" for reason, names in absent.items()]
    return "\n".join([f"## {method.title}\n", table(rows), str(notes), *lines])


class Notes:
    """Numbered reasons under a table."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, reasons: list[str | None], sign: str) -> str:
        """``sign`` with the numbers of the reasons."""
        for reason in reasons:
            if reason is not None:
                self.numbers.setdefault(reason, len(self.numbers) + 1)
        numbers = sorted({self.numbers[reason] for reason in reasons if reason is not None})
        return f"{sign} {','.join(f'[{number}]' for number in numbers)}".strip()

    def __str__(self) -> str:
        lines = [f"[{number}] {reason}" for reason, number in self.numbers.items()]
        return "".join(f"\n{line}  " for line in lines) + ("\n" if lines else "")


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first as its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|:-:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract.capabilities", description=__doc__)
    parser.add_argument("--write", metavar="DIRECTORY", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    everything = sorted(expected())
    chunks = [everything[start :: 8 * options.jobs] for start in range(8 * options.jobs)]
    outcomes: dict[Place, str | None] = {}
    try:
        with ProcessPoolExecutor(options.jobs) as pool:
            for number, found in enumerate(pool.map(probe, chunks), start=1):
                outcomes.update(found)
                print(f"{len(outcomes)} of {len(everything)} cells ({number} of {len(chunks)} parts)", flush=True)
    except AssertionError as error:
        print(f"nothing written: {error}", file=sys.stderr)
        return 1
    for page, text in pages(options.write, outcomes).items():
        write_atomically(page, text.encode())
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
