"""Every command of docs/checkpoints.md, on a tiny checkpoint."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

from tests.interop import small_checkpoints

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs" / "checkpoints.md").read_text("utf-8"), re.M | re.S)


def test_every_command(tmp_path, monkeypatch, capsys):
    small_checkpoints.write(tmp_path / "my-bert")
    rows = [("good", "a fine film"), ("bad", "the plot was not good"), ("good", "the acting was fine")] * 12
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    ran = []
    for kind, text in BLOCKS:
        if kind == "python":
            if "transformers" in text and importlib.util.find_spec("transformers") is None:
                continue
            exec(compile(text, "docs/checkpoints.md", "exec"), {})
        else:
            for line in text.strip().splitlines():
                assert run(shlex.split(line)) == 0, line
        ran.append(text)
    assert sum("python " in text for text in ran) == 3
    said = capsys.readouterr().out
    assert "(1, 5, 16)" in said
    assert "exported: " in said and "heads: classification" in said


def run(words: list[str]) -> int:
    """`python train.py …` and `python -m zoo …` within this process."""
    assert words[0] == "python"
    if words[1] == "-m":
        return importlib.import_module(f"{words[2]}.__main__").main(words[3:])
    return importlib.import_module(words[1].removesuffix(".py")).main(words[2:])
