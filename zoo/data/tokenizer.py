"""What a tokenizer is: text in, pieces and word boundaries out."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.errors import UserError, writing

# How the libraries spell the five tokens that an encoder cannot do without.
SPELLINGS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# A text is cut at white space before it goes to a library, whose memory per character is a hundredfold.
LONGEST_CALL = 1 << 17


# The file of a tokenizer that says its words are jieba's.
CHINESE_WORDS = "chinese_words.txt"


class Pieces(NamedTuple):
    """`ids` int32 [n], without special tokens, and `word_starts` bool [n]: whether a word begins at this piece."""

    ids: np.ndarray
    word_starts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The number of ids and which of them are special. Text never yields a special id other than `unk`."""

    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    special: tuple[int, ...]

    @classmethod
    def of(cls, ids: Mapping[str, int], also_special: Iterable[int], where: str) -> Vocabulary:
        """The vocabulary of `ids`, token → id.

        Raises:
          UserError: one of the five tokens is missing.
        """
        found = {}
        for name, spellings in SPELLINGS.items():
            present = [ids[s] for s in spellings if s in ids]
            if not present:
                raise UserError(f"{where}: no {name} token; expected one of {', '.join(spellings)}")
            found[name] = present[0]
        special = tuple(sorted({*found.values(), *also_special}))
        return cls(size=max(ids.values()) + 1, special=special, **found)


class Tokenizer(abc.ABC):
    """A tokenizer is its files: `save` writes them, `fingerprint` is their hash, and they alone rebuild it.

    Attributes:
      vocabulary: the number of ids and the special ones.
    """

    vocabulary: Vocabulary

    def __init__(self, files: Mapping[str, bytes], vocabulary: Vocabulary):
        self._files = dict(files)
        self.vocabulary = vocabulary

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Pieces]:
        """`encode` of each text, faster than one by one."""

    @abc.abstractmethod
    def encode_words(self, words: Sequence[str]) -> Pieces:
        """The pieces of each word in turn; `word_starts` marks the first of each, and nothing else.

        A word of which nothing is left (white space, control characters) becomes the unknown token, so that there are
        always as many words out as in.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text again, special tokens included."""

    def encode(self, text: str) -> Pieces:
        """The pieces of `text`, without special tokens.

        A word is a first piece and its continuations, or, where the tokenizer has Chinese words, one of them. Names of
        special tokens in the text are text: no input can smuggle in a [MASK].
        """
        return self.encode_batch([text])[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what `encode` gives."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def gives_the_ids_of(self, other: Tokenizer) -> bool:
        """Whether both give every text the same ids. Which pieces begin a Chinese word does not matter to that."""

        def deciding(files: Mapping[str, bytes]) -> dict[str, bytes]:
            return {name: content for name, content in files.items() if name != CHINESE_WORDS}

        return deciding(self._files) == deciding(other._files)

    def save(self, directory: str | os.PathLike, also: Mapping[str, bytes] | None = None) -> None:
        """Writes the files, and `also`, into `directory`: all or, if interrupted, none. What was there is replaced."""
        directory = Path(directory)
        with writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
                whole = Path(temporary) / "whole"
                whole.mkdir()
                for name, content in {**self._files, **(also or {})}.items():
                    (whole / name).write_bytes(content)
                if directory.exists():
                    shutil.rmtree(directory)
                whole.rename(directory)


def cut(text: str) -> list[str]:
    """`text` in parts of at most `LONGEST_CALL` characters, cut behind white space where there is any.

    Tokenizers look at words one by one, so pieces do not change unless a part holds no white space at all.
    """
    if len(text) <= LONGEST_CALL:
        return [text]
    parts, start = [], 0
    while start < len(text):
        stop = min(start + LONGEST_CALL, len(text))
        if stop < len(text):
            at = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
            stop = at + 1 if at > start else stop
        parts.append(text[start:stop])
        start = stop
    return parts


def encode_in_parts(texts: Sequence[str], encode: Callable[[list[str]], list[Pieces]]) -> list[Pieces]:
    """`encode` (a list of texts → a list of pieces) over the parts of each text, joined again."""
    parts = [cut(text) for text in texts]
    encoded = iter(encode([part for of_text in parts for part in of_text]))
    joined = []
    for of_text in parts:
        found = [next(encoded) for _ in of_text]
        if len(found) == 1:
            joined.append(found[0])
        else:
            joined.append(
                Pieces(np.concatenate([p.ids for p in found]), np.concatenate([p.word_starts for p in found]))
            )
    return joined
