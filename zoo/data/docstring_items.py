"""Prose, and two labelled tasks, cut from docstrings.

* `parameter_names` (token tagging): the words of a function's first two prose paragraphs; a word is tagged when it is
  the name of a parameter in that function's signature.
* `parameter_types` (six classes): one entry `name : description` of a numpydoc parameter list, its type taken out and
  used as the label.

Both were chosen because pretraining on the text helps them; nothing in them was labelled by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from zoo.data.docstrings import Docstring

TYPES = ("array", "bool", "callable", "float", "int", "str")
RUN = 8  # words; an item half of whose runs stand in the training text is no test
TAGGED_WORDS = 40
DESCRIBING_WORDS = 60

_ARTICLES = frozenset({"a", "A", "I"})
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ "
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_MARKUP = re.compile(r"[`*\"]|(?<!\w)'|'(?!\w)|:\w+:(?=`)")
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_SECTION = re.compile(r"^(?:Other )?Parameters\n-{3,}\n", re.MULTILINE)
_HEADING = re.compile(r"^.*\n-{3,}$", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*[-=~^*+]{3,}[ \t]*$", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+(?:, \w+)*) ?: ?(\S.*)$")
_NOT_THE_TYPE = re.compile(r",? *\(?\b(?:optional|default)\b.*$|\bor none\b|\bnone or\b|\| *none\b")
_TYPE_PATTERNS = {
    "array": re.compile(r"(?:.* )?`?(?:numpy\.|np\.)?(?:array_like|array-like|ndarray|array)`?(?:,? .*)?"),
    "bool": re.compile(r"bool(?:ean)?|\{true, ?false\}|\{false, ?true\}"),
    "callable": re.compile(r"(?:callable|function)(?:,? .*)?"),
    "float": re.compile(r"(?:positive |scalar )?float(?: scalar)?"),
    "int": re.compile(r"(?:positive |non-negative )?int(?:eger)?"),
    "str": re.compile(r"str(?:ing)?(?: \{.*\})?|\{('[^']*'|\"[^\"]*\")(, ?('[^']*'|\"[^\"]*\"))*\}"),
}
_SEVERAL = re.compile(r"\bor\b|\btuple\b|\blist\b|\bsequence\b|\bdict\b|\{(?!true|false|['\"])|\btree\b|\|")


@dataclasses.dataclass(frozen=True)
class Item:
    """A labelled example: `words` with `tags`, or `text` with `label`; its place as in the docstring it is cut from."""

    fields: dict[str, object]
    file: str
    line: int

    @property
    def text(self) -> str:
        return self.fields["text"] if "text" in self.fields else " ".join(self.fields["words"])


def split_of(module: str) -> str:
    """ "train", "dev" or "test", by a hash of the module's name: a fifth is held out, a quarter of that as "dev"."""
    value = rank("split", module)
    if value % 5:
        return "train"
    return "test" if (value // 5) % 4 else "dev"


def rank(*parts: object) -> int:
    """A number drawn by hash: the same in every process, on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"zoo.builtin.1").digest(), "big")


def prose(docstring: str) -> list[str]:
    """The paragraphs of prose: four words or more, four fifths letters and blanks, no doctest.

    White space is normalised; lines that only underline a heading are left out.
    """
    kept = []
    for block in _BLANK_LINE.split(_RULE.sub("", docstring)):
        if ">>>" in block:
            continue
        words = block.split()
        paragraph = " ".join(words)
        content = paragraph.encode()
        if len(words) >= 4 and 5 * len(content.translate(None, delete=_LETTERS)) <= len(content):
            kept.append(paragraph)
    return kept


def parameter_names(docstring: Docstring) -> Item | None:
    """The first `TAGGED_WORDS` words of its first two prose paragraphs, quote marks removed; None where none is named.

    A function with a parameter called like an English one-letter word is left out: its tags would be wrong.
    """
    names = set(docstring.parameters)
    if not names or names & _ARTICLES:
        return None
    words = _WORD.findall(_MARKUP.sub("", " ".join(prose(docstring.text)[:2])))[:TAGGED_WORDS]
    tags = tuple("B-PARAM" if word in names else "O" for word in words)
    if "B-PARAM" not in tags or len(words) < RUN:
        return None
    return Item({"words": tuple(words), "tags": tags}, docstring.file, docstring.line)


def parameter_types(docstring: Docstring) -> Iterator[Item]:
    """Every parameter of a numpydoc list whose type is clearly one of `TYPES`, described in four words or more."""
    for start in _SECTION.finditer(docstring.text):
        section = docstring.text[start.end() :]
        end = _HEADING.search(section)
        for name, spelled, description in _entries(section[: end.start()] if end else section):
            label = _type(spelled)
            if label and len(description) >= 4:
                text = f"{name} : {' '.join(description[:DESCRIBING_WORDS])}"
                yield Item({"text": text, "label": label}, docstring.file, docstring.line)


def _entries(section: str) -> Iterator[tuple[str, str, list[str]]]:
    """(name, type as spelled, words of the description) of each entry: a line `name : type`, then indented lines."""
    entry, description = None, []
    for line in [*section.split("\n"), None]:
        if line is not None and (not line.strip() or line[0] == " "):
            description += line.split()
            continue
        if entry:
            yield entry[1], entry[2], description
        entry, description = line and _ENTRY.match(line), []


def _type(spelled: str) -> str | None:
    head = _NOT_THE_TYPE.sub("", spelled.lower()).strip(" ,.")
    if _SEVERAL.search(head):
        return None
    return next((name for name, pattern in _TYPE_PATTERNS.items() if pattern.fullmatch(head)), None)


class Runs:
    """The set of all runs of `RUN` words in some texts, each as a 64-bit number (polynomial hash of word numbers)."""

    _BASE = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, texts: Iterable[str]):
        self._words: dict[str, int] = {}
        numbers: list[int] = []
        for text in texts:
            numbers += [self._words.setdefault(w, len(self._words) + 1) for w in _normalised(text)]
            numbers += [0] * RUN  # no run crosses a text's end; the few with zeros in them match nothing
        self._seen = np.unique(self._hash(numbers))

    def overlap(self, text: str) -> float:
        """The share of this text's runs that are in the set; 1 for a text shorter than a run, which cannot be checked."""
        numbers = [self._words.get(w, -1) for w in _normalised(text)]
        if len(numbers) < RUN:
            return 1.0
        hashes = self._hash(numbers)
        at = np.minimum(np.searchsorted(self._seen, hashes), max(len(self._seen) - 1, 0))
        return float(np.mean(self._seen[at] == hashes)) if len(self._seen) else 0.0

    def _hash(self, numbers: Sequence[int]) -> np.ndarray:
        values = np.asarray(numbers, np.int64).astype(np.uint64)
        values = (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        values ^= values >> np.uint64(32)
        count = max(len(values) - RUN + 1, 0)
        result = np.zeros(count, np.uint64)
        for k in range(RUN):
            result = result * self._BASE + values[k : k + count]
        return result


def _normalised(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
