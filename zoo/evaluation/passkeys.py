"""Passkey rows for a language model: as long as asked in its own tokenizer's tokens."""

from __future__ import annotations

import bisect
import dataclasses

from zoo.data.synthetic.passkey import Passkey
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UserError
from zoo.tasks.recall import MarkedRow, Recall


def passkey_rows(tokenizer: Tokenizer, length: int, depth: float, keys: int, seed: int = 0) -> list[MarkedRow]:
    """`keys` rows of at most `length` tokens, with as much filler as goes into the longest, the key at `depth` of it.

    Row k has the same key at every length and depth.

    Raises:
      UserError: a row without filler is longer, or the tokenizer does not know a digit.
    """
    task = Recall(max_length=length)
    least = Passkey(length=1 << 20, test_examples=keys, seed=seed, depth=depth)

    def rows(words: int) -> list:
        return list(dataclasses.replace(least, length=words).records("test"))

    def tokens(words: int) -> int:
        return max(len(tokenizer.encode_words(record.fields["words"]).ids) for record in rows(words))

    bare = tokens(least.shortest)
    if bare > length:
        raise UserError(f"a passkey without any filler has {bare} tokens, more than {length}")
    # A word is a token or more.
    words = range(least.shortest, max(length, least.shortest) + 1)
    return [
        task.example(record, tokenizer) for record in rows(words[bisect.bisect_right(words, length, key=tokens) - 1])
    ]
