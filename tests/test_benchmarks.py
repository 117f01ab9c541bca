"""Every benchmark runs at a small size and prints its table; what the figures are is nobody's business here."""

from __future__ import annotations

import json
import logging
import math
import random

import jax
import numpy as np
import pytest

from benchmarks import attention, attention_memory, path, pretraining_step, startup, toeplitz
from benchmarks import input as input_benchmark
from benchmarks.bundles import longest_loop
from benchmarks.report import table
from benchmarks.traffic import KERNELS, PRODUCTS, REST, by_kind, traffic
from benchmarks.training import Training, random_batch
from kernels.toeplitz import toeplitz_matmul
from tests.faults.corpus import WORDS, write_corpus
from zoo.errors import UserError
from zoo.tasks.masked_lm import MaskedLM


@pytest.fixture(autouse=True)
def logging_as_before():
    yield
    logging.disable(logging.NOTSET)  # the benchmarks switch off what would stand between their tables


def printed_tables(capsys):
    """The tables as lists of lines, each a dict from column to cell."""
    tables, columns = [], None
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            columns = None
        elif columns is None:
            columns = cells
            tables.append([])
        elif set("".join(cells)) != {"-", ":"} and set("".join(cells)) != {"-"}:
            tables[-1].append(dict(zip(columns, cells, strict=True)))
    return tables


def assert_numbers(rows, *names, may_lack=()):
    for row in rows:
        for name, cell in row.items():
            if name in names or (name in may_lack and not cell):
                continue
            assert math.isfinite(float(cell.replace(",", ""))), (name, row)


def test_a_table():
    assert table(("name", "n"), [("a", 1234.5), ("bc", 0.12345), ("d", "")]).splitlines() == [
        "| name |     n |",
        "| ---- | ----: |",
        "| a    | 1,234 |",
        "| bc   | 0.123 |",
        "| d    |       |",
    ]


def test_input(tmp_path, capsys):
    rng = random.Random(0)
    documents = ("".join(" ".join(rng.choices(WORDS, k=8)) + "\n" for _ in range(6)) for _ in range(30))
    (tmp_path / "corpus.txt").write_text("\n".join(documents))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("".join(token + "\n" for token in [*special, *WORDS]))
    files = [f"--corpus={tmp_path / 'corpus.txt'}", f"--vocabulary={tmp_path / 'vocab.txt'}"]
    small = ["--config.model.model_dim=16", "--config.task.max_length=32", "--config.train.batch_size=8"]
    input_benchmark.main([*files, *small, "--repeats=1", "--batches=2"])
    rows, text = printed_tables(capsys)
    assert [row["what"].rpartition(": ")[2] for row in rows[1:]] == ["masked_lm_with_sentences", "masked_lm"]
    assert rows[0]["÷ the model"] == "1" and text[0]["÷ tokenizers alone"] == "1" and len(text) == 4
    assert_numbers([*rows, *text], "what")


def test_attention_memory(capsys):
    attention_memory.main(["--length=256", "--heads=1", "--head-dim=8"])
    (rows,) = printed_tables(capsys)
    assert [row["term"] for row in rows[::2]] == ["none", "t5 (Toeplitz)", "nezha (Relative)"]
    assert_numbers(rows, "term", "pass")
    reference = [row for name, row in rows[0].items() if name.startswith("reference, T")]
    assert [float(growth) for growth in reference] == pytest.approx([4.0], rel=0.05), "[N, T, T] in fp32"


def test_toeplitz(capsys):
    toeplitz.main(["--lengths=32", "--tokens=64", "--heads=2", "--channels=2", "--causal", "--repeats=1"])
    (rows,) = printed_tables(capsys)
    assert [row["product"] for row in rows] == ["ours (xla)", "jnp.fft, plainly", "dense"]
    assert rows[0]["÷ ours"] == "1"
    assert_numbers(rows, "product")


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_fft_computes_the_same(causal):
    t, x, _ = toeplitz.Setting(2, 11, 3, 4, causal, "float32").arrays()
    expected = toeplitz_matmul(t, x, causal=causal)
    np.testing.assert_allclose(toeplitz.plain_fft(t, x, causal=causal), expected, atol=1e-5)


