"""The progress line, on a terminal and elsewhere."""

import io

from rich.console import Console

from zoo.training.progress import Progress


def run(terminal, interval=10.0):
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress(100, start=20, interval=interval, console=console, clock=lambda: now[0]) as progress:
        for step in range(21, 101):
            now[0] += 1.0
            progress.update(step, loss=5.0, tokens=4096)
            assert progress.tokens_per_second == 4096.0
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = run(terminal=False).splitlines()
    assert lines[0] == "train 30/100  loss 5.0000  4.1k tokens/s  left 0:01:10"
    assert lines[-1] == "train 100/100  loss 5.0000  4.1k tokens/s  left 0:00:00"
    assert len(lines) == 8


def test_a_bar_on_a_terminal():
    text = run(terminal=True)
    assert "100/100" in text and "loss 5.0000" in text and "tokens/s" in text
