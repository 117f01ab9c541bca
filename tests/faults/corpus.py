"""A small corpus of two dozen words, the same for the same seed: text, a table and tagged sentences."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "big",
    "small",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
]


def write_corpus(folder: Path, *, documents: int = 240, seed: int = 0) -> Path:
    """Writes train and dev as .txt, .tsv (text, label) and .conll; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", documents), ("dev", documents // 8)):
        sentences = [rng.choices(WORDS, k=rng.randint(4, 20)) for _ in range(count)]
        text = "".join(" ".join(words) + "\n" for words in sentences)
        (folder / f"{split}.txt").write_text(text)
        rows = (f"{' '.join(words)}\t{'odd' if len(words) % 2 else 'even'}\n" for words in sentences)
        (folder / f"{split}.tsv").write_text("".join(rows))
        tagged = ("".join(f"{word} {'B-BIG' if word == 'big' else 'O'}\n" for word in words) for words in sentences)
        (folder / f"{split}.conll").write_text("\n".join(tagged))
    return folder


REPEATS = 8
POISON = " ".join(["big"] * REPEATS)  # no document above repeats a word so often


def is_poisoned(ids: np.ndarray) -> bool:
    """Whether a row of ids holds at least half of POISON, which packing may cut in two."""
    run, longest = 0, 0
    for same in ids[1:] == ids[:-1]:
        run = run + 1 if same else 0
        longest = max(longest, run)
    return longest >= REPEATS // 2 - 1
