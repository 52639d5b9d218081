"""Speech Commands v2: 105,829 utterances of up to one second, 35 words.  Warden, arXiv 1804.03209, 2018.

``<word>/<speaker>_nohash_<take>.wav``; ``validation_list.txt`` and ``testing_list.txt`` name their clips, all others
train.  ``_background_noise_`` holds no words and is left out.  The lists keep each speaker on one side.
"""

from __future__ import annotations

from collections import Counter

from epitaxy.core.errors import FormatError, nearest
from epitaxy.data.layout import add, chosen_protocol, disjoint, refuse_fold, rooted, text_of, usable, verify
from epitaxy.data.spec import DataSpec, Pool
from epitaxy.data.stored import Tree

TITLE, TOTAL = "Speech Commands v2", 105_829
LISTS = {"validation": ("validation_list.txt", 9_981), "test": ("testing_list.txt", 11_005)}
NOISE = "_background_noise_"
# fmt: off
WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six",
    "stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)
# fmt: on


def read_speech_commands(tree: Tree, spec: DataSpec) -> Pool:
    """The rows of Speech Commands with their splits; raises ``FormatError`` naming the line or file that is wrong."""
    chosen_protocol(spec, TITLE, ("official",))
    refuse_fold(spec, TITLE)
    tree = rooted(tree, LISTS["test"][0], TITLE)
    pool = Pool([], "audio", "speech_commands", declared=WORDS)
    listed = _listed(tree, pool, spec)
    for word in tree.children(""):
        with usable(pool, spec, f"{tree.root}/{word}"):
            if word in WORDS or word == NOISE:
                continue
            raise FormatError(f"{tree.root}/{word}: not one of the {len(WORDS)} words of {TITLE}{nearest(word, WORDS)}")
    speakers: dict[str, dict[str, str]] = {"train": {}, "validation": {}, "test": {}}
    sounds = [path for path in sorted(tree.files) if path.endswith(".wav") and path.split("/")[0] in WORDS]
    for path in [*sounds, *(path for path in listed if path not in tree.files)]:
        word, _, name = path.partition("/")
        split = listed.get(path, "train")
        speakers[split].setdefault(name.partition("_nohash_")[0], path)
        add(pool, tree, path, word, split)
    found = Counter(listed.values())
    official = {name: (found[split], count) for split, (name, count) in LISTS.items()}
    words = len({path.split("/")[0] for path in sounds})
    verify(pool, tree, spec, {"words": (words, len(WORDS)), "clips": (len(sounds), TOTAL), **official})
    disjoint(pool, tree, spec, "speaker", speakers)
    return pool


def _listed(tree: Tree, pool: Pool, spec: DataSpec) -> dict[str, str]:
    """The split of every clip that one of the two lists names."""
    listed: dict[str, str] = {}
    for split, (name, _) in LISTS.items():
        for number, line in enumerate(text_of(tree, name).splitlines(), start=1):
            path = line.strip()
            if not path:
                continue
            where = f"{tree.root}/{name}:{number}"
            with usable(pool, spec, where):
                word = path.partition("/")[0]
                if word not in WORDS or path.count("/") != 1:
                    raise FormatError(
                        f"{where}: expected word/file.wav with one of the {len(WORDS)} words, found {path!r}"
                    )
                if listed.setdefault(path, split) != split:
                    raise FormatError(f"{where}: {path} is in both lists")
    return listed
