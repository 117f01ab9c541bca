"""A checkpoint of another library as a folder of ours: what `--config.init_from` and `load_pretrained` take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from zoo.atomic import check_free
from zoo.config import completed, plain, save_config
from zoo.interop.load import CHECKPOINTS, CONFIG, TOKENIZER
from zoo.interop.pretrained import Pretrained
from zoo.training.checkpoints import Checkpoints


def save_run_folder(pretrained: Pretrained, path: str | os.PathLike[str]) -> Path:
    """Writes the parameters as the checkpoint of step 0, the tokenizer and the config of the model.

    Raises:
      UserError: `path` is taken.
    """
    path = Path(path)
    check_free(path)
    checkpoints = Checkpoints(path / CHECKPOINTS)
    try:
        checkpoints.save(0, {"params": pretrained.params}, {})
    finally:
        checkpoints.close()
    if pretrained.tokenizer is not None:
        pretrained.tokenizer.save(path / TOKENIZER)
    # Last: a folder with a config is whole.
    save_config(completed(ConfigDict({**plain(pretrained.config), "task": _task(pretrained)})), path / CONFIG)
    return path


def _task(pretrained: Pretrained) -> dict[str, Any]:
    """The task that the checkpoint's head is of, as far as the head decides it."""
    for head in pretrained.heads:
        if head.name == "masked_lm":
            return {"name": "masked_lm", **dict(head.settings)}
        if head.name in ("classification", "token_tagging"):
            return {"name": head.name, "labels": pretrained.labels or tuple(map(str, range(head.classes)))}
    return {"name": "masked_lm"}
