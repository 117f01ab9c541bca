"""One corpus, one cache of compiled programs and one unbroken run for all tests of faults."""

from __future__ import annotations

import pytest

from tests.faults.corpus import write_corpus
from tests.faults.process import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return Launcher(write_corpus(folder / "corpus"), folder / "compiled")


@pytest.fixture(scope="session")
def unbroken(launcher, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    code, printed = launcher.run(launcher.argv(workdir))
    assert code == 0, printed
    return workdir
