"""Tokenizers: loading one from files, learning one from text, and the parts by which a config chooses one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from zoo.data import jieba_wordpiece, sentencepiece_tokenizer, wordpiece_training
from zoo.data.byte_level_bpe import MERGES, byte_level_bpe
from zoo.data.files import read_lines
from zoo.data.huggingface_tokenizer import from_json, whole_words, wordpiece
from zoo.data.record import Source, texts
from zoo.data.tokenizer import CHINESE_WORDS, Pieces, Tokenizer, Vocabulary
from zoo.errors import UserError
from zoo.registry import Registry, to_config

__all__ = [
    "Pieces",
    "SentencePiece",
    "Tokenizer",
    "TokenizerJson",
    "Vocabulary",
    "WordPiece",
    "Words",
    "load_tokenizer",
    "names",
    "registry",
    "train_sentencepiece",
    "train_wordpiece",
]

logger = logging.getLogger(__name__)
registry = Registry("tokenizer")
names = registry.names

MAX_FILE = 1 << 27
TRAINING = "training.json"


def load_tokenizer(
    path: str | os.PathLike,
    *,
    lowercase: bool | None = None,
    chinese_words: bool | None = None,
    jieba_first: bool | None = None,
) -> Tokenizer:
    """The tokenizer in a file or a folder: `vocab.txt` (WordPiece), `tokenizer.json`, `merges.txt` with `vocab.json` (byte-level
    BPE) or a SentencePiece `.model`.

    In a folder they are looked for in this order. The lines of `vocab.txt` end at line feeds alone. A folder that
    `Tokenizer.save` wrote gives back the same tokenizer.

    Args:
      path: file or folder. A vocabulary may have any name that ends in `.txt`, `.txt.xz` or `.txt.gz`.
      lowercase: for WordPiece only; None takes `do_lower_case` of a `tokenizer_config.json` beside it, else True.
      chinese_words: whether words are jieba's; None takes what the folder says, else False.
      jieba_first: for WordPiece only: whether jieba cuts the text before pieces are looked for; None takes what a
        `tokenizer_config.json` beside it says (`RoFormerTokenizer`), else False.

    Raises:
      UserError: nothing there, a file that is not what its name says, or a folder that says the opposite of
        `lowercase`.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    folder = path if path.is_dir() else None
    if file.is_file() and file.stat().st_size > MAX_FILE:
        raise UserError(f"{file}: larger than {MAX_FILE:,} bytes, which no tokenizer is")
    if chinese_words is None:
        chinese_words = folder is not None and (folder / CHINESE_WORDS).exists()
    if file.name == MERGES:
        return byte_level_bpe(file.parent, chinese_words=chinese_words)
    if jieba_first is None:
        jieba_first = _settings(folder).get("tokenizer_class") in jieba_wordpiece.CLASSES
    if ".txt" in file.suffixes:
        tokens = _read_vocabulary(file)
        lowercase = _lowercase(folder, lowercase)
        made = jieba_wordpiece.jieba_wordpiece if jieba_first else wordpiece
        return made(tokens, lowercase=lowercase, chinese_words=chinese_words, where=str(file))
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected vocab.txt, tokenizer.json or a SentencePiece .model")
    if file.suffix == ".json" and jieba_first:
        tokens, lowercase = jieba_wordpiece.saved_by_the_library(file.read_bytes(), str(file))
        return jieba_wordpiece.jieba_wordpiece(
            tokens, lowercase=lowercase, chinese_words=chinese_words, where=str(file)
        )
    if file.suffix == ".json":
        return from_json(file.read_bytes(), chinese_words=chinese_words, where=str(file))
    if file.suffix == ".model":
        if chinese_words:
            raise UserError(f"{file}: Chinese words are not to be had with SentencePiece; take a WordPiece vocabulary")
        return sentencepiece_tokenizer.SentencePieceTokenizer(file.read_bytes(), str(file), folder)
    raise UserError(f"{file}: not a tokenizer; expected vocab.txt, tokenizer.json or a SentencePiece .model")


def train_wordpiece(
    texts: Iterable[str],
    *,
    size: int,
    lowercase: bool = True,
    limit_alphabet: int = 200,
    chinese_words: bool = False,
) -> Tokenizer:
    """A WordPiece tokenizer learnt from `texts`: the same texts, in any order, give the same vocabulary, byte for byte.

    See `zoo.data.wordpiece_training` for the rule. `limit_alphabet` = 200 suits English; Chinese needs thousands.

    Raises:
      UserError: no words, or `size` too small for the characters.
    """
    tokens = wordpiece_training.learn(texts, size=size, lowercase=lowercase, limit_alphabet=limit_alphabet)
    return wordpiece(tokens, lowercase=lowercase, chinese_words=chinese_words, where="the trained vocabulary")


def train_sentencepiece(
    texts: Iterable[str], *, size: int, model: Literal["unigram", "bpe"] = "unigram", lowercase: bool = False
) -> Tokenizer:
    """A SentencePiece tokenizer learnt from `texts` by one thread: the same texts give the same model.

    Raises:
      UserError: the text does not give `size` pieces.
    """
    return sentencepiece_tokenizer.train(texts, size=size, model=model, lowercase=lowercase)


