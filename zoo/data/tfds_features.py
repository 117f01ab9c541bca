"""What a decoded feature of TFDS becomes in a record: text, the name of a class, a number as it is spelled, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from zoo.errors import UserError, near

Read = Callable[[Any], Any]


def readers(
    features: Mapping[str, Any], columns: Mapping[str, str], language: str | None, dataset: str
) -> dict[str, Read]:
    """Field of a record → function of a decoded feature; `columns`: field → the feature's name.

    The function of a label gives None for a class that is unknown (−1); all raise ValueError for a value that cannot be read.

    Raises:
      UserError: no such feature, one of a wrong kind, or a language that it lacks; says what there is.
    """
    made = {}
    for field, column in columns.items():
        where = f"data set {dataset}: {field}={column!r}"
        if column not in features:
            raise UserError(f"{where} is not a feature; {near(column, features)}")
        if field in ("words", "tags"):
            made[field] = _sequence(features[column], where)
        elif field == "label":
            made[field] = _scalar(features[column], where)
        else:
            made[field] = _text(features[column], language, where)
    if language is not None and not any(_is_translated(features[column]) for column in columns.values()):
        raise UserError(f"data set {dataset}: language={language!r}, but none of its features read here is translated")
    return made


def _is_translated(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Translation | tfds.features.TranslationVariableLanguages)


def _text(feature: Any, language: str | None, where: str) -> Read:
    if isinstance(feature, tfds.features.Text):
        return _decoded
    if not _is_translated(feature):
        raise UserError(f"{where} is {_kind(feature)}, not text")
    known = sorted(feature.languages or ())
    if language is None:
        raise UserError(f"{where} is text in several languages; set language, one of {', '.join(known)}")
    if known and language not in known:
        raise UserError(f"{where}: no language {language!r}; {near(language, known)}")
    if isinstance(feature, tfds.features.Translation):
        return lambda value: _decoded(value[language])
    return lambda value: _in_language(value, language)


def _in_language(value: Mapping[str, Any], language: str) -> str:
    """The one text of a list of translations that is in `language`."""
    pairs = zip(value["language"], value["translation"], strict=True)
    found = [text for name, text in pairs if _decoded(name) == language]
    if len(found) != 1:
        raise ValueError(f"{len(found)} texts in the language {language!r}, where one is expected")
    return _decoded(found[0])


def _scalar(feature: Any, where: str) -> Read:
    if isinstance(feature, tfds.features.ClassLabel):
        return lambda value: None if value < 0 else feature.int2str(int(value))
    if isinstance(feature, tfds.features.Text):
        return _decoded
    if isinstance(feature, tfds.features.Scalar | tfds.features.Tensor) and feature.shape == ():
        return lambda value: _spelled(value, feature.np_dtype)
    raise UserError(f"{where} is {_kind(feature)}, not a class, a text or a number")


def _sequence(feature: Any, where: str) -> Read:
    inner = getattr(feature, "feature", None)
    if not isinstance(feature, tfds.features.Sequence) or not isinstance(
        inner, tfds.features.Text | tfds.features.ClassLabel
    ):
        raise UserError(f"{where} is {_kind(feature)}, not a sequence of texts or classes")
    read = _scalar(inner, where)

    def words(values: Any) -> tuple[str, ...]:
        found = tuple(map(read, values))
        if None in found:
            raise ValueError("a word without a class (−1)")
        return found

    return words


def _decoded(value: bytes) -> str:
    return value.decode("utf-8")


def _spelled(value: Any, dtype: Any) -> str:
    """A scalar as it is spelled in its own precision: a score of 3.8 is stored in float32, and is "3.8" again."""
    if isinstance(value, bytes):
        return _decoded(value)
    spelled = str(np.dtype(dtype).type(value))
    return spelled.lower() if np.dtype(dtype) == np.bool_ else spelled


def _kind(feature: Any) -> str:
    return type(feature).__name__
