"""A request to stop sets a flag and nothing else."""

import os
import signal

import pytest

from zoo.training.signals import STOPPED_EXIT_CODE, StopRequested


def test_sigterm_sets_the_flag_and_the_old_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequested() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert STOPPED_EXIT_CODE not in (0, 1, 2)


def test_a_second_interrupt_is_not_held_back():
    with StopRequested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
