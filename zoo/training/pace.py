"""How fast a run goes: what a line of timing.jsonl says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Pace:
    """Counts updates and the time they take, apart from the time for other things.

    A line holds `seconds`, the time of updates since the line before; `tokens_per_second` of these; where the peak is known
    `mfu`, model FLOPs over what the devices could have done in that time (arXiv:2204.02311, appendix B); and `goodput`, the
    share of all time since the command began that went into updates: the rest is start-up, compilation, evaluation and saving.
    `program_bytes`, what an update needs of a device's memory, where the compiler says it.
    """

    def __init__(
        self,
        *,
        began: float,
        peak: float | None = None,
        program_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`began`: when the command did, by `clock`. `peak`: FLOP/s of all devices together, None = not known."""
        self._clock, self._began, self._peak, self._program_bytes = clock, began, peak, program_bytes
        self._since = clock()
        self.tokens = 0  # since the last line
        self._trained = self._flops = self._elsewhere = 0.0

    def step(self, tokens: int, flops: float) -> None:
        """One update more."""
        self.tokens += tokens
        self._flops += flops

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """The time within the block is no update's."""
        begin = self._clock()
        try:
            yield
        finally:
            self._elsewhere += self._clock() - begin

    def line(self) -> dict[str, float]:
        """What was counted since the last call."""
        now = self._clock()
        seconds = now - self._since - self._elsewhere
        self._trained += seconds
        values = {"seconds": seconds, "tokens_per_second": self.tokens / seconds}
        if self._peak is not None:
            values["mfu"] = self._flops / seconds / self._peak
        values["goodput"] = self._trained / (now - self._began)
        if self._program_bytes is not None:
            values["program_bytes"] = self._program_bytes
        self._since, self.tokens, self._flops, self._elsewhere = now, 0, 0.0, 0.0
        return values
