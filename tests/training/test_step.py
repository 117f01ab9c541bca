"""One update: exact accumulation, metrics, keys, and the policies for non-finite batches."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import Tiny, initial_params, make_batch, setup
from zoo.errors import UserError
from zoo.training import optimizer, step

# SGD-like, so that a difference of gradients is a difference of parameters (Adam's first step is only a sign).
PLAIN = optimizer.AdamW(learning_rate=1.0, b1=0.0, b2=0.0, epsilon=1e3, weight_decay=0.0, clip_norm=None)


def take(tiny, steps, **changes):
    state, metrics = tiny.fresh(), []
    for i in range(steps):
        state, values = tiny.train_step(state, tiny.put(make_batch(i) | changes))
        metrics.append(jax.device_get(values))
    return state, metrics


@pytest.fixture(scope="module")
def stop():
    return setup()


@pytest.fixture(scope="module")
def accumulated():
    """For 1 and 4 micro-batches: the compiled program's text, and state and metrics after two steps."""
    ends, batch = {}, make_batch(3)
    for accumulation in (1, 4):
        tiny = setup(part=PLAIN, accumulation=accumulation)
        compiled = tiny.train_step.lower(tiny.fresh(), tiny.put(batch)).compile()
        # The schedule starts at 0: the second step moves parameters that are still equal.
        state, _ = compiled(tiny.fresh(), tiny.put(batch))
        ends[accumulation] = (compiled.as_text(), *jax.device_get(compiled(state, tiny.put(batch))))
    return ends


def test_accumulation_equals_the_big_batch(accumulated):
    weights = make_batch(3)["weights"]
    assert len({float(weights[a::4].sum()) for a in range(4)}) > 2  # micro-batches differ in weight
    (_, one, big), (_, four, small) = accumulated[1], accumulated[4]
    assert big["update_norm"] > 1e-4
    chex.assert_trees_all_close(four.params, one.params, atol=1e-6, rtol=1e-6)
    chex.assert_trees_all_close(small, big, atol=1e-6, rtol=1e-5)


def test_mean_over_micro_batches_would_be_another_loss():
    """What the exact accumulation differs from: the mean of each micro-batch's own quotient."""
    batch, module = make_batch(3), Tiny()

    @jax.jit
    def tokens(rows):
        return module.apply({"params": initial_params()}, rows, train=False).losses["tokens"]

    total, weight = tokens(batch)
    quotients = [np.divide(*tokens({name: rows[a::4] for name, rows in batch.items()})) for a in range(4)]
    assert abs(np.mean(quotients) - total / weight) > 1e-2


@pytest.mark.cpu  # by what its text calls a product
def test_the_pass_for_the_weights_does_not_run_the_network(accumulated):
    def products(text):
        return len(re.findall(r" dot\(|matmul", text))

    assert products(accumulated[1][0]) > 0
    assert products(accumulated[4][0]) == products(accumulated[1][0])


def test_one_step_is_a_function_of_seed_and_step_only():
    first, other = setup(dropout=True), setup(dropout=True, seed=8)
    batch = make_batch(0)
    state, a = first.train_step(first.fresh(), first.put(batch))
    _, b = first.train_step(first.fresh(), first.put(batch))
    _, c = other.train_step(other.fresh(), other.put(batch))
    # The first update has rate 0, so the second step sees the same parameters and batch: only the key has changed.
    _, next_step = first.train_step(state, first.put(batch))
    assert float(a["loss"]) == float(b["loss"])
    assert float(a["loss"]) != float(c["loss"])
    assert float(a["loss"]) != float(next_step["loss"])


def test_metrics(stop):
    state, metrics = take(stop, 3)
    assert int(state.step) == 3
    assert sorted(metrics[0]) == sorted(
        ["finite", "grad_norm", "learning_rate", "loss", "loss/square", "loss/tokens", "param_norm", "update_norm"]
    )
    for values in metrics:
        assert values["finite"]
        assert values["loss"] == pytest.approx(values["loss/tokens"] + 0.5 * values["loss/square"], rel=1e-6)
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], [0.0, 0.01, 0.02], rtol=1e-6)


def test_a_loss_without_targets_is_zero_and_finite(stop):
    _, (metrics,) = take(stop, 1, weights=np.zeros((16, 4), np.float32))
    assert metrics["loss/tokens"] == 0.0 and metrics["finite"] and metrics["loss/square"] > 0


def poisoned(seed):
    batch = make_batch(seed)
    batch["target"][5], batch["example_weight"][5] = np.inf, 1.0
    return batch


def test_policy_skip_leaves_the_state_and_goes_on():
    tiny = setup(nonfinite="skip")
    state, _ = take(tiny, 2)
    before = jax.device_get(state)
    state, metrics = tiny.train_step(state, tiny.put(poisoned(2)))
    assert not metrics["finite"]
    after = jax.device_get(state)
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert int(after.step) == 3 and int(after.extra["skipped"]) == 1
    state, metrics = tiny.train_step(state, tiny.put(make_batch(3)))
    assert metrics["finite"] and int(state.step) == 4 and int(state.extra["skipped"]) == 1
    # The schedule counts updates: the skipped batch did not use up a rate.
    assert float(metrics["learning_rate"]) == pytest.approx(0.02)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, before.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_policy_stop_changes_nothing_until_it_is_noticed(stop):
    state, _ = take(stop, 2)
    before = jax.device_get(state)
    for batch in (poisoned(2), make_batch(3), make_batch(4)):
        state, metrics = stop.train_step(state, stop.put(batch))
        assert not metrics["finite"]
    after = jax.device_get(state)
    chex.assert_trees_all_equal(after.replace(extra=before.extra), before)
    assert bool(after.extra["halted"]) and not bool(before.extra["halted"])


def test_evaluation_returns_sums_and_rows_in_order(stop):
    evaluate = step.make_eval_step(Tiny().apply, shardings=stop.shardings)
    params, batch = stop.fresh().params, make_batch(0)
    losses, predictions = evaluate(params, stop.put(batch))
    chex.assert_shape(predictions["best"], (16, 4))
    expected = Tiny().apply({"params": params}, batch, train=False)
    chex.assert_trees_all_close((losses, predictions), (expected.losses, expected.predictions), rtol=1e-5)


def test_mistakes_are_named():
    tiny = setup(coefficients=(("token", 1.0),))
    with pytest.raises(UserError, match=r"'token', which is none; did you mean 'tokens'"):
        tiny.train_step(tiny.fresh(), tiny.put(make_batch(0)))
    tiny = setup(accumulation=3)
    with pytest.raises(UserError, match="16 rows cannot be divided into 3"):
        tiny.train_step(tiny.fresh(), tiny.put(make_batch(0)))
    with pytest.raises(UserError, match="'stop' or 'skip'"):
        setup(nonfinite="ignore")
    with pytest.raises(UserError, match="positive number of micro-batches"):
        setup(accumulation=0)
