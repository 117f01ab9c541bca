"""Whatever does not fit is refused before anything is computed, by name and with what would be right."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from kernels.attention import (
    AttentionMask,
    Clip,
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Positions,
    Relative,
    RowColumn,
    Table,
    Toeplitz,
    attention,
)


@pytest.fixture(autouse=True)
def our_own_checks():
    """What a user meets: shape annotations are checked under pytest only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def ones(*shape):
    return jnp.ones(shape)


ids = jnp.ones((2, 5), jnp.int32)
line = PiecewiseLinear(ones(9), ones(2, 5), ones(3), ones(4, 2), ones(4, 2))

REFUSED = {
    "q has shape .* four axes": {"q": ones(5, 4, 8)},
    r"k has shape .*expected \[2, S, K, 8\]": {"k": ones(2, 5, 2, 6)},
    r"v has shape .*expected \[2, 5, 2, any width\]": {"v": ones(2, 4, 2, 8)},
    "must be a multiple": {"k": ones(2, 5, 3, 8), "v": ones(2, 5, 3, 8)},
    "k is bfloat16 and q is float32": {"k": ones(2, 5, 2, 8).astype(jnp.bfloat16)},
    "q is int32, expected a floating": {"q": jnp.ones((2, 5, 4, 8), jnp.int32)},
    "expected a tuple of terms": {"terms": [Toeplitz(ones(4, 3))]},
    "terms holds a Clip": {"terms": (Clip(3),)},
    r"Toeplitz.values .*expected \[4, any size\]": {"terms": (Toeplitz(ones(3, 9)),)},
    "Toeplitz.values is int32": {"terms": (Toeplitz(jnp.ones((4, 9), jnp.int32)),)},
    "Toeplitz.zero is 1.5": {"terms": (Toeplitz(ones(4, 9), zero=1.5),)},
    r"Multiply.values .*expected \[4, any size, 8\]": {"terms": (Multiply(ones(4, 9, 3)),)},
    "Relative has no table": {"terms": (Relative(),)},
    r"Relative.key has a table of shape .*\[7, 1 or 2 or 4, 8\]": {
        "terms": (Relative(key=Table(ones(7, 3, 8), Clip(3))),)
    },
    "table of 9 rows, but .* points into 7": {"terms": (Relative(query=Table(ones(9, 1, 8), Clip(3))),)},
    r"Relative.value has a table of shape .*1 or 2 or 4, 8\]": {
        "terms": (Relative(value=Table(ones(7, 1, 6), Clip(3))),)
    },
    "Relative.query is .* expected a Table": {"terms": (Relative(query=ones(7, 1, 8)),)},
    r"RowColumn.b .*expected \[2, 4, 5\]": {"terms": (RowColumn(ones(2, 4, 5), ones(2, 4, 6)),)},
    r"PiecewiseLinear.slopes .*expected \[4, 3\]": {"terms": (line,)},
    r"Pairwise.fn gives shape .*expected \[4, 2, 3\]": {
        "terms": (Pairwise(ones(3), lambda p, i, j: p[:, None, None] * (j - i)[None].astype(p.dtype)),)
    },
    r"Dense.bias .*\[1 or 2, 1 or 4, 5, 5\]": {"terms": (Dense(ones(1, 1, 5, 6)),)},
    "mask is ArrayImpl, expected an AttentionMask": {"mask": ones(2, 5, 5)},
    "query_segments or key_segments alone": {"mask": AttentionMask(query_segments=ids)},
    r"key_valid has shape .*expected \[2, 5\]": {"mask": AttentionMask(key_valid=jnp.ones((2, 4), bool))},
    "key_valid is int32, expected bool": {"mask": AttentionMask(key_valid=ids)},
    "window is .*both 0 or more": {"mask": AttentionMask(window=(-1, 2))},
    "block is 0": {"mask": AttentionMask(block=0)},
    "prefix_length needs causal": {"mask": AttentionMask(prefix_length=jnp.ones(2, jnp.int32))},
    r"positions of the keys .*expected \[B or 1, 5\]": {"positions": (Positions.arange(5), Positions.arange(4))},
    r"positions of the queries are float32": {"positions": Positions(ones(1, 5))},
    "batch of 3, expected 1 or 2": {"positions": Positions(jnp.ones((3, 5), jnp.int32))},
    "expected a scalar": {"scale": ones(4)},
    "dropout rate is 1": {"dropout": (1.0, jax.random.key(0))},
    "'fast': there is no such implementation; those that exist: reference, xla, pallas_tpu, pallas_gpu": {
        "implementation": "fast"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    call = {"q": ones(2, 5, 4, 8), "k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 8)} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_one_struct_for_unequal_lengths_names_the_pair():
    with pytest.raises(ValueError, match="give a pair"):
        attention(ones(2, 3, 4, 8), ones(2, 5, 2, 8), ones(2, 5, 2, 8), positions=Positions.arange(5))


def test_shapes_are_annotated():
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(jaxtyping.TypeCheckError, match="'B S K H'"):
        attention(ones(2, 5, 4, 8), ones(2, 5, 2, 6), ones(2, 5, 2, 8))
