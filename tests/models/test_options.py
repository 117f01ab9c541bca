"""What single public checkpoints need of the one Transformer: their options together against NumPy, their parameters one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zoo.config import completed, load_saved, plain, save_config
from zoo.errors import UserError
from zoo.models import build
from zoo.models.parameters import parameter_shapes

ONE, TWO = np.split(np.random.default_rng(0).integers(0, 29, 7), [4])
# Two documents in one row, and each alone with rubbish in the padding.
IDS = np.stack([[*ONE, *TWO], [*ONE, 3, 4, 5], [*TWO, 6, 7, 8, 9]])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
# Every option at a value that is not its default. As in ModernBERT the first block's mixer takes the stream as it is.
CONFIG = {
    "model": {
        "vocab_size": 29,
        "model_dim": 8,
        "num_heads": 2,
        "num_layers": 3,
        "max_length": 7,
        "embedding_projection": True,
        "pooler_activation": "gelu",
        "pooler_norm": True,
        "pooler_bias": False,
        "arrangement": "pre_norm",
        "stddev": 0.5,
        "stages": (
            {
                "pattern": (
                    {
                        "arrangement": {"name": "pre_norm", "mixer_norm": False},
                        "convolution": {"name": "convolution", "groups": 2, "activation": "relu"},
                    },
                )
            },
            {
                "pattern": (
                    {
                        "mixer": {"name": "softmax", "biases": ("output", "query", "value")},
                        "feed_forward": {"name": "geglu", "width": 12, "up_bias": False},
                        "norm": {"name": "rmsnorm", "use_scale": False},
                    },
                    {"feed_forward": {"name": "reglu", "width": 12, "up_bias": True}},
                )
            },
        ),
    },
    "encoding": {"name": "none"},
    "mixer": {"name": "softmax"},
    "feed_forward": {"name": "silu", "width": 12},
    "norm": {"name": "layernorm", "epsilon": 1e-3},
}


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * p["scale"] + p["bias"]


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def relu(x):
    return np.maximum(0, x)


def attend(p, x):
    q, k, v = (dense(p[name], x).reshape(-1, 2, 4) for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("tnh,snh->nts", q, k) / 2)
    out = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    return dense(p["output"], out.reshape(x.shape))


def gated(p, x, activation):
    return dense(p["down"], activation(dense(p["gate"], x)) * dense(p["up"], x))


def convolve(p, x):
    """Kernel 3, two groups, zeros beyond the ends."""
    out = np.tile(p["bias"], (*x.shape[:-1], 1))
    for i in range(len(x)):
        for d in (-1, 0, 1):
            for group in (slice(0, 4), slice(4, 8)):
                if 0 <= i + d < len(x):
                    out[i, group] += x[i + d, group] @ p["kernel"][d + 1][:, group]
    return out


def by_hand(p, ids):
    """Hidden states `[T, D]` and pooled `[D]` of one document."""
    first, (second, third) = (
        jax.tree.map(lambda a: a[0], p["stage_0"]["block_0"]),
        (jax.tree.map(lambda a: a[0], p["stage_1"][name]) for name in ("block_0", "block_1")),
    )
    e = p["embeddings"]
    given = dense(
        e["projection"], layer_norm(e["norm"], e["token"]["embedding"][ids] + e["token_type"]["embedding"][0])
    )
    x = given + attend(first["mixer"], given)
    up = dense(first["feed_forward"]["up"], layer_norm(first["norm_feed_forward"], x))
    x = x + dense(first["feed_forward"]["down"], up / (1 + np.exp(-up)))
    x = layer_norm(first["norm_convolution"], x + relu(convolve(first["convolution"], given)))
    x = x + attend(second["mixer"], rms_norm(x))
    x = x + gated(second["feed_forward"], rms_norm(x), gelu)
    x = x + attend(third["mixer"], layer_norm(third["norm_mixer"], x))
    x = x + gated(third["feed_forward"], layer_norm(third["norm_feed_forward"], x), relu)
    x = layer_norm(p["final_norm"], x)
    return x, layer_norm(p["pooler_norm"], gelu(x[0] @ p["pooler"]["kernel"]))


def test_all_options_at_once_against_numpy():
    """Packed or padded, as if each document stood alone."""
    model = build(CONFIG)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    p = jax.tree.map(lambda leaf: rng.normal(scale=0.4, size=leaf.shape), shapes)
    found = jax.jit(model.apply)({"params": jax.tree.map(jnp.float32, p)}, IDS, segment_ids=SEGMENTS)

    (one, pooled_one), (two, pooled_two) = (by_hand(p, ids) for ids in (ONE, TWO))
    np.testing.assert_allclose(found.hidden[0], np.concatenate([one, two]), atol=2e-5)
    np.testing.assert_allclose(found.hidden[1, :4], one, atol=2e-5)
    np.testing.assert_allclose(found.hidden[2, :3], two, atol=2e-5)
    np.testing.assert_allclose(found.pooled, [pooled_one, pooled_one, pooled_two], atol=2e-5)

    first, second = shapes["stage_0"]["block_0"], shapes["stage_1"]["block_0"]
    assert "norm_mixer" not in first and not any(name.startswith("norm") for name in second)
    assert {name for name, part in second["mixer"].items() if "bias" in part} == {"query", "value", "output"}
    assert {name for name, part in second["feed_forward"].items() if "bias" in part} == {"down"}
    assert first["convolution"]["kernel"].shape == (1, 3, 4, 8), (
        "the layer axis, the kernel, a group's channels, all of them"
    )


@pytest.mark.parametrize("pooling", ["mean", "late"])
def test_pooling_over_the_real_tokens(pooling):
    model = build({**CONFIG, "model": {**CONFIG["model"], "pooling": pooling}})
    rng = np.random.default_rng(2)
    x, real = rng.normal(size=(2, 6, 8)), np.array([[1, 1, 2, 0, 0, 0], [1, 1, 1, 1, 1, 0]]) > 0
    p = {
        "pooler": {"kernel": rng.normal(size=(8, 8))},
        "pooler_norm": {"scale": rng.normal(size=8), "bias": np.ones(8)},
    }

    def mean(a):
        return np.stack([row[its].mean(0) for row, its in zip(a, real, strict=True)])

    def pool(a):
        return layer_norm(p["pooler_norm"], gelu(a @ p["pooler"]["kernel"]))

    found = model.apply(
        {"params": jax.tree.map(jnp.float32, p)}, jnp.float32(x), jnp.int32(real), method=lambda m, *its: m._pool(*its)
    )
    np.testing.assert_allclose(found, pool(mean(x)) if pooling == "mean" else mean(pool(x)), atol=1e-5)


def changed(**parts):
    config = {**CONFIG, "model": {**CONFIG["model"], "stages": (), "pooler_norm": False, "embedding_projection": None}}
    return {**config, **parts, "model": {**config["model"], **parts.get("model", {})}}


def test_parameters_that_options_add_and_leave_out():
    plain_model = changed(feed_forward={"name": "relu", "width": 12})

    def difference(**parts):
        one, other = (set(parameter_shapes(build(c))) for c in (plain_model, {**plain_model, **changed(**parts)}))
        return one - other, other - one

    up_and_down = {f"stage_0/block_0/feed_forward/{name}/bias" for name in ("up", "down")}
    assert difference(feed_forward={"name": "swiglu", "up_bias": False}) == (
        {"stage_0/block_0/feed_forward/up/bias"},
        {"stage_0/block_0/feed_forward/gate/kernel"},
    )
    without, more = difference(model={"use_bias": False, "pooler_bias": True})
    assert more == {"pooler/bias"} and up_and_down < without
    assert difference(mixer={"name": "softmax", "biases": ()})[0] == {
        f"stage_0/block_0/mixer/{name}/bias" for name in ("query", "key", "value", "output")
    }
    of_the_norms = {f"{name}/scale" for name in ("stage_0/block_0/norm_mixer", "stage_0/block_0/norm_feed_forward")}
    without, _ = difference(norm={"name": "rmsnorm", "use_scale": False})
    assert of_the_norms < without and "final_norm/scale" in without
    assert difference(convolution="convolution")[1] == {
        *(f"stage_0/block_0/convolution/{name}" for name in ("kernel", "bias")),
        *(f"stage_0/block_0/norm_convolution/{name}" for name in ("scale", "bias")),
    }
    assert difference(model={"embedding_projection": True})[1] == {
        f"embeddings/projection/{name}" for name in ("kernel", "bias")
    }


def test_a_config_with_all_options_comes_back(tmp_path):
    config = completed(CONFIG)
    save_config(config, tmp_path / "config.json")
    again = plain(load_saved(tmp_path / "config.json"))
    assert again == plain(config) and build(again) == build(CONFIG)
    assert again["model"]["stages"][1]["pattern"][0]["mixer"]["biases"] == ("output", "query", "value")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"pooler_activation": "gleu"}}, "pooler_activation.*'gelu'"),
        ({"model": {"embedding_dim": 4, "embedding_projection": False}}, "width 4 and the model 8"),
        ({"mixer": {"name": "softmax", "biases": ("key", "key")}}, "names a projection twice"),
        ({"mixer": {"name": "softmax", "biases": ("keys",)}}, "'biases': expected .*'key'"),
        ({"feed_forward": {"name": "gelu", "up_bias": False}}, "no argument 'up_bias'"),
        ({"convolution": {"name": "convolution", "kernel": 2}}, "kernel=2 has no middle"),
        ({"convolution": {"name": "convolution", "groups": 0}}, "groups=0 must be at least 1"),
        ({"convolution": {"name": "convolution", "groups": 3}}, "model_dim=8 is no multiple of groups=3"),
        ({"convolution": "convolution", "model": {"causal": True}}, "sees the tokens behind it"),
    ],
)
def test_refusals(parts, message):
    with pytest.raises(UserError, match=message):
        build(changed(**parts))


def test_half_precision_takes_every_option():
    """The tree is float32 whatever the dtype, and nothing on the way widens the stream."""
    model = build({**CONFIG, "model": {**CONFIG["model"], "dtype": "bfloat16", "remat": "full"}})
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    out = jax.eval_shape(model.apply, variables, IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert out.hidden.dtype == out.pooled.dtype == jnp.bfloat16