def _find(folder: Path) -> Path:
    for name in ("vocab.txt", "tokenizer.json", MERGES):
        if (folder / name).exists():
            return folder / name
    found = sorted(folder.glob("*.model"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: no vocab.txt, no tokenizer.json, no {MERGES} and {len(found)} .model files; expected one of them"
        )
    return found[0]


def _read_vocabulary(file: Path) -> list[str]:
    tokens = []
    for line in read_lines(str(file), max_line_length=1000, max_bytes=MAX_FILE):
        if line.problem:
            raise UserError(f"{file}:{line.number}: {line.problem}")
        tokens.append(line.text)
    return tokens


def _settings(folder: Path | None) -> dict:
    """What a folder's tokenizer_config.json says; nothing where it has none.

    Raises:
      UserError: it is no JSON object.
    """
    path = folder / "tokenizer_config.json" if folder else None
    if path is None or not path.exists():
        return {}
    try:
        said = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"{path}: not a JSON object: it holds {type(said).__name__}")
    return said


def _lowercase(folder: Path | None, asked: bool | None) -> bool:
    said = _settings(folder).get("do_lower_case", asked)
    if asked is not None and said != asked:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} says do_lower_case={said}, but lowercase={asked} was asked for"
        )
    return True if said is None else bool(said)


def _train_once(part: WordPiece | SentencePiece | Words, source: Source, directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of `part` over the source's training text, from `directory` where it was learnt before."""
    directory = Path(directory)
    made_from = json.dumps({"tokenizer": to_config(part), "source": source.fingerprint()}, indent=2) + "\n"
    note = directory / TRAINING
    if note.is_file() and note.read_text("utf-8") == made_from:
        return load_tokenizer(directory)
    logger.info("learning a %s tokenizer of at most %d pieces", part.name, part.size)
    tokenizer = part.train(texts(source.records("train")))
    tokenizer.save(directory, also={TRAINING: made_from.encode()})
    return tokenizer


@registry.register("wordpiece")
@dataclasses.dataclass(frozen=True)
class WordPiece:
    """WordPiece with BERT's normalisation: a given vocabulary, or one learnt from the training text.

    Attributes:
      path: `vocab.txt` or a folder that holds it; None to learn one.
      size: pieces to learn.
      lowercase: also takes accents off.
      chinese_words: words for whole-word masking are jieba's instead of single Chinese characters.
      limit_alphabet: characters to keep when learning.
    """

    path: str | None = None
    size: int = 4096
    lowercase: bool = True
    chinese_words: bool = False
    limit_alphabet: int = 200

    def tokenizer(self, source: Source, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer; one that has to be learnt is kept in `directory` and taken from there the next time."""
        if self.path is not None:
            return load_tokenizer(self.path, lowercase=self.lowercase, chinese_words=self.chinese_words)
        return _train_once(self, source, directory)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return train_wordpiece(
            texts,
            size=self.size,
            lowercase=self.lowercase,
            limit_alphabet=self.limit_alphabet,
            chinese_words=self.chinese_words,
        )


@registry.register("sentencepiece")
@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """SentencePiece: a given model, or one learnt from the training text (arXiv 1808.06226).

    Attributes:
      path: a `.model` file or a folder that holds one; None to learn one.
      size: pieces to learn.
      model: "unigram" or "bpe".
      lowercase: fold case when learning.
    """

    path: str | None = None
    size: int = 8000
    model: Literal["unigram", "bpe"] = "unigram"
    lowercase: bool = False

    def tokenizer(self, source: Source, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer; one that has to be learnt is kept in `directory` and taken from there the next time."""
        return load_tokenizer(self.path) if self.path is not None else _train_once(self, source, directory)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return train_sentencepiece(texts, size=self.size, model=self.model, lowercase=self.lowercase)


@registry.register("words")
@dataclasses.dataclass(frozen=True)
class Words:
    """Every word of the training text, as white space tells them apart, is a piece: for texts of few different words.

    Numbered in sorted order; upper and lower case are two words.

    Attributes:
      path: a folder that holds such a tokenizer; None to learn one.
      size: the most pieces there may be, special tokens included.
    """

    path: str | None = None
    size: int = 1 << 16

    def tokenizer(self, source: Source, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer; one that has to be learnt is kept in `directory` and taken from there the next time."""
        return load_tokenizer(self.path) if self.path is not None else _train_once(self, source, directory)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Raises UserError where the text has more words than `size` leaves room for, or none."""
        known: set[str] = set()
        room = self.size - len(wordpiece_training.SPECIAL)
        for text in texts:
            known.update(text.split())
            if len(known) > room:
                raise UserError(
                    f"the training text has more than {room} different words, as many as a 'words' tokenizer of size={self.size} "
                    "holds; raise size, or take 'wordpiece'"
                )
        known.difference_update(wordpiece_training.SPECIAL)
        if not known:
            raise UserError("there are no words in the training text of the tokenizer")
        return whole_words(sorted(known))


@registry.register("tokenizer_json")
@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """Any tokenizer of the Hugging Face `tokenizers` library, from its `tokenizer.json`.

    Attributes:
      path: the file or a folder that holds it.
      chinese_words: words for whole-word masking are jieba's.
    """

    path: str
    chinese_words: bool = False

    def tokenizer(self, source: Source, directory: str | os.PathLike) -> Tokenizer:
        """The tokenizer; nothing is learnt, so neither argument is used."""
        file = Path(self.path) / "tokenizer.json" if Path(self.path).is_dir() else self.path
        return load_tokenizer(file, chinese_words=self.chinese_words)
