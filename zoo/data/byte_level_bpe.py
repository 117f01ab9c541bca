"""Byte-level BPE as GPT-2 files it: `vocab.json` and `merges.txt` (RoBERTa, BART, DeBERTa v1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from zoo.data.added_tokens import ADDED_TOKENS, SETTINGS, added_tokens, read_settings
from zoo.data.huggingface_tokenizer import LibraryTokenizer
from zoo.data.tokenizer import SPELLINGS
from zoo.errors import UserError

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def byte_level_bpe(folder: Path, *, chinese_words: bool) -> LibraryTokenizer:
    """The tokenizer in a folder with `vocab.json` and `merges.txt`, as the source library makes it of them.

    A text is cut by GPT-2's expression (Radford et al. 2019); with `add_prefix_space` in `tokenizer_config.json` a space is put
    before it.

    Raises:
      UserError: a file that is missing or not what its name says, or one of the five special tokens missing.
    """
    contents = {}
    for name in (VOCABULARY, MERGES):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; a byte-level BPE is {VOCABULARY} and {MERGES}")
        contents[name] = (folder / name).read_bytes()
    ids = _ids(contents[VOCABULARY], folder / VOCABULARY)
    prefix = bool(read_settings(folder).get("add_prefix_space", False))
    added = added_tokens(folder, sorted(ids, key=ids.__getitem__))
    library = _library(ids, contents[MERGES], prefix, folder / MERGES)
    library.add_special_tokens([token for spellings in SPELLINGS.values() for token in spellings if token in ids])
    library.add_special_tokens(sorted(added, key=added.__getitem__))
    for token, number in added.items():
        if library.token_to_id(token) != number:
            raise UserError(
                f"{folder}: {token!r} has the id {number}, which is not the next after those of {VOCABULARY}"
            )
    contents[SETTINGS] = (json.dumps({"add_prefix_space": prefix}) + "\n").encode()
    if added:
        contents[ADDED_TOKENS] = (json.dumps(added, sort_keys=True) + "\n").encode()
    return LibraryTokenizer(library, contents, chinese_words=chinese_words, where=str(folder))


def _ids(content: bytes, where: Path) -> dict[str, int]:
    try:
        ids: Any = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(ids, dict) or sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
        raise UserError(f"{where}: not tokens with the ids from 0 on, each once")
    return ids


def _library(ids: dict[str, int], content: bytes, prefix: bool, where: Path) -> Library:
    try:
        lines = [line for line in content.decode("utf-8").split("\n") if line and not line.startswith("#version")]
        merges = [tuple(line.removesuffix("\r").split(" ")) for line in lines]
        library = Library(models.BPE(ids, merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a pair of pieces a line, of those in {VOCABULARY}: {error}") from error
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    return library