def test_the_longest_loop_of_a_schedule():
    """A loop of three bundles within one of six, then one of two; addresses count from 0."""
    marks = ["", "LB: >", ": >", "LB: >>", ": >>", ": >>", "PF: >", "", "LB: >", ": >", ""]
    lines = [
        f"   {i:#x} {mark if mark.startswith(('LB', 'PF')) else '   ' + (mark or ':')} {{ }}"
        for i, mark in enumerate(marks)
    ]
    assert longest_loop("header\n" + "\n".join(lines)) == 3


PROGRAM = """HloModule jit_step, is_scheduled=true

%row (rows: f32[4,8], place: s32[]) -> f32[1,8] {
  %rows = f32[4,8]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%rows, %place, %zero), dynamic_slice_sizes={1,8}
}

%put (stack: bf16[4,8], x: f32[1,8], place: s32[]) -> (bf16[4,8], f32[1,8]) {
  %stack = bf16[4,8]{1,0} parameter(0)
  %x = f32[1,8]{1,0} parameter(1)
  %place.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %narrow = bf16[1,8]{1,0} convert(%x)
  %update = bf16[4,8]{1,0} dynamic-update-slice(%stack, %narrow, %place.1, %zero.1)
  ROOT %both = (bf16[4,8]{1,0}, f32[1,8]{1,0}) tuple(%update, %x)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %all = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %slice_fusion = f32[1,8]{1,0} fusion(%all, %number), kind=kLoop, calls=%row, metadata={op_name="jit(step)/layer/slice"}
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%number, %all)
}

%condition (state.1: (s32[], f32[4,8])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (given: f32[4,8], weight: bf16[8,8], kept: bf16[4,8], at: s32[]) -> f32[4,8] {
  %given = f32[4,8]{1,0} parameter(0)
  %weight = bf16[8,8]{1,0} parameter(1)
  %kept = bf16[4,8]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %start = (s32[], f32[4,8]{1,0}) tuple(%at, %given)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %row_alone = f32[1,8]{1,0} fusion(%given, %at), kind=kLoop, calls=%row
  %put_fusion = (bf16[4,8]{1,0}, f32[1,8]{1,0}) fusion(%kept, %row_alone, %at), kind=kLoop, calls=%put
  %product = (bf16[4,8]{1,0}, s8[64]{0}) custom-call(%kept, %weight), custom_call_target="__cublas$lt$matmul"
  %attended = bf16[4,8]{1,0} custom-call(%kept, %kept), custom_call_target="mosaic_gpu_v2"
  ROOT %copy = f32[4,8]{1,0} copy(%given)
}
"""


def test_what_a_program_reads_and_writes():
    """A slice of an array is what of it is read or written, a loop's operations run as often as it turns, an operand given twice is read once."""
    found = {x.name: x for x in traffic(PROGRAM)}
    assert {name: (x.read, x.written, x.runs) for name, x in found.items()} == {
        "slice_fusion": (3 * (32 + 4), 3 * 32, 3),
        "row_alone": (32 + 4, 32, 1),
        "put_fusion": (32 + 4, 16 + 32, 1),
        "product": (64 + 128, 64 + 64, 1),
        "attended": (64, 64, 1),
        "copy": (128, 128, 1),
    }
    assert found["slice_fusion"].operation == "jit(step)/layer/slice"
    assert by_kind(list(found.values())) == {PRODUCTS: 320, KERNELS: 128, REST: 204 + 68 + 84 + 256}
    with pytest.raises(ValueError, match="ENTRY"):
        traffic("HloModule empty")


