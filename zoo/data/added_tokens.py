"""Tokens that stand beyond the pieces of a tokenizer's model, as the files beside it say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.data.tokenizer import SPELLINGS
from zoo.errors import UserError

ADDED_TOKENS, SETTINGS = "added_tokens.json", "tokenizer_config.json"
_SPECIAL = {spelling for spellings in SPELLINGS.values() for spelling in spellings}


def added_tokens(folder: Path, pieces: Sequence[str]) -> dict[str, int]:
    """Token → id of those in `folder` that the model with these `pieces` does not have.

    `added_tokens.json` names them, or `added_tokens_decoder` in `tokenizer_config.json`. Where neither does, `vocab_type` "spm"
    (DeBERTa v2 and v3 as they were published) stands for [MASK] behind the last piece, where the source library puts it.

    Raises:
      UserError: an id that the model gives another piece, a token that text could yield, or words that are cut or written small
        before the model sees them.
    """
    settings = read_settings(folder)
    named = _named(folder, settings)
    if settings.get("vocab_type") == "spm":
        for key in ("do_lower_case", "split_by_punct"):
            if settings.get(key):
                raise UserError(
                    f"{folder / SETTINGS}: {key}=true changes the text before SentencePiece sees it, which is not done here"
                )
        if "[MASK]" not in pieces and "[MASK]" not in named:
            named["[MASK]"] = (len(pieces), True)
    added = {}
    for token, (number, special) in named.items():
        if 0 <= number < len(pieces):
            if pieces[number] != token:
                raise UserError(
                    f"{folder}: {token!r} has the id {number}, which the model gives {pieces[number]!r}: the ids of this "
                    "tokenizer are not those of its model; save it as tokenizer.json"
                )
        elif not special:
            raise UserError(
                f"{folder}: the added token {token!r} stands for text, which the model cuts without it; save it as tokenizer.json"
            )
        else:
            added[token] = number
    return added


def read_settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` in `folder` says; nothing where there is none."""
    return _read(folder / SETTINGS)


def _named(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Token → id, and whether it is a special one."""
    try:
        named = {str(token): (int(number), token in _SPECIAL) for token, number in _read(folder / ADDED_TOKENS).items()}
        for number, token in settings.get("added_tokens_decoder", {}).items():
            named[str(token["content"])] = (int(number), bool(token["special"]) or token["content"] in _SPECIAL)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: {ADDED_TOKENS} or added_tokens_decoder in {SETTINGS} is not token and id: {error!r}"
        ) from error
    return named


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object")
    return found
