"""The prepared store: every document of a split as token ids, tokenized once and mapped into memory ever after.

A store is a folder:

    tokens.bin        little-endian uint16 (uint32 where the vocabulary needs it), document after document
    word_starts.bin   a bit per token, the first in the lowest bit
    offsets.bin       int64 [documents + 1], where each document begins in tokens
    sentences.bin     int64 [sentences + 1], where each sentence begins in tokens
    store.json        format version, counts, what it was made from, size and SHA-256 of each file

It is written under another name and renamed when whole, so an interrupted preparation leaves nothing that looks like
a store. Its folder is named by a hash of source, split, tokenizer and format; so changed data never meet an old store.

A sentence is a line of a document, with the lines of white space alone that follow it: in the input form of BERT's data
builders a line is a sentence. Lines are tokenized one by one, so that no piece lies across the end of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zoo.data.files import content_hash
from zoo.data.record import Record, Source
from zoo.data.tokenizer import Pieces, Tokenizer
from zoo.errors import UserError, writing

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
SUMMARY = "store.json"
FILES = ("tokens.bin", "word_starts.bin", "offsets.bin", "sentences.bin")
# Characters that are tokenized together: enough to keep the library's threads busy, little enough to hold.
BATCH_CHARACTERS = 1 << 20
LARGEST_SUMMARY = 1 << 16
NEXT_SENTENCE = re.compile(r"(?<=\n)(?=[^\S\n]*\S)")  # behind a line feed, before a line that holds something


class TokenStore:
    """A prepared split. Nothing is read until it is asked for.

    Attributes:
      fingerprint: SHA-256 of the content; the same tokens have the same one wherever and whenever they are prepared.
      num_tokens: in all documents.
      lengths: int64 [documents], tokens of each.
    """

    def __init__(self, directory: Path, summary: dict[str, Any]):
        self.fingerprint: str = summary["fingerprint"]
        self.num_tokens: int = summary["num_tokens"]
        self._tokens = _mapped(directory / "tokens.bin", summary["token_dtype"], self.num_tokens)
        self._bits = _mapped(directory / "word_starts.bin", "|u1", -(-self.num_tokens // 8))
        self._offsets = _mapped(directory / "offsets.bin", "<i8", summary["num_documents"] + 1)
        self._sentences = _mapped(directory / "sentences.bin", "<i8", summary["num_sentences"] + 1)

    def __len__(self) -> int:
        """The number of documents; one of no tokens counts too."""
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets)

    @property
    def sentence_offsets(self) -> np.ndarray:
        """int64 [sentences + 1], where each sentence begins among the tokens of all documents; none is without tokens."""
        return self._sentences

    def first_sentences(self) -> np.ndarray:
        """int64 [documents + 1], the first sentence of each document; that of the next where a document has none."""
        return np.searchsorted(self._sentences, self._offsets)

    def length(self, index: int) -> int:
        """The number of tokens of one document."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def document(self, index: int) -> Pieces:
        """All pieces of a document."""
        return self.span(index, 0, self.length(index))

    def span(self, index: int, start: int, stop: int) -> Pieces:
        """The pieces `start` to `stop` of a document."""
        first, last = int(self._offsets[index]) + start, int(self._offsets[index]) + stop
        if not 0 <= start <= stop or last > self._offsets[index + 1]:
            raise ValueError(f"pieces {start} to {stop} of document {index} of {self.length(index)} pieces")
        return self.pieces(first, last)

    def pieces(self, first: int, last: int) -> Pieces:
        """The pieces `first` to `last`, counted through all documents."""
        if not 0 <= first <= last <= self.num_tokens:
            raise ValueError(f"pieces {first} to {last} of {self.num_tokens}")
        bits = np.unpackbits(self._bits[first // 8 : -(-last // 8)], bitorder="little")
        starts = bits[first % 8 : first % 8 + last - first].astype(bool)
        return Pieces(self._tokens[first:last].astype(np.int32), starts)


def prepare(source: Source, split: str, tokenizer: Tokenizer, directory: str | os.PathLike) -> TokenStore:
    """The store of a split in a folder below `directory`: the one that is there where source, split and tokenizer are
    the same and its content is whole, else a new one, made in one pass and in bounded memory.

    A document is a record's text, a pair's texts joined by a line feed, or a tagged sentence's words.

    Raises:
      UserError: what the source raises, or a split of which no token is left.
      WriteFailed: the disk is full, or the folder may not be written to; nothing is left of the store.
    """
    key = hashlib.sha256(
        json.dumps([FORMAT_VERSION, source.fingerprint(), split, tokenizer.fingerprint]).encode()
    ).hexdigest()
    final = Path(directory) / f"{split}-{key[:16]}"
    if final.exists():
        try:
            return open_store(final)
        except UserError as error:
            logger.warning("%s; preparing it again", error)
            shutil.rmtree(final)
    partial = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        partial.mkdir()
    try:
        with writing(final):
            _write(partial, _documents(source.records(split), tokenizer), tokenizer.vocabulary.size, f"split {split!r}")
            try:
                partial.rename(final)
            except OSError:
                if not final.exists():  # where another process was faster, its store is as good as this one
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(final)


def open_store(directory: str | os.PathLike) -> TokenStore:
    """A store that `prepare` wrote, every byte of it checked.

    Raises:
      UserError: a file is missing, cut short or changed, or the format is another; names it.
    """
    directory = Path(directory)
    summary = _read_summary(directory / SUMMARY)
    if summary.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory}: a store of format {summary.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    try:
        for name in FILES:
            _check(directory / name, summary["files"][name])
        return TokenStore(directory, summary)
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / SUMMARY}: not a store's summary: {error!r}") from error


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_SUMMARY:
            raise ValueError(f"larger than {LARGEST_SUMMARY} bytes")
        summary = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the folder is no whole store") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return summary


def _check(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{path}: {size} bytes instead of {expected['bytes']}")
    if content_hash(str(path)) != expected["sha256"]:
        raise UserError(f"{path}: its content has changed since it was written")


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    size = path.stat().st_size
    if size != np.dtype(dtype).itemsize * count:
        raise UserError(f"{path}: {size} bytes do not hold {count} values of {dtype}")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def _documents(records: Iterable[Record], tokenizer: Tokenizer) -> Iterator[list[Pieces]]:
    """Each document as its sentences."""
    held: list[list[str]] = []
    characters = 0
    for record in records:
        if "words" in record.fields:
            yield [tokenizer.encode_words(record.fields["words"])]
            continue
        text = "\n".join(record.fields[f] for f in ("text", "text_pair") if f in record.fields)
        held.append(NEXT_SENTENCE.split(text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield from _encoded(held, tokenizer)
            held, characters = [], 0
    yield from _encoded(held, tokenizer)


def _encoded(documents: list[list[str]], tokenizer: Tokenizer) -> Iterator[list[Pieces]]:
    encoded = iter(tokenizer.encode_batch([sentence for document in documents for sentence in document]))
    for document in documents:
        yield list(itertools.islice(encoded, len(document)))


def _write(directory: Path, documents: Iterable[list[Pieces]], vocabulary_size: int, what: str) -> None:
    dtype = "<u2" if vocabulary_size <= 1 << 16 else "<u4"
    num_documents = num_sentences = num_tokens = 0
    waiting = np.zeros(0, bool)  # word starts that do not fill a byte yet
    with contextlib.ExitStack() as stack:
        tokens, bits, offsets, sentences = (stack.enter_context(open(directory / name, "wb")) for name in FILES)
        offsets.write(np.int64(0).astype("<i8").tobytes())
        for document in documents:
            lengths = np.asarray([len(sentence.ids) for sentence in document], np.int64)
            begins = (num_tokens + np.cumsum(lengths) - lengths)[lengths > 0]
            num_documents += 1
            num_sentences += len(begins)
            num_tokens += int(lengths.sum())
            tokens.write(np.concatenate([sentence.ids for sentence in document]).astype(dtype).tobytes())
            sentences.write(begins.astype("<i8").tobytes())
            offsets.write(np.int64(num_tokens).astype("<i8").tobytes())
            waiting = np.concatenate([waiting, *(sentence.word_starts for sentence in document)])
            whole = len(waiting) // 8 * 8
            bits.write(np.packbits(waiting[:whole], bitorder="little").tobytes())
            waiting = waiting[whole:]
        bits.write(np.packbits(waiting, bitorder="little").tobytes())
        sentences.write(np.int64(num_tokens).astype("<i8").tobytes())
        for file in (tokens, bits, offsets, sentences):
            _flush(file)
    if not num_tokens:
        raise UserError(f"{what}: no tokens in {num_documents} documents")
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": content_hash(str(directory / name))}
        for name in FILES
    }
    summary = {
        "format_version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(json.dumps([dtype, files], sort_keys=True).encode()).hexdigest(),
        "num_documents": num_documents,
        "num_sentences": num_sentences,
        "num_tokens": num_tokens,
        "token_dtype": dtype,
        "files": files,
    }
    with open(directory / SUMMARY, "wb") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove_abandoned(final: Path) -> None:
    """Removes what killed preparations of this store left; only this host's, whose processes can be asked for."""
    prefix = f".{final.name}.{socket.gethostname()}."
    for path in final.parent.glob(prefix + "*"):
        try:
            os.kill(int(path.name.removeprefix(prefix)), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError):
            continue
