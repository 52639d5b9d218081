"""Write the human speakers of the evaluation as an audio folder, for ``epitaxy train`` and ``epitaxy bench``.

    python -m scripts.speakers_data --out data/speakers
    python -m scripts.speakers_data --out data/speakers-64 --train 64     # for the few-shot curve

Nine classes, each one speaker of one language reading captions of pictures; train, val and test name different
pictures.  The recordings come from Debian's ``tuxpaint-stamps-default`` (161 MB, GPL-2.0), so they are not shipped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from scripts.reference_ast.assets import DEFAULT_CACHE
from scripts.reference_ast.evaluate import SPEAKER_CLIPS, human_speakers

from epitaxy.core.storage import write_atomically


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where downloads are kept")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--train", type=int, default=SPEAKER_CLIPS["train"], help="training clips of each speaker")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    for part, language, encoded in human_speakers(arguments.cache, {**SPEAKER_CLIPS, "train": arguments.train}):
        number = counts[part, language]
        write_atomically(arguments.out / part / language.lower() / f"{number:02d}.ogg", encoded)
        counts[part, language] += 1
    for (part, language), count in sorted(counts.items()):
        print(f"{part:5s} {language:12s} {count}")


if __name__ == "__main__":
    main()
