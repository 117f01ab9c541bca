"""Random keys as a pure function of seed, purpose and numbers such as the step: no key is ever part of a state."""

from __future__ import annotations

import zlib

import jax


def key_for(seed: int, purpose: str, *numbers: int | jax.Array) -> jax.Array:
    """The typed threefry key of (seed, purpose, numbers): fold_in(…fold_in(fold_in(key(seed), crc32(purpose)), numbers[0])…).

    The bits drawn from it depend neither on the number of devices nor on their mesh (partitionable threefry).
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(purpose.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
