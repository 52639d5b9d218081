"""Writing the data sets that are shipped with the package: zip files of class folders, and their index."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[1] / "src" / "epitaxy" / "data" / "shipped"
FIXED_DATE = (2020, 1, 1, 0, 0, 0)
PARTS = ("train", "val", "test")

Sample = tuple[str, str, bytes]  # part, class, encoded picture or sound


@dataclass
class Archive:
    """One zip file in the making."""

    title: str
    source: str
    licence: str
    suffix: str
    samples: list[Sample] = field(default_factory=list)


def write_archive(archive: Archive, path: Path) -> dict[str, object]:
    """Write ``part/class/number.suffix`` in a fixed order with a fixed date, and return the entry of the index."""
    counts: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for part in PARTS:
            for wanted, name, encoded in sorted(archive.samples, key=lambda sample: sample[1]):
                if wanted != part:
                    continue
                number = counts[part].get(name, 0)
                counts[part][name] = number + 1
                entry = zipfile.ZipInfo(f"{part}/{name}/{number:04d}.{archive.suffix}", FIXED_DATE)
                entry.external_attr = 0o644 << 16
                entry.create_system = 3
                target.writestr(entry, encoded)
    return {
        "title": archive.title,
        "source": archive.source,
        "licence": archive.licence,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "classes": sorted(counts["train"]),
        "counts": counts,
    }


def update_index(entries: dict[str, dict[str, object]], folder: Path) -> None:
    """Put these entries into ``index.json``; those of other archives stay."""
    path = folder / "index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    index.update(entries)
    partial = path.with_name("index.json.partial")
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
