"""Times and shares, by a clock that the test turns."""

import pytest

from zoo.training.pace import Pace


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_line_counts_updates_and_leaves_out_the_rest():
    clock = Clock()
    pace = Pace(began=90.0, peak=1000.0, clock=clock)
    pace.step(tokens=50, flops=600.0)
    clock.now += 2
    with pace.elsewhere():
        clock.now += 7
    pace.step(tokens=50, flops=600.0)
    clock.now += 1
    assert pace.line() == {"seconds": 3.0, "tokens_per_second": 100 / 3, "mfu": 0.4, "goodput": 3 / 20}
    pace.step(tokens=10, flops=100.0)
    clock.now += 5
    assert pace.line() == {"seconds": 5.0, "tokens_per_second": 2.0, "mfu": 0.02, "goodput": 8 / 25}


def test_what_fails_elsewhere_is_not_an_update_either():
    clock = Clock()
    pace = Pace(began=100.0, clock=clock)
    with pytest.raises(OSError), pace.elsewhere():
        clock.now += 4
        raise OSError
    clock.now += 4
    assert pace.line()["goodput"] == 0.5


def test_without_a_known_peak_there_is_no_utilisation():
    clock = Clock()
    pace = Pace(began=99.0, clock=clock)
    clock.now += 1
    assert "mfu" not in pace.line()
