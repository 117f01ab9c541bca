"""How a sentence encoder makes one vector of a text's tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from zoo.errors import UserError
from zoo.interop.json_files import read_json

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class SentenceEmbedding:
    """e = Σ_t m_t h_t / Σ_t m_t over real tokens ("mean") or h_0 ("cls"), then e / ‖e‖ with `normalize`.

    Source: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3.
    """

    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False
    max_length: int = 512

    def __call__(self, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """`hidden` `[B, T, D]`, `mask` `[B, T]` → `[B, D]`."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = mask[..., None].astype(hidden.dtype)
            pooled = (hidden * weight).sum(1) / np.maximum(weight.sum(1), 1)
        if not self.normalize:
            return pooled
        return pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)

    def save(self, directory: Path, width: int) -> None:
        """Writes modules.json and what it names, of which `sentence_embedding` makes the same again."""
        names = ("Transformer", "Pooling", "Normalize")[: 3 if self.normalize else 2]
        folders = ("", *(f"{number}_{name}" for number, name in enumerate(names) if number))
        modules = [
            {"idx": number, "name": str(number), "path": folder, "type": f"sentence_transformers.models.{name}"}
            for number, (name, folder) in enumerate(zip(names, folders, strict=True))
        ]
        pooling = {"word_embedding_dimension": width} | {key: its == self.pooling for key, its in _POOLINGS.items()}
        (directory / folders[1]).mkdir()
        for name, value in (
            ("modules.json", modules),
            (f"{folders[1]}/config.json", pooling),
            ("sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False}),
        ):
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sentence_embedding(directory: Path) -> SentenceEmbedding | None:
    """What modules.json of a sentence encoder says; None where there is no such file.

    Raises:
      UserError: a module or pooling that we do not have.
    """
    path = directory / "modules.json"
    if not path.exists():
        return None
    modules = read_json(path, list)
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else "" for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{path}: the modules {', '.join(kinds)} are not those of a sentence encoder that this zoo computes: Transformer, "
            "Pooling and, if any, Normalize"
        )
    folder = directory / _plain_name(modules[1].get("path", ""), path)
    settings = read_json(folder / "config.json", dict)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in _POOLINGS:
        raise UserError(
            f"{folder / 'config.json'}: pooling by {' and '.join(on) or 'nothing'}; one of {', '.join(_POOLINGS)} is needed"
        )
    limits = directory / "sentence_bert_config.json"
    length = read_json(limits, dict).get("max_seq_length") if limits.exists() else None
    return SentenceEmbedding(_POOLINGS[on[0]], "Normalize" in kinds, length if type(length) is int else 512)


def _plain_name(name: object, path: Path) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{path}: {name!r} is no name of a folder beside it")
    return name
