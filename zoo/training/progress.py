"""The line that a waiting person reads: loss, tokens per second, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich import progress as bars
from rich.console import Console


class Progress:
    """A bar on a terminal; elsewhere a plain line every `interval` seconds and at the end.

    >>> with Progress(1000, start=200) as progress:
    ...     progress.update(201, loss=9.5, tokens=4096)
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        title: str = "train",
        interval: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.title, self.interval = total, title, interval
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._printed = clock()
        # (time, step, tokens so far): speeds are those of the last half minute, so that a compilation is soon forgotten.
        self._window: deque[tuple[float, int, int]] = deque([(clock(), start, 0)])
        self._bar = self._make_bar() if self._console.is_terminal else None
        self._task = self._bar.add_task(title, total=total, completed=start, text="") if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the second update."""
        (begin, _, before), (end, _, after) = self._window[0], self._window[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    def update(self, step: int, *, loss: float, tokens: int) -> None:
        """Says that `step` steps are done; `tokens` is what was trained on since the last update."""
        now = self._clock()
        self._window.append((now, step, self._window[-1][2] + tokens))
        while len(self._window) > 2 and now - self._window[0][0] > 30.0:
            self._window.popleft()
        text = f"loss {loss:.4f}  {_si(self.tokens_per_second)} tokens/s  left {self._left(step)}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step >= self.total or now - self._printed >= self.interval:
            self._printed = now
            self._console.print(f"{self.title} {step}/{self.total}  {text}", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _left(self, step: int) -> str:
        (begin, first, _), (end, last, _) = self._window[0], self._window[-1]
        if last <= first or end <= begin:
            return "?"
        seconds = round((self.total - step) * (end - begin) / (last - first))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _make_bar(self) -> bars.Progress:
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
        return bars.Progress(*columns, bars.TextColumn("{task.fields[text]}"), console=self._console)


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"
