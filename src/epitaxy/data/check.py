"""One look at every row before training: unlabelled rows, unreadable files, and copies of one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from epitaxy.core.errors import FormatError
from epitaxy.data.audio.decoding import check_audio
from epitaxy.data.audio.sound import Sound
from epitaxy.data.decode import decode_image
from epitaxy.data.spec import DataSpec, Modality, Pool, Row

SHOWN = 5
Skipped = list[tuple[str, str]]


@dataclass
class Checked:
    """The rows that can be used, a digest of each row's content where it was read, and what was left out."""

    rows: list[Row]
    digests: dict[int, bytes] = field(default_factory=dict)  # by id of the row
    skipped: Skipped = field(default_factory=list)


def check_rows(pool: Pool, spec: DataSpec) -> Checked:
    """Read every file once.  Raises ``FormatError`` with the count and the first names, unless ``on_bad="skip"``."""
    if pool.missing:
        refuse_or_skip(spec, pool.missing, len(pool.rows) + len(pool.missing), "are missing")
    unlabelled = [row for row in pool.rows if row.label is None]
    if unlabelled:
        refuse_or_skip(spec, [(row.name, "no label") for row in unlabelled], len(pool.rows), "have no label")
    checked = Checked([row for row in pool.rows if row.label is not None])
    checked.skipped = [*pool.missing, *((row.name, "no label") for row in unlabelled)]
    if not spec.check and pool.modality != "text":
        return checked
    if pool.modality == "text":
        outcomes = [_look_at_text(row) for row in checked.rows]
    else:
        modality = pool.modality
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
            outcomes = list(workers.map(lambda row: _look_at_file(row, modality), checked.rows))
    bad = [(row.name, outcome) for row, outcome in zip(checked.rows, outcomes, strict=True) if isinstance(outcome, str)]
    if bad:
        refuse_or_skip(spec, bad, len(checked.rows), "cannot be read")
    good = [(row, outcome) for row, outcome in zip(checked.rows, outcomes, strict=True) if isinstance(outcome, bytes)]
    checked.rows = [row for row, _ in good]
    checked.digests = {id(row): digest for row, digest in good}
    checked.skipped += bad
    return checked


def refuse_or_skip(spec: DataSpec, bad: Sequence[tuple[str, str]], total: int, fault: str) -> None:
    """Raise for ``bad`` rows, naming the first few, unless the user chose to leave such rows out."""
    if spec.on_bad == "skip":
        return
    first = ", ".join(f"{name} ({reason})" for name, reason in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise FormatError(
        f"{spec.source}: {len(bad)} of {total} examples {fault}: {first}{more}; "
        "mend them, or leave them out with on_bad: skip"
    )


def _look_at_text(row: Row) -> bytes | str:
    assert isinstance(row.content, str)
    if not row.content.strip():
        return "the text is empty"
    return hashlib.blake2b(row.content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _look_at_file(row: Row, modality: Modality) -> bytes | str:
    """The digest of a readable file, or why it cannot be read."""
    assert not isinstance(row.content, str)
    try:
        if modality == "audio":
            sound = Sound(row.content, row.name)
            check_audio(sound.data(), row.name)
            return bytes.fromhex(sound.digest())
        data = read_bytes(row)
        decode_image(data, row.name, quick=True)
    except FormatError as error:
        return str(error).removeprefix(f"{row.name}: ")
    return hashlib.blake2b(data, digest_size=16).digest()


def read_bytes(row: Row) -> bytes:
    """The encoded content of a row; raises ``FormatError`` when its file is gone."""
    assert not isinstance(row.content, str)
    try:
        return row.content.read()
    except FileNotFoundError:
        raise FormatError(f"{row.name}: no such file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{row.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
