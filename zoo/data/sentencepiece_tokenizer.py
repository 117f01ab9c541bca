"""SentencePiece (arXiv 1808.06226)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from zoo.data.added_tokens import ADDED_TOKENS, added_tokens
from zoo.data.tokenizer import Pieces, Tokenizer, Vocabulary, encode_in_parts
from zoo.errors import UserError

SPACE = "\u2581"
# The trainer leaves out sentences longer than this without a word, so none longer is given to it.
LONGEST_SENTENCE = 1 << 12


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file. A word begins at a piece with the space mark and at every Chinese character.

    `folder` is what it lies in, where files beside it may say which tokens stand beyond its pieces (`zoo.data.added_tokens`).
    """

    def __init__(self, content: bytes, where: str, folder: Path | None = None):
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model: {error}") from error
        pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
        control = (i for i in range(len(pieces)) if processor.IsControl(i))
        added = {} if folder is None else added_tokens(folder, pieces)
        files = {"spiece.model": content}
        if added:
            # As DeBERTa v2 names the two.
            files = {"spm.model": content, ADDED_TOKENS: (json.dumps(added, sort_keys=True) + "\n").encode()}
        ids = {p: i for i, p in enumerate(pieces)} | added
        super().__init__(files, Vocabulary.of(ids, (*control, *added.values()), where))
        self._added = {i: token for token, i in added.items()}
        self._processor = processor
        self._starts = np.asarray([p.startswith(SPACE) or is_chinese(p[:1]) for p in pieces])

    def encode_batch(self, texts: Sequence[str]) -> list[Pieces]:
        return encode_in_parts(texts, self._encode)

    def _encode(self, texts: list[str]) -> list[Pieces]:
        encoded = []
        for found in self._processor.EncodeAsIds(texts):
            ids = np.asarray(found, np.int32)
            starts = self._starts[ids]
            starts[:1] = True
            encoded.append(Pieces(ids, starts))
        return encoded

    def encode_words(self, words: Sequence[str]) -> Pieces:
        found = [ids or [self.vocabulary.unk] for ids in self._processor.EncodeAsIds(list(words))]
        ids = np.asarray([i for of_word in found for i in of_word], np.int32)
        starts = np.zeros(len(ids), bool)
        starts[np.cumsum([0, *(len(of_word) for of_word in found)])[:-1]] = True
        return Pieces(ids, starts)

    def decode(self, ids: Sequence[int]) -> str:
        pieces = "".join(self._added.get(int(i)) or self._processor.IdToPiece(int(i)) for i in ids)
        return pieces.replace(SPACE, " ").strip()


def is_chinese(character: str) -> bool:
    """Whether a character is a CJK ideograph."""
    return "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character >= "\U00020000"


def train(
    texts: Iterable[str], *, size: int, model: Literal["unigram", "bpe"], lowercase: bool
) -> SentencePieceTokenizer:
    """A SentencePiece model learnt from `texts`, which are held in memory.

    One thread, because the sums of several are added in an order that changes. The pieces may be fewer than `size`
    where the text does not give as many.

    Raises:
      UserError: the trainer cannot make `size` pieces of the text.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=written,
            model_type=model,
            vocab_size=size,
            hard_vocab_limit=model == "bpe",
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            max_sentence_length=4 * LONGEST_SENTENCE,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"no SentencePiece model of {size} pieces can be learnt from this text: {error}") from error
    return SentencePieceTokenizer(written.getvalue(), "the trained model")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            while len(line) > LONGEST_SENTENCE:
                at = line.rfind(" ", 1, LONGEST_SENTENCE)
                at = at if at > 0 else LONGEST_SENTENCE
                yield line[:at]
                line = line[at:]
            if line:
                yield line
