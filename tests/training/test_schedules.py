"""Learning-rate schedules against their formulas."""

import jax
import numpy as np
import pytest

from zoo.errors import UserError
from zoo.training import schedules


def values(part, steps=100, peak=2.0):
    return np.asarray(jax.jit(jax.vmap(part.build(peak, steps)))(np.arange(steps + 1)))


def test_linear_is_nezhas_corrected_start():
    curve = values(schedules.Linear(warmup=20))
    t = np.arange(101)
    np.testing.assert_allclose(curve[:21], 2.0 * t[:21] / 20, rtol=1e-6)
    np.testing.assert_allclose(curve[20:], 2.0 * (1 - t[20:] / 100) / (1 - 20 / 100), rtol=1e-5, atol=1e-7)


def test_polynomial_from_zero_drops_where_the_warmup_ends():
    curve = values(schedules.Polynomial(warmup=20, power=0.5, start="zero"))
    # The last update has t = T − 1; at T itself the root turns one rounding of 1 − t/T into 3e-4.
    np.testing.assert_allclose(curve[20:-1], 2.0 * np.sqrt(1 - np.arange(20, 100) / 100), rtol=1e-5)
    assert curve[19] == pytest.approx(1.9)
    assert curve[20] < curve[19]


def test_end_is_a_share_of_the_peak():
    for part in (schedules.Linear(end=0.1), schedules.Polynomial(end=0.1, power=2.0), schedules.Cosine(end=0.1)):
        curve = values(part)
        assert curve[0] == pytest.approx(2.0) and curve[-1] == pytest.approx(0.2)
        assert (np.diff(curve) < 0).all()


def test_cosine_is_half_way_in_the_middle():
    assert values(schedules.Cosine(warmup=20))[60] == pytest.approx(1.0)


def test_warmup_as_share_equals_warmup_in_steps():
    for kind in schedules.names():
        by_steps = schedules.registry.build({"name": kind, "warmup": 25})
        by_share = schedules.registry.build({"name": kind, "warmup": 0.25})
        np.testing.assert_array_equal(values(by_steps), values(by_share))
        assert values(by_steps)[25] == pytest.approx(2.0)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="share in"):
        schedules.registry.build({"name": "linear", "warmup": 1.5})
    with pytest.raises(UserError, match="does not end within a run of 100"):
        schedules.Linear(warmup=100).build(1.0, 100)
    with pytest.raises(UserError, match="end is the last"):
        schedules.registry.build({"name": "cosine", "end": 2.0})
    with pytest.raises(UserError, match="power"):
        schedules.registry.build({"name": "polynomial", "power": 0.0})
