"""Chinese words by jieba, for whole-word masking (NEZHA, arXiv 1909.00204, section 3.2) and for vocabularies of words (RoFormer)."""

from __future__ import annotations

import importlib.metadata
import warnings

import numpy as np


class ChineseWords:
    """jieba's default mode over its own dictionary.

    The dictionary is read from the package (one second); jieba's usual cache, a file that anybody on the machine may
    have put into the temporary folder, is not used.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's source has invalid escapes and asks for pkg_resources
            import jieba
        self._jieba = jieba.Tokenizer()
        self._jieba.FREQ, self._jieba.total = self._jieba.gen_pfdict(self._jieba.get_dict_file())
        self._jieba.initialized = True

    @staticmethod
    def version() -> str:
        return "jieba " + importlib.metadata.version("jieba")

    def cut(self, text: str) -> list[str]:
        """The words of `text` by the dictionary alone, without the hidden Markov model for unknown ones; together they are `text`."""
        return list(self._jieba.cut(text, HMM=False))

    def word_of_character(self, text: str) -> np.ndarray:
        """For each character of `text`, the number of its word: int32 [len(text)]."""
        lengths = [len(word) for word in self._jieba.cut(text)]
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