def test_startup(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    endless = ["--config.train.steps=1000000", "--config.train.evaluate_every=0", "--config.train.checkpoint_every=0"]
    startup.main([f"--config=tests/faults/tiny.py:masked_lm,folder={corpus}", *endless, "--repeats=1"])
    for rows in printed_tables(capsys):
        assert [row["start"] for row in rows] == list(startup.KINDS)
        assert rows[0]["÷ empty cache"] == "1"
        assert_numbers(rows, "start", may_lack=startup.STAGES)


def test_a_pretraining_step(tmp_path, capsys, monkeypatch):
    """A batch that does not fit is halved, a kernel that cannot run takes no other row along, and JSON has what the table has."""
    original, asked = Training.compiled, []

    def compiled(self, batch):
        asked.append(len(batch["input_ids"]))
        if asked[-1] > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return original(self, batch)

    monkeypatch.setattr(Training, "compiled", compiled)
    monkeypatch.setattr(pretraining_step, "peak_flops", lambda kind: 1e12)
    width, layers, vocabulary, rows, length, feed_forward = 16, 2, 50, 8, 32, 24
    sizes = [f"--config.model.{n}={v}" for n, v in dict(model_dim=width, num_heads=2, vocab_size=vocabulary).items()]
    sizes += [f"--config.feed_forward.width={feed_forward}", f"--length={length}", f"--tokens={4 * rows * length}"]
    times = ["--rounds=2", "--steps=2", f"--json={tmp_path / 'rows.jsonl'}"]
    code = pretraining_step.main(["--model=bert-tiny", "--implementation=pallas_tpu,default", *sizes, *times])
    printed = capsys.readouterr()
    assert code == 1 and "'pallas_tpu', layers='loop'): failed: " in printed.err
    assert asked[-3:] == [32, 16, 8] and "32 rows do not fit, trying 16" in printed.err
    (line,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert line["batch"] == rows and len(line["step_seconds"]) == 2 and line["planned_bytes"] > 0
    masked, tokens = 5, rows * length
    products = layers * (4 * width + 2 * feed_forward + 2 * length) * width * tokens
    assert line["flops"] == 6 * (products + rows * masked * (width + vocabulary) * width)
    assert line["mfu"] == pytest.approx(line["flops"] / np.median(line["step_seconds"]) / 8e12), "of eight devices"
    columns, _, row = (line for line in printed.out.splitlines() if line.startswith("|"))
    cells = dict(zip(columns.split("|"), row.split("|"), strict=True))
    assert float(cells[" step, ms "].replace(",", "")) == pytest.approx(1e3 * np.median(line["step_seconds"]), rel=1e-2)


def test_a_pretraining_step_of_nothing_known():
    for mistake in ("--model=bert-huge", "--length=1024", "--length=", "--layers=", "--tokens=64", "--rounds=0"):
        with pytest.raises(UserError):
            pretraining_step.main([mistake])


def test_documents_of_a_random_batch():
    batch = random_batch(MaskedLM(max_length=16), 50, rows=5, documents=3)
    starts = batch["positions"] == 0
    assert (starts.sum(1) == 3).all() and starts[:, 0].all()
    np.testing.assert_array_equal(np.cumsum(starts, 1), batch["segment_ids"])
    assert (np.diff(batch["positions"], axis=1)[~starts[:, 1:]] == 1).all()
    assert (np.diff(batch["masked_positions"], axis=1) > 0).all(), "no token is masked twice"


def test_attention(tmp_path, capsys):
    attention.main(
        ["--lengths=16,32", "--tokens=64", "--heads=2", "--head-dim=8", "--repeats=1", f"--json={tmp_path / 'rows'}"]
    )
    tables = printed_tables(capsys)
    rows = [row for table in tables for row in table if "cuDNN" not in row["attention"]]
    assert len(tables) == 2 and len(rows) == 16
    assert_numbers(rows, "attention")
    assert len((tmp_path / "rows").read_text().splitlines()) == 20


def test_path(capsys):
    path.main(["--lengths=16", "--tokens=32", "--heads=1", "--head-dim=8", "--repeats=1", "--compiled="])
    (rows,) = printed_tables(capsys)
    assert rows[0]["÷ attention"] == "1"
    assert [row[""] for row in rows][2:] == ["PaTH (xla)", "PaTH (xla), forget gate"]
