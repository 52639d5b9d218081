"""IEMOCAP: emotional speech of ten actors in five sessions of two.  Busso et al., LREC 2008.

``Session{1..5}/dialog/EmoEvaluation/*.txt`` hold the labels, ``Session*/sentences/wav/<dialog>/<utterance>.wav`` the
sounds.  Four classes are used: neutral, happy with excited, sad, angry, 5,531 utterances.  Ten folds: one session is
held out; its one speaker tests, the other validates, the four other sessions train.  Fold 2s - 1 tests the woman of
session s, fold 2s the man.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from epitaxy.core.errors import FormatError, nearest
from epitaxy.data.layout import add, chosen_fold, chosen_protocol, text_of, usable, verify
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

TITLE, SESSIONS = "IEMOCAP", 5
MERGED = {"neu": "neu", "hap": "hap", "exc": "hap", "sad": "sad", "ang": "ang"}
UNUSED = ("fru", "sur", "fea", "dis", "oth", "xxx")
CLASSES = {"neu": 1708, "hap": 1636, "sad": 1084, "ang": 1103}


def read_iemocap(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of IEMOCAP with their splits; raises ``FormatError`` naming the line or file that is wrong."""
    chosen_protocol(spec, TITLE, ("published",))
    tested = chosen_fold(spec, TITLE, 2 * SESSIONS)
    session, speaker = (tested + 1) // 2, "F" if tested % 2 else "M"
    pool = Pool([], "audio", "iemocap", declared=tuple(CLASSES))
    counts: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    for number, path in _evaluations(tree):
        for place, line in enumerate(text_of(tree, path).splitlines(), start=1):
            if not line.startswith("["):
                continue
            where = f"{tree.root}/{path}:{place}"
            with usable(pool, spec, where):
                utterance, emotion = _cells(where, line, number)
                if emotion not in MERGED:
                    unused[emotion] += 1
                    continue
                counts[MERGED[emotion]] += 1
                voice = utterance.rpartition("_")[2][:1]
                if voice not in ("F", "M"):
                    raise FormatError(
                        f"{where}: {utterance} does not tell the speaker: its last part begins with no F or M"
                    )
                split = "train" if number != session else "test" if voice == speaker else "validation"
                root = path.split(f"Session{number}/")[0]
                dialog = utterance.rpartition("_")[0]
                sound = f"{root}Session{number}/sentences/wav/{dialog}/{utterance}.wav"
                add(pool, tree, sound, MERGED[emotion], split)
    verify(pool, tree, spec, {f"utterances of class {name}": (counts[name], count) for name, count in CLASSES.items()})
    if unused:
        shown = ", ".join(f"{count} {name}" for name, count in sorted(unused.items()))
        pool.notes.append(f"{spec.source}: utterances of other emotions are not used: {shown}")
    return pool


def _evaluations(tree: Tree) -> list[tuple[int, str]]:
    """(session, file of labels) for all sessions; raises when one has none."""
    found: list[tuple[int, str]] = []
    for number in range(1, SESSIONS + 1):
        folder = f"Session{number}/dialog/EmoEvaluation"
        files = [
            path
            for path in sorted(tree.files)
            if path.endswith(".txt") and f"/{PurePosixPath(path).parent}".endswith(f"/{folder}")
        ]
        if not files:
            raise FormatError(f"{tree.root}: not the layout of {TITLE}: {folder}/ holds no .txt file")
        found += [(number, path) for path in files]
    return found


def _cells(where: str, line: str, session: int) -> tuple[str, str]:
    """Utterance and emotion of one line."""
    cells = line.split("\t")
    if len(cells) < 3:
        raise FormatError(f"{where}: expected time, utterance and emotion between tabs, found {line[:60]!r}")
    utterance, emotion = cells[1].strip(), cells[2].strip()
    if not utterance.startswith(f"Ses{session:02d}"):
        raise FormatError(f"{where}: {utterance} is no utterance of session {session}")
    if emotion not in MERGED and emotion not in UNUSED:
        raise FormatError(f"{where}: no emotion is called {emotion!r}{nearest(emotion, [*MERGED, *UNUSED])}")
    return utterance, emotion
