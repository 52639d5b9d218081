"""``metrics.jsonl``: one JSON object per line, appended as training goes, cut back to a checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from epitaxy.core.storage import writing


class MetricsLog:
    """The open log; ``position`` says how many of its bytes to keep, what lies behind is cut off."""

    def __init__(self, path: Path, position: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._stream = path.open("r+b" if path.exists() else "w+b")
        kept = whole_lines(self._stream.read(position))
        self._stream.truncate(len(kept))
        self._stream.seek(len(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold become null."""
        lost = {key: None for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
        with writing(self.path):
            self._stream.write(json.dumps({**record, **lost}).encode() + b"\n")
            self._stream.flush()

    def position(self) -> int:
        """Bytes written so far, now safely on disk."""
        with writing(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        """Close the file."""
        with writing(self.path):
            self._stream.close()


def whole_lines(data: bytes) -> bytes:
    """``data`` up to the end of its last complete line: a killed run may leave half a line behind."""
    return data[: data.rfind(b"\n") + 1]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a torn last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in whole_lines(path.read_bytes()).splitlines()]
