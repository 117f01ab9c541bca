"""Files of weights spoiled at random: each is read as a plain reader reads it, or refused with a UserError; nothing else, and quickly.

`ZOO_TEST_FUZZ_SECONDS` says how long the long test takes (300, divided by the three formats), `ZOO_TEST_FUZZ_SEED` repeats one that failed.
"""

from __future__ import annotations

import os
import random
import time
import tracemalloc

import numpy as np
import pytest

from tests.interop import mutations, plain_readers
from zoo.errors import UserError
from zoo.interop.weights import open_weights

SECONDS = float(os.environ.get("ZOO_TEST_FUZZ_SECONDS", "300"))
SLOW = 10.0  # seconds for one file of some kB, with the machine busy
MEMORY = 4 << 20  # beyond that of the file: NumPy's, zipfile's and the messages'


FORMATS = ["safetensors", "index", "torch"]


@pytest.mark.parametrize("format", FORMATS)
def test_some_spoiled_files(tmp_path, format):
    fuzz(tmp_path, format, seed=0, more=lambda number: number < 200)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_spoiled_files(tmp_path, format):
    end = time.monotonic() + SECONDS / len(FORMATS)
    seed = int(os.environ.get("ZOO_TEST_FUZZ_SEED", time.time_ns() % 10**6))
    fuzz(tmp_path, format, seed=seed, more=lambda number: time.monotonic() < end)


def fuzz(folder, format, *, seed, more):
    """Files one after another while `more(number)`; the n-th of a seed is always the same."""
    match format:
        case "safetensors":
            name, valid, knowing = "model.safetensors", mutations.safetensors_files(), mutations.header
            plain = plain_readers.safetensors_file
        case "index":
            mutations.write_shards(folder)
            name, valid, knowing = "model.safetensors.index.json", [mutations.INDEX.encode()], mutations.index
            plain = plain_readers.shards
        case "torch":
            name, valid, knowing = "pytorch_model.bin", mutations.torch_archives(), mutations.rewritten
            plain = plain_readers.torch_archive
    counts = {True: 0, False: 0}
    with open(folder / name, "wb", buffering=0) as file:
        while more(number := sum(counts.values())):
            rng = random.Random(f"{seed} {number}")
            file.seek(0)  # emptying it first, or opening it anew, takes longer than all the rest
            file.write(rng.choice((mutations.at_random, knowing, knowing))(rng, rng.choice(valid)))
            file.truncate()
            try:
                counts[read_or_refused(folder / name, plain, traced=number % 8 == 0)] += 1
            except BaseException as error:
                error.add_note(f"file {number} of ZOO_TEST_FUZZ_SEED={seed}")
                raise
    print(f"{format}, seed {seed}: {counts[True]} files read, {counts[False]} refused")
    assert counts[True] > 5 and counts[False] > 50


def read_or_refused(path, plain, *, traced):
    """Whether our reader took the file, after comparing it with what `plain` reads."""
    started = time.monotonic()
    if traced:
        tracemalloc.start()
    try:
        with open_weights(path.parent) as weights:
            found = {name: weights.read(name) for name in weights}
            assert {name: (weights.shape(name), weights.dtype(name)) for name in weights} == {
                name: (array.shape, array.dtype) for name, array in found.items()
            }
            largest = weights.nbytes
    except UserError as error:
        assert len(str(error)) < 2000
        found, largest = None, 0
    finally:
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert time.monotonic() - started < SLOW
    assert not traced or peak < largest + 2 * path.stat().st_size + MEMORY
    if found is None:
        return False
    expected = plain(path)
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_equal(found[name].tobytes(), array.tobytes())
    return True
