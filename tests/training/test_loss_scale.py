"""The loss scale: how it moves, and what an update does with it, on a model of four float16 products."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.devices import first
from zoo.errors import UserError
from zoo.registry import make
from zoo.training import loss_scale, schedules, sharding, step
from zoo.training.loss_scale import LARGEST, LossScale
from zoo.training.settings import RunSettings

ROWS, RATE = 8, 0.25


class Output(NamedTuple):
    losses: dict[str, Any]


def apply(variables, batch, train, rngs):
    """Σ_b w · x_b / B in float16: the gradient of each of the four w is Σ_b x_b S / B, which float16 holds or does not."""
    product = variables["params"]["w"].astype(jnp.float16) * batch["x"].astype(jnp.float16)
    rows = jnp.sum(product.astype(jnp.float32), axis=1)
    return Output({"product": (jnp.sum(rows * batch["example_weight"]), jnp.sum(batch["example_weight"]))})


class Setup(NamedTuple):
    mesh: Any
    fresh: Any
    train_step: Any

    def run(self, *xs, state=None):
        """The states and metrics after batches whose rows are all x, or the given rows."""
        state, found = self.fresh() if state is None else state, []
        for x in xs:
            state, metrics = self.train_step(state, sharding.put_batch(batch(x), self.mesh))
            found.append(jax.device_get((state, metrics)))
        return found


def batch(x) -> dict[str, np.ndarray]:
    rows = np.broadcast_to(np.asarray(x, np.float32), (ROWS,))
    return {"x": np.repeat(rows[:, None], 4, axis=1), "example_weight": np.ones(ROWS, np.float32)}


@functools.cache
def setup(initial=2.0**16, interval=3, devices=1, scaled=True, coefficient=1.0, **options) -> Setup:
    mesh = sharding.make_mesh(devices=first(devices))
    scaling = LossScale(initial, interval) if scaled else None
    schedule = schedules.Linear(warmup=0).build(RATE, 100)
    optimizer = optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(schedule))
    state = step.initial_state({"w": jnp.ones(4)}, optimizer, scaling)
    shardings = jax.tree.map(lambda leaf: sharding.replicated(mesh), state)
    train_step = step.make_train_step(
        apply,
        optimizer,
        schedule=schedule,
        coefficients={"product": coefficient},
        shardings=shardings,
        scaling=scaling,
        **options,
    )
    return Setup(mesh, lambda: jax.device_put(jax.tree.map(np.array, state), shardings), train_step)


# --- how it moves


def moves(scaling, events, extra=None):
    extra = loss_scale.fresh(scaling) if extra is None else extra
    for event in events:
        flags = jnp.bool_(event == "update"), jnp.bool_(event == "overflow")
        extra = loss_scale.moved(extra, *flags, scaling)
        yield float(extra["loss_scale"]), int(extra["clean_steps"]), int(extra["overflows"])


def test_it_doubles_after_an_interval_without_overflow_and_halves_at_each():
    events = ["update"] * 3 + ["overflow", "update", "update", "overflow", "neither", "update", "update", "update"]
    assert list(moves(LossScale(8.0, 3), events)) == [
        (8, 1, 0),
        (8, 2, 0),
        (16, 0, 0),
        (8, 0, 1),
        (8, 1, 1),
        (8, 2, 1),
        (4, 0, 2),
        (4, 0, 2),
        (4, 1, 2),
        (4, 2, 2),
        (8, 0, 2),
    ]


def test_it_stays_within_its_bounds():
    assert list(moves(LossScale(LARGEST, 1), ["update"])) == [(LARGEST, 0, 0)]
    assert [scale for scale, _, _ in moves(LossScale(2.0), ["overflow"] * 3)] == [1, 1, 1]


def test_only_float16_is_scaled():
    settings = make(RunSettings, {"steps": 1, "loss_scale": 8, "loss_scale_interval": 5}, "train")
    assert settings.scaling("float16") == LossScale(8.0, 5)
    assert settings.scaling("float32") is settings.scaling("bfloat16") is None
    assert LossScale() == RunSettings(steps=1).scaling("float16")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_scale": 1000.0}, r"power of two from 1 to 2\*\*24, not 1000"),
        ({"loss_scale": 0.5}, "power of two from 1"),
        ({"loss_scale": 2.0**25}, "power of two from 1"),
        ({"loss_scale_interval": 0}, "positive number of updates, not 0"),
    ],
    ids=str,
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        make(RunSettings, {"steps": 1, **values}, "train")


# --- what an update does with it


def test_a_gradient_too_small_for_float16_is_lost_without_a_scale_and_kept_with_one():
    """x = 2⁻²⁴ is the smallest float16; an eighth of it, a row's share in the gradient, is zero."""
    (_, without), (_, with_scale) = setup(scaled=False).run(2.0**-24)[0], setup().run(2.0**-24)[0]
    assert without["grad_norm"] == 0.0 and without["finite"]
    assert with_scale["grad_norm"] == pytest.approx(2 * 2.0**-24, rel=1e-6)  # four times 8 · 2⁻²⁴ / 8


