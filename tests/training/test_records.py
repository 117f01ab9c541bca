"""Records are the same bytes in equal runs, also after a cut."""

import contextlib
import json
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from zoo.errors import UserError, WriteFailed
from zoo.training.plots import plot_curves
from zoo.training.records import Records, plain, read_records
from zoo.training.tensorboard import EventFile


@contextlib.contextmanager
def no_file_larger(size):
    """A disk, as it were, on which a file can have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(workdir, steps, **options):
    records = Records(workdir, tensorboard=False, **options)
    for step in steps:
        records.metrics(step, {"loss": jnp.float32(1.0 / step), "finite": np.bool_(True), "count": jnp.int32(step)})
        records.timing(step, {"seconds": step * 0.5})
    records.close()


def test_lines_are_plain_json_and_the_same_bytes_every_time(tmp_path):
    write(tmp_path / "a", range(1, 4))
    write(tmp_path / "b", range(1, 4))
    text = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert text == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert text.splitlines()[2] == b'{"step": 3, "loss": 0.33333334, "finite": true, "count": 3}'


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.1), 0.1),
        (0.1, 0.1),
        (np.float64(1 / 3), 1 / 3),
        (jnp.inf, None),
        (np.float32(np.nan), None),
        (7, 7),
    ],
)
def test_plain_numbers(value, expected):
    assert plain(value) == expected and json.dumps(plain(value))


def test_fp32_text_gives_back_the_same_fp32():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(scale=20, size=1000)).astype(np.float32)
    np.testing.assert_array_equal([np.float32(json.loads(json.dumps(plain(v)))) for v in values], values)


def test_cut_and_go_on_gives_the_unbroken_file(tmp_path):
    write(tmp_path / "whole", range(1, 7))
    broken = tmp_path / "broken"
    write(broken, range(1, 6))
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')  # a kill in the middle of a line
    records = Records(broken, tensorboard=False)
    records.cut(3)
    assert [r["step"] for r in read_records(broken / "metrics.jsonl")] == [1, 2, 3]
    assert [r["step"] for r in read_records(broken / "timing.jsonl")] == [1, 2, 3]
    write(broken, range(4, 7))
    assert (broken / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    Records(broken, tensorboard=False).cut(None)
    assert (broken / "metrics.jsonl").read_bytes() == b""


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a record"):
        Records(tmp_path).cut(1)


def test_mistakes(tmp_path):
    records = Records(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="step of its own"):
        records.metrics(1, {"step": 2})
    with pytest.raises(ValueError, match=r"array of shape \(2,\)"):
        records.metrics(1, {"loss": np.ones(2)})
    records.metrics(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="before anything is written"):
        records.cut(0)


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path, range(1, 3), primary=False)
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_report_names_the_examples(tmp_path):
    path = Records(tmp_path).report_nonfinite(
        12, np.array([3, 3]), np.array([4, 9], np.int32), {"loss": np.float32(np.nan), "grad_norm": 1.5}
    )
    assert path == tmp_path / "nonfinite_step_00000012.json"
    expected = {"step": 12, "epochs": [3, 3], "example_indices": [4, 9], "metrics": {"loss": None, "grad_norm": 1.5}}
    assert json.loads(path.read_text()) == expected


def test_tensorboard_beside_the_lines(tmp_path):
    records = Records(tmp_path)
    records.cut(3)
    records.metrics(4, {"loss": 2.0, "dev/f1": None})
    records.sync()
    records.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # a record is its length, 4 bytes of a check sum, the message, 4 bytes of another
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (4, SessionLog.START), (
        "hides what an earlier run wrote later"
    )
    assert [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value] == [(4, "loss", 2.0)]


def test_a_full_disk_is_raised_where_it_is_met(tmp_path):
    records = Records(tmp_path, tensorboard=False)
    with no_file_larger(100), pytest.raises(WriteFailed, match=r"metrics.jsonl could not be written: File too large"):
        for step in range(9):
            records.metrics(step, {"loss": 1.0})
    records.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 100
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    events = EventFile(tmp_path / "tensorboard", first_step=0)
    with no_file_larger(10_000), pytest.raises(OSError, match="File too large"):
        for step in range(500):
            events.scalars(step, {"loss": 1.0, "learning_rate": 0.1})
    with no_file_larger(10_000), pytest.raises(OSError, match="File too large"):
        events.close()
    with no_file_larger(1_000), pytest.raises(WriteFailed, match=r"loss.png could not be written"):
        write(tmp_path / "curves", range(2, 8))
        plot_curves(tmp_path / "curves")
    assert not (tmp_path / "curves" / "loss.png").exists()


def test_curves_are_drawn(tmp_path):
    records = Records(tmp_path, tensorboard=False)
    for step in range(1, 5):
        records.metrics(step, {"loss": 1.0 / step, "loss/masked": 1.0 / step, "learning_rate": 0.1})
    records.close()
    assert plot_curves(tmp_path) == (tmp_path / "loss.png",)
    records = Records(tmp_path, tensorboard=False)
    records.metrics(4, {"dev/f1": 0.5, "dev/accuracy": 0.7, "dev/loss": 0.3})
    assert plot_curves(tmp_path) == (tmp_path / "loss.png",), "one evaluation is no curve"
    records.metrics(5, {"dev/f1": 0.6, "dev/accuracy": 0.8, "dev/loss": 0.2})
    records.close()
    drawn = plot_curves(tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "scores.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
