"""LAMB and AdamW against golden steps; stacked layers against the same layers unrolled."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.errors import UserError
from zoo.training import optimizer

LAYERS = 3


def stacked(path):
    return path[0].startswith("stage_")


def one_step(transformation, params, grads):
    updates, _ = transformation.update(grads, transformation.init(params), params)
    return optax.apply_updates(params, updates)


def lamb(**options):
    options = {"decay_rules": (("", "always"),), "clip_norm": None} | options
    return optimizer.Lamb(**options).build(lambda step: 0.01, has_layer_axis=lambda path: False)


GOLDEN_X, GOLDEN_G = np.array([1.0, -2.0, 2.0], np.float32), np.array([0.1, 0.2, -0.4], np.float32)


@pytest.mark.parametrize(
    "correction, ratio, expected",
    [
        (True, 1.749378, (0.982331, -2.017144, 2.017144)),
        (False, 0.549556, (0.982572, -2.017266, 2.017267)),
    ],
)
def test_lamb_golden_step(correction, ratio, expected):
    new = one_step(lamb(bias_correction=correction), {"w": GOLDEN_X}, {"w": GOLDEN_G})["w"]
    np.testing.assert_allclose(new, expected, atol=2e-6)
    # ‖Δx‖ = η ‖x‖ exactly, so the ratio is what turns ‖u‖ into that.
    assert np.linalg.norm(new - GOLDEN_X) == pytest.approx(0.01 * 3.0, rel=1e-4)
    clipped = one_step(lamb(bias_correction=correction, ratio_clip=(0.0, ratio / 2)), {"w": GOLDEN_X}, {"w": GOLDEN_G})
    np.testing.assert_allclose(clipped["w"] - GOLDEN_X, (new - GOLDEN_X) / 2, rtol=1e-3)


def test_lamb_zero_leaf_takes_the_adam_step():
    new = one_step(lamb(), {"w": np.zeros(3, np.float32)}, {"w": GOLDEN_G})["w"]
    np.testing.assert_allclose(new, -0.01 * np.sign(GOLDEN_G), rtol=1e-4)


def test_clipping_comes_first():
    big = one_step(lamb(clip_norm=1.0, bias_correction=False), {"w": GOLDEN_X}, {"w": 1e3 * GOLDEN_G})
    same = one_step(lamb(bias_correction=False), {"w": GOLDEN_X}, {"w": GOLDEN_G / np.linalg.norm(GOLDEN_G)})
    chex.assert_trees_all_close(big, same, rtol=1e-5)


def layered_tree(rng, scale_layers=False):
    """One stack of layers of very different sizes beside an ordinary matrix."""
    sizes = np.array([0.1, 1.0, 10.0], np.float32)[:, None, None] if scale_layers else 1.0
    return {
        "embeddings": {"embedding": rng.normal(size=(5, 4)).astype(np.float32)},
        "stage_0": {
            "query": {
                "kernel": sizes * rng.normal(size=(LAYERS, 4, 4)).astype(np.float32),
                "bias": rng.normal(size=(LAYERS, 4)).astype(np.float32),
            },
            "norm_mixer": {"scale": rng.normal(size=(LAYERS, 4)).astype(np.float32)},
        },
    }


def unstack(tree):
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], tree["stage_0"]) for i in range(LAYERS)}
    return {"embeddings": tree["embeddings"], **layers}


def run(transformation, params, grads):
    state, update = transformation.init(params), jax.jit(transformation.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("part", [optimizer.Lamb(), optimizer.Lamb(bias_correction=False), optimizer.AdamW()])
def test_stacked_layers_equal_unrolled_layers(part):
    rng = np.random.default_rng(0)
    params, grads = layered_tree(rng, scale_layers=True), [layered_tree(rng) for _ in range(4)]
    schedule = optax.constant_schedule(0.05)
    scanned = run(part.build(schedule, has_layer_axis=stacked), params, grads)
    unrolled = run(
        part.build(schedule, has_layer_axis=lambda path: False), unstack(params), [unstack(g) for g in grads]
    )
    chex.assert_trees_all_close(unstack(scanned), unrolled, rtol=2e-6, atol=1e-7)


def test_plain_optax_lamb_mixes_the_layers_of_a_stack():
    rng = np.random.default_rng(0)
    params, grads = layered_tree(rng, scale_layers=True), [layered_tree(rng)]
    plain = optax.lamb(0.05, weight_decay=0.01)
    gap = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))),
        unstack(run(plain, params, grads)),
        run(plain, unstack(params), [unstack(g) for g in grads]),
    )
    assert gap["layer_0"]["query"]["kernel"] > 0.1
    assert gap["embeddings"]["embedding"] < 1e-6


def test_biases_and_norms_are_neither_decayed_nor_adapted():
    params = layered_tree(np.random.default_rng(0))
    mask = optimizer.decay_mask(optimizer.DECAY_RULES, stacked)(params)
    assert mask == {
        "embeddings": {"embedding": True},
        "stage_0": {"query": {"kernel": True, "bias": False}, "norm_mixer": {"scale": False}},
    }
    grads = jax.tree.map(np.ones_like, params)
    part = optimizer.Lamb(weight_decay=0.5, clip_norm=None)
    new = one_step(part.build(lambda step: 0.01, has_layer_axis=stacked), params, grads)
    for module, leaf in (("query", "bias"), ("norm_mixer", "scale")):
        old = params["stage_0"][module][leaf]
        np.testing.assert_allclose(new["stage_0"][module][leaf], old - 0.01, atol=1e-6)


def test_adamw_step():
    part = optimizer.registry.build({"name": "adamw", "weight_decay": 0.1, "decay_rules": [["", "always"]]})
    new = one_step(part.build(lambda step: 0.01, has_layer_axis=stacked), {"w": GOLDEN_X}, {"w": GOLDEN_G})["w"]
    np.testing.assert_allclose(new, GOLDEN_X - 0.01 * (np.sign(GOLDEN_G) + 0.1 * GOLDEN_X), rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"b1 and b2"):
        optimizer.registry.build({"name": "lamb", "b1": 1.0})
    with pytest.raises(UserError, match=r"lowest < highest"):
        optimizer.registry.build({"name": "lamb", "ratio_clip": (2.0, 1.0)})
    params = layered_tree(np.random.default_rng(0))
    with pytest.raises(UserError, match=r"covers embeddings/embedding; add a rule"):
        optimizer.decay_mask((("bias", "never"), ("norm", "never"), ("query", "always")), stacked)(params)
    with pytest.raises(UserError, match=r"not a regular expression"):
        optimizer.decay_mask((("(", "never"),), stacked)(params)
