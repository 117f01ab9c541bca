"""`python -m zoo`: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import io
import subprocess
import sys
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import kernels.attention
from kernels.attention import xla
from zoo.__main__ import COMMANDS, main
from zoo.commands import checkpoints_page, docs, encodings_page, selfcheck
from zoo.commands.encoding_pictures import contact_sheet
from zoo.commands.list_parts import KINDS
from zoo.commands.made_blocks import with_blocks
from zoo.errors import UserError
from zoo.parts import REGISTRIES, schema

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        main(list(argv))
    return str(caught.value)


def test_a_mistake_exits_with_2_names_what_is_near_and_shows_no_traceback():
    wrong = run("-m", "zoo", "lst")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: unknown command 'lst'; did you mean 'list'")
    assert "Traceback" not in wrong.stderr


def test_help_and_mistakes_do_not_wait_for_jax():
    program = (
        "import sys\nfrom zoo.command_line import run_main\nfrom zoo.__main__ import main\n"
        "codes = [run_main(main, a) for a in (['--help'], ['lst'], ['list', 'encodin'], ['tokenizer', 'tran'], [])]\n"
        "assert codes == [0, 2, 2, 2, 2], codes\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["list", "encodin"], "unknown kind 'encodin'; did you mean 'encoding'"),
        (["list", "--kind=norm"], "unknown flag --kind"),
        (["docs", "--chek"], "unknown flag --chek; did you mean '--check'"),
        (["docs", "--folder", "no/such/folder"], "no folder no/such/folder"),
        (["tokenizer"], "no action given"),
        (["tokenizer", "tran"], "unknown action 'tran'; did you mean 'train'"),
        (["tokenizer", "train", "--files", "a.txt", "--out", "b"], "--size"),
        (["tokenizer", "show", "no/such/vocab.txt"], "no/such/vocab.txt"),
        (["selfcheck", "--fast"], "unknown flag --fast"),
    ],
)
def test_wrong_arguments(argv, expected):
    assert expected in refusal(*argv)


def test_list_shows_every_part_with_its_arguments_and_every_preset(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for key in REGISTRIES:
        for name in schema(key).names():
            assert f"\n  {name}" in shown
    words = " ".join(shown.split())
    assert "theta: float = 10000.0" in words
    assert "nezha-base 101,874,432 parameters" in words
    assert "bert-base 109,482,240 parameters" in words


def test_list_shows_one_kind(capsys):
    assert "norm" in KINDS and main(["list", "norm"]) == 0
    shown = capsys.readouterr().out
    assert "rmsnorm" in shown and "rope" not in shown


TEXT = "the quick brown fox jumps over the lazy dog\nthe dog sleeps and the fox runs quickly\n" * 20


def test_a_tokenizer_is_trained_shown_and_used(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    out = tmp_path / "vocabulary"
    assert main(["tokenizer", "train", "--files", str(file), "--size", "60", "--out", str(out)]) == 0
    assert "pieces in" in capsys.readouterr().out
    assert main(["tokenizer", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "pieces       60" in shown and "mask         4" in shown
    assert main(["tokenizer", "encode", str(out), "The foxes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:] == ["word", "the"]
    assert "word" in lines[1] and all("word" not in line for line in lines[2:])

    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "nothing was trained or overwritten" in refusal(
        *("tokenizer", "train", "--files", str(file), "--size", "50", "--out", str(out))
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_kind_of_tokenizer_is_a_part_with_arguments(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    train = ("tokenizer", "train", "--files", str(file), "--size", "45", "--out", str(tmp_path / "out"), "--kind")
    assert "lowercase: bool = True" in refusal(*train, "wordpiece:lowercas=false")
    assert "cannot be trained here, only sentencepiece or wordpiece or words" in refusal(
        *train, "tokenizer_json:path=a"
    )
    assert not (tmp_path / "out").exists()
    assert main([*train, "sentencepiece:model=bpe"]) == 0
    assert list((tmp_path / "out").glob("*.model"))


@pytest.fixture
def few_cases(monkeypatch):
    all_cases, other_cases = selfcheck.cases, selfcheck.other_cases

    def few():
        small = all_cases(length=12, width=4)
        return {name: small[name] for name in ("causal, window, segments", "Relative, value")}

    monkeypatch.setattr(selfcheck, "cases", few)
    monkeypatch.setattr(selfcheck, "other_cases", lambda: other_cases(length=6, width=4))


def test_selfcheck_compares_what_exists_and_says_what_does_not(few_cases, capsys):
    assert main(["selfcheck"]) == 0
    shown = capsys.readouterr().out
    assert "jax  " in shown and "devices" in shown and "all agree" in shown
    rows = [line for line in shown.splitlines() if " xla " in line]
    assert len(rows) == 5 and rows[2].startswith("PaTH") and rows[3].startswith("Toeplitz product")
    for row in rows:
        forward, gradients = map(float, row.split()[-2:])
        assert 0 <= forward <= selfcheck.TOLERANCE and 0 <= gradients <= selfcheck.TOLERANCE


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_selfcheck_fails_on_a_wrong_implementation(few_cases, monkeypatch, capsys, factor):
    right = xla.attention
    monkeypatch.setattr(xla, "attention", lambda *a, **k: right(*a, **k) * jnp.float32(factor))
    assert main(["selfcheck"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("WRONG") == 2 and "2 disagree" in shown


def test_selfcheck_covers_every_kind_of_term():
    covered = {type(term) for _, terms, _ in selfcheck.cases(length=12, width=4).values() for term in terms}
    assert covered == set(typing.get_args(kernels.attention.Term))


def test_the_tables_made_from_the_code_are_not_stale(capsys):
    assert main(["docs", "--check", "--folder", str(ROOT / "docs")]) == 0, capsys.readouterr().out


def test_stale_tables_are_named_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(docs, "TABLES", {"compatibility.md": docs.compatibility})
    for module in (encodings_page, checkpoints_page):
        monkeypatch.setattr(module, "page", lambda folder: "")
    path = tmp_path / "compatibility.md"
    assert main(["docs", "--folder", str(tmp_path)]) == 0
    text = path.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    nezha = dict(zip(rows[0], next(row for row in rows if row[0] == "`nezha`"), strict=True))
    number = nezha["`fourier`"].removeprefix("no (").removesuffix(")")
    assert nezha["`softmax`"] == "bidirectional, causal"
    assert (
        f"\n{number}. position encoding 'nezha' cannot be used with mixer 'fourier': 'nezha' brings 'relative'" in text
    )
    path.write_text(path.read_text(encoding="utf-8").replace("bidirectional", "no"), encoding="utf-8")
    written = path.read_bytes()
    capsys.readouterr()
    assert main(["docs", "--check", "--folder", str(tmp_path)]) == 1
    assert f"{path} is stale" in capsys.readouterr().out and path.read_bytes() == written
    assert main(["docs", "--folder", str(tmp_path)]) == 0
    assert main(["docs", "--check", "--folder", str(tmp_path)]) == 0


def test_a_page_keeps_what_is_written_between_its_made_parts(tmp_path):
    page = "# Title\n<!-- list: made by `make docs` -->\nold\n<!-- list: end -->\nwritten\n"
    says = {"by": "`make docs`", "where": "page.md"}
    made = with_blocks(page, {"list": "\nnew\n\n"}, **says)
    assert made == "# Title\n<!-- list: made by `make docs` -->\n\nnew\n\n<!-- list: end -->\nwritten\n"
    assert with_blocks(made, {"list": "\nnew\n\n"}, **says) == made
    with pytest.raises(UserError, match=r"page\.md has no lines"):
        with_blocks(page, {"table": "new"}, **says)
    with pytest.raises(UserError, match="no page"):
        encodings_page.page(tmp_path)


@pytest.mark.slow
def test_the_picture_of_the_encodings_is_not_stale():
    """Compared by eye's measure: another processor draws the same picture up to a shade."""
    there, now = (imread(picture) for picture in (ROOT / "docs" / encodings_page.PICTURE, io.BytesIO(contact_sheet())))
    assert there.shape == now.shape
    assert np.abs(there - now).mean() < 1e-3
