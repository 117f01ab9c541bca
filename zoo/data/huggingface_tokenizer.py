"""WordPiece, whole words, and every other tokenizer of the Hugging Face `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from zoo.data.chinese_words import ChineseWords
from zoo.data.tokenizer import CHINESE_WORDS, Pieces, Tokenizer, Vocabulary, encode_in_parts
from zoo.errors import UserError

PREFIX = "##"
LONGEST_WORD = 100


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Where its model is a WordPiece, a word is a piece without `##` and the `##` pieces after it (each Chinese character
    is a word of its own, as BERT's pre-tokenizer puts spaces around it); for other models a word is what the
    pre-tokenizer cuts. With `chinese_words`, words are jieba's, and a `##` piece stays with the piece before it.
    """

    def __init__(self, library: Library, files: dict[str, bytes], *, chinese_words: bool, where: str):
        ids = library.get_vocab(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        vocabulary = Vocabulary.of(ids, (i for i, token in added.items() if token.special), where)
        if chinese_words:
            files = {**files, CHINESE_WORDS: ChineseWords.version().encode()}
        super().__init__(files, vocabulary)
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # "[MASK]" in a text is text
        self._library = library
        self._chinese_words = ChineseWords() if chinese_words else None
        self._continues = None
        if isinstance(library.model, models.WordPiece):
            self._continues = np.zeros(vocabulary.size, bool)
            for token, i in ids.items():
                self._continues[i] = token.startswith(PREFIX) and len(token) > len(PREFIX)

    def encode_batch(self, texts: Sequence[str]) -> list[Pieces]:
        return encode_in_parts(texts, self._encode)

    def _encode(self, texts: list[str]) -> list[Pieces]:
        # The fast call keeps no offsets, which Chinese words need, and no words, which a WordPiece has in its pieces.
        fast = self._continues is not None and not self._chinese_words
        call = self._library.encode_batch_fast if fast else self._library.encode_batch
        encodings = call(texts, add_special_tokens=False)
        return [self._pieces(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _pieces(self, text: str, encoding: Encoding) -> Pieces:
        ids = np.asarray(encoding.ids, np.int32)
        if self._continues is not None:
            starts = ~self._continues[ids]
        else:
            word = np.asarray([-1 if w is None else w for w in encoding.word_ids], np.int64)
            starts = np.diff(word, prepend=-2) != 0
        if self._chinese_words and len(ids):
            character = np.asarray(encoding.offsets, np.int64)[:, 0]
            word = self._chinese_words.word_of_character(text)[np.minimum(character, len(text) - 1)]
            starts &= np.diff(word, prepend=-1) != 0
        starts[:1] = True
        return Pieces(ids, starts)

    def encode_words(self, words: Sequence[str]) -> Pieces:
        encoding = self._library.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        word = np.asarray(encoding.word_ids, np.int64)
        lost = np.flatnonzero(np.bincount(word, minlength=len(words)) == 0)
        if len(lost):
            at = np.searchsorted(word, lost)
            ids, word = np.insert(ids, at, self.vocabulary.unk), np.insert(word, at, lost)
        return Pieces(ids, np.diff(word, prepend=-1) != 0)

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)


def normalizer(lowercase: bool) -> normalizers.Normalizer:
    """BERT's: control characters out, white space to spaces, spaces around Chinese characters; accents go with case."""
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )


def numbered(tokens: Sequence[str], where: str) -> dict[str, int]:
    """Token → its place in the list.

    Raises:
      UserError: a token twice or empty; the line is named.
    """
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:
            raise UserError(f"{where}:{i + 1}: an empty line; every line of a vocabulary holds one token")
        if token in ids:
            raise UserError(f"{where}:{i + 1}: the token {token!r} stands on line {ids[token] + 1} already")
        ids[token] = i
    return ids


def wordpiece(tokens: Sequence[str], *, lowercase: bool, chinese_words: bool, where: str) -> LibraryTokenizer:
    """The tokenizer of BERT and NEZHA over a list of tokens, the position of each being its id.

    Raises:
      UserError: a token twice or empty (the line is named), or one of the five special tokens missing.
    """
    ids = numbered(tokens, where)
    unk = Vocabulary.of(ids, (), where).unk
    model = models.WordPiece(
        ids,
        unk_token=tokens[unk],
        continuing_subword_prefix=PREFIX,
        max_input_chars_per_word=LONGEST_WORD,
    )
    library = Library(model)
    library.normalizer = normalizer(lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix=PREFIX)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, "tokenize_chinese_chars": True}
    files = {
        "vocab.txt": "".join(token + "\n" for token in tokens).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    return LibraryTokenizer(library, files, chinese_words=chinese_words, where=where)


def whole_words(words: Sequence[str]) -> LibraryTokenizer:
    """The tokenizer whose pieces are the given words, told apart by white space; any other word is unknown."""
    library = Library(models.WordLevel({word: i for i, word in enumerate(("[UNK]", *words))}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Beside the model's vocabulary, not in it: "[MASK]" in a text is text.
    library.add_special_tokens(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    return from_json(library.to_str().encode(), chinese_words=False, where="the learnt vocabulary")


def from_json(content: bytes, *, chinese_words: bool, where: str) -> LibraryTokenizer:
    """The tokenizer of a `tokenizer.json`. Padding and truncation fixed in it are switched off.

    Raises:
      UserError: it is not what the library can read, or one of the five special tokens is missing.
    """
    try:
        library = Library.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer.json that the tokenizers library reads: {error}") from error
    return LibraryTokenizer(library, {"tokenizer.json": content}, chinese_words=chinese_words, where=where)
