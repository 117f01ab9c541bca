"""Learning a WordPiece vocabulary by rule, so that the same texts give the same bytes.

The trainer of the `tokenizers` library breaks ties by the order of a hash table that is seeded anew at every call:
four trainings on the same text give four numberings and now and then other pieces. This one counts the same things
and merges by the same rule, the most frequent pair of neighbours first (byte-pair merges over `##` pieces, as there),
and breaks ties by the ids of the pair. Characters are numbered in sorted order and merged pieces in the order of
merging, so ids, and with them everything, depend on the counts of words alone, not even on the order of the texts.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import pre_tokenizers

from zoo.data.huggingface_tokenizer import LONGEST_WORD, PREFIX, normalizer
from zoo.errors import UserError

logger = logging.getLogger(__name__)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Longer runs without a space (Chinese sentences) hardly ever repeat: counting them would hold the whole text.
LONGEST_COUNTED = 32
MAX_SIZE = 1 << 20


def learn(
    texts: Iterable[str], *, size: int, lowercase: bool, limit_alphabet: int, min_frequency: int = 2
) -> list[str]:
    """The vocabulary in the order of ids: special tokens, characters, then merged pieces in the order of merging.

    Memory grows with the number of distinct words, not with the text. Fewer than `size` pieces come back where no pair
    occurs `min_frequency` times any more. Words with a character outside the `limit_alphabet` most frequent ones do
    not count: they will be unknown.

    Raises:
      UserError: no words in the texts, or `size` too small to hold the characters.
    """
    if not 0 < size < MAX_SIZE:
        raise UserError(f"a vocabulary of {size} pieces: expected 1 to {MAX_SIZE - 1}")
    words = count_words(texts, lowercase=lowercase)
    if not words:
        raise UserError("there are no words in the training text of the tokenizer")
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    kept = sorted(characters, key=lambda c: (-characters[c], c))[:limit_alphabet]
    alphabet = set(kept)
    usable = [(word, count) for word, count in words.items() if alphabet.issuperset(word)]
    inner = {character for word, _ in usable for character in word[1:]}
    pieces = [*SPECIAL, *sorted(kept), *(PREFIX + c for c in sorted(inner))]
    if len(pieces) > size:
        raise UserError(
            f"a vocabulary of {size} pieces cannot hold {len(pieces)} special tokens and characters; "
            "raise size or lower limit_alphabet"
        )
    _merge(pieces, usable, size, min_frequency)
    if len(pieces) < size:
        logger.warning("the text gives a vocabulary of %d pieces, not %d", len(pieces), size)
    return pieces


def count_words(texts: Iterable[str], *, lowercase: bool) -> Counter[str]:
    """Word → how often it occurs, after BERT's normalisation and pre-tokenization; words too long to encode left out."""
    normalize, cut = normalizer(lowercase).normalize_str, pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    chunks: Counter[str] = Counter()
    words: Counter[str] = Counter()

    def add(chunk: str, count: int) -> None:
        for word, _ in cut(normalize(chunk)):
            if len(word) <= LONGEST_WORD:
                words[word] += count

    for text in texts:
        for chunk in text.replace("\n", " ").replace("\t", " ").replace("\r", " ").split(" "):
            if len(chunk) > LONGEST_COUNTED:
                add(chunk, 1)
            elif chunk:
                chunks[chunk] += 1
    for chunk, count in chunks.items():
        add(chunk, count)
    return words


def _merge(pieces: list[str], words: list[tuple[str, int]], size: int, min_frequency: int) -> None:
    """Appends merged pieces to `pieces` until there are `size`."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    counts = [count for _, count in words]
    split = [[ids[word[0]], *(ids[PREFIX + c] for c in word[1:])] for word, _ in words]
    pairs: dict[tuple[int, int], int] = {}
    where: dict[tuple[int, int], set[int]] = {}
    for w, symbols in enumerate(split):
        for pair in pairwise(symbols):
            pairs[pair] = pairs.get(pair, 0) + counts[w]
            where.setdefault(pair, set()).add(w)
    # The heap may hold counts that have sunk since; such an entry goes back with its present count when it comes up.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(pieces) < size and heap:
        negative, pair = heapq.heappop(heap)
        count = pairs.get(pair, 0)
        if count != -negative:
            if count >= min_frequency:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < min_frequency:
            break
        piece = pieces[pair[0]] + pieces[pair[1]].removeprefix(PREFIX)
        if piece not in ids:  # ##a ##bc and ##ab ##c are one piece
            ids[piece] = len(pieces)
            pieces.append(piece)
        for risen in _replace(pair, ids[piece], split, counts, pairs, where):
            heapq.heappush(heap, (-pairs[risen], risen))


def _replace(
    pair: tuple[int, int],
    merged: int,
    split: list[list[int]],
    counts: list[int],
    pairs: dict[tuple[int, int], int],
    where: dict[tuple[int, int], set[int]],
) -> set[tuple[int, int]]:
    """Puts `merged` for `pair` in every word that has it, keeps `pairs` and `where`; the pairs whose count may rise."""
    risen = set()
    for w in where[pair]:
        symbols, count = split[w], counts[w]
        for old in pairwise(symbols):
            pairs[old] -= count
        new, k = [], 0
        while k < len(symbols):
            if k + 1 < len(symbols) and (symbols[k], symbols[k + 1]) == pair:
                new.append(merged)
                k += 2
            else:
                new.append(symbols[k])
                k += 1
        split[w] = new
        for now in pairwise(new):
            pairs[now] = pairs.get(now, 0) + count
            if merged in now:
                where.setdefault(now, set()).add(w)
                risen.add(now)
    del where[pair], pairs[pair]
    return risen
