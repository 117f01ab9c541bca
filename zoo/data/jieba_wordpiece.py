"""WordPiece over words that jieba cuts first: the tokenizer of RoFormer's checkpoints of Chinese words (arXiv:2104.09864, section 4.5)."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence

from tokenizers import NormalizedString, PreTokenizedString, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from zoo.data.chinese_words import ChineseWords
from zoo.data.huggingface_tokenizer import LONGEST_WORD, PREFIX, LibraryTokenizer, numbered
from zoo.data.tokenizer import Vocabulary
from zoo.errors import UserError

# What tokenizer_config.json calls it.
CLASSES = ("RoFormerTokenizer", "RoFormerTokenizerFast")
# The version of jieba, whose dictionary decides the pieces.
VERSION = "jieba.txt"


class WordsFirst:
    """Cuts a text as jieba does without its hidden Markov model; a word that the vocabulary has not is cut at every Chinese character."""

    def __init__(self, vocabulary: Container[str]):
        self._vocabulary = vocabulary
        self._words = ChineseWords()
        self._characters = normalizers.BertNormalizer(
            clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
        )

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """What the library calls."""
        text.split(self._cut)

    def _cut(self, number: int, text: NormalizedString) -> list[NormalizedString]:
        pieces, start = [], 0
        whole = str(text)
        for word in self._words.cut(whole):
            parts = [word] if word in self._vocabulary else self._characters.normalize_str(word).split()
            for part in parts:
                start = whole.index(part, start)
                pieces.append(text[start : start + len(part)])
                start += len(part)
        return pieces


def jieba_wordpiece(tokens: Sequence[str], *, lowercase: bool, chinese_words: bool, where: str) -> LibraryTokenizer:
    """The tokenizer over a list of tokens, the position of each being its id.

    As the source library has it, but for the dictionary: that is jieba's own here, and the port of it to Rust there.

    Raises:
      UserError: a token twice or empty (the line is named), or one of the five special tokens missing.
    """
    ids = numbered(tokens, where)
    unk = Vocabulary.of(ids, (), where).unk
    model = models.WordPiece(
        ids, unk_token=tokens[unk], continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
    )
    library = Library(model)
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=None, lowercase=lowercase
    )
    library.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(WordsFirst(ids))
    library.decoder = decoders.WordPiece(prefix=PREFIX)
    settings = {"tokenizer_class": CLASSES[0], "do_lower_case": lowercase}
    files = {
        "vocab.txt": "".join(token + "\n" for token in tokens).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        VERSION: ChineseWords.version().encode(),
    }
    return LibraryTokenizer(library, files, chinese_words=chinese_words, where=where)


def saved_by_the_library(content: bytes, where: str) -> tuple[list[str], bool]:
    """(tokens, lowercase) of a `tokenizer.json` that the source library wrote for this tokenizer, without the words that it cannot write.

    Raises:
      UserError: it is no JSON, or holds no WordPiece whose ids are 0 to its size.
    """
    try:
        said = json.loads(content)
        ids = {int(i): str(token) for token, i in said["model"]["vocab"].items()}
        lowercase = bool(said["normalizer"]["lowercase"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: holds no WordPiece with BERT's normalizer ({type(error).__name__}: {error})"
        ) from error
    if sorted(ids) != list(range(len(ids))):
        raise UserError(f"{where}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}")
    return [ids[i] for i in range(len(ids))], lowercase