def test_the_scale_is_in_no_number_of_the_step():
    """Loss, norms and the update are those of float32 where float16 holds everything: powers of two are exact."""
    plain, scaled = setup(scaled=False), setup(initial=2.0**10, interval=2)
    xs = (1.0, 3.0, 0.5, 2.0)
    for (one, values), (two, others) in zip(plain.run(*xs), scaled.run(*xs), strict=True):
        chex.assert_trees_all_equal((one.params, one.opt_state), (two.params, two.opt_state))
        chex.assert_trees_all_equal(values, {name: others[name] for name in values})
    assert [float(metrics["loss_scale"]) for _, metrics in scaled.run(*xs)] == [2.0**10, 2.0**10, 2.0**11, 2.0**11]


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_overflow_leaves_the_update_out_and_halves_the_scale(nonfinite):
    tiny = setup(interval=2, nonfinite=nonfinite)
    # 48 S is above 65504, float16's largest; the loss is 4 · 48.
    ((before, _), (after, metrics), (later, next_metrics)) = tiny.run(0.5, 48.0, 0.5)
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert metrics["finite"] and np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert (before.extra["loss_scale"], before.extra["clean_steps"]) == (2.0**16, 1)
    assert (after.extra["loss_scale"], after.extra["clean_steps"], after.extra["overflows"]) == (2.0**15, 0, 1)
    assert (after.step, after.extra["skipped"], after.extra["halted"]) == (2, 1, False)
    # The schedule counts updates: the batch that overflowed did not use up a rate.
    assert metrics["learning_rate"] == next_metrics["learning_rate"] == pytest.approx(RATE * 0.99)
    assert next_metrics["overflows"] == 1 and next_metrics["loss_scale"] == 2.0**15
    assert not np.array_equal(later.params["w"], after.params["w"])


def test_it_finds_the_scale_at_which_the_gradient_fits():
    found = setup(interval=100).run(*[48.0] * 12)
    scales = [float(metrics["loss_scale"]) for _, metrics in found]
    # 48 S ≤ 65504 first at S = 2¹⁰.
    assert scales == [2.0 ** max(k, 10) for k in range(16, 4, -1)]
    assert [int(state.extra["skipped"]) for state, _ in found] == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_what_no_scale_mends_is_left_to_the_policy(nonfinite):
    """An infinite gradient at the smallest scale; and, at once, a loss that is not finite: the scale comes after it."""
    stops = nonfinite == "stop"
    tiny = setup(initial=2.0, coefficient=4.0, nonfinite=nonfinite)
    ((mended, metrics), (left, left_metrics)) = tiny.run(6e4, 6e4)  # 4 · 60000 is above 65504 whatever the scale
    assert metrics["finite"] and (mended.extra["loss_scale"], mended.extra["overflows"]) == (1.0, 1)
    assert not left_metrics["finite"] and np.isfinite(left_metrics["loss"])
    assert (left.extra["loss_scale"], left.extra["overflows"], left.extra["halted"]) == (1.0, 1, stops)
    assert (left.step, left.extra["skipped"]) == ((1, 1) if stops else (2, 2))
    for bad in (np.nan, 1e5):  # 1e5 is ∞ in float16
        ((state, metrics),) = tiny.run(bad)
        assert not metrics["finite"]
        assert (state.extra["loss_scale"], state.extra["overflows"], state.extra["halted"]) == (2.0, 0, stops)


ONE_LARGE_ROW = np.where(np.arange(ROWS) == 5, 1000.0, 0.5)


@pytest.mark.parametrize("options", [{"accumulation": 4}, {"devices": 8}, {"devices": 2, "accumulation": 2}], ids=str)
def test_micro_batches_and_devices_scale_and_overflow_as_one(options):
    """One row in one micro-batch on one device is too large, and every device leaves the update out."""
    tiny, one = setup(initial=2.0**11, **options), setup(initial=2.0**11)
    state, verdicts = tiny.fresh(), []
    for expected, values in one.run(*[ONE_LARGE_ROW] * 4):
        state, metrics = tiny.train_step(state, sharding.put_batch(batch(ONE_LARGE_ROW), tiny.mesh))
        for leaf in jax.tree.leaves(state):
            shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(shards) == options.get("devices", 1) and all(np.array_equal(x, shards[0]) for x in shards)
        chex.assert_trees_all_equal(jax.device_get(state.extra), expected.extra)
        # A float16 sum in another order: half a unit of 11 bits, a few times.
        chex.assert_trees_all_close(jax.device_get(state.params), expected.params, rtol=2**-9)
        assert metrics["loss"] == pytest.approx(values["loss"], rel=1e-6)
        verdicts.append(int(state.extra["skipped"]))
    assert verdicts == [1, 2, 2, 2], "1000 S / 8 fits from S = 2⁹ on"
