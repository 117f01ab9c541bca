"""A feed-forward in groups is one whose matrices are block-diagonal, in value and gradient; what it refuses; where it lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import block_diag
from jax.sharding import PartitionSpec

from tests.devices import first
from zoo.encodings import Dims
from zoo.errors import UserError
from zoo.layers.block import BlockSpec
from zoo.layers.feed_forward import Gelu, registry
from zoo.mixers import Style
from zoo.models import Stage, Transformer
from zoo.models.parameters import has_layer_axis
from zoo.training.optimizer import DECAY_RULES, decay_mask
from zoo.training.sharding import make_mesh, parameter_shardings

DIMS = Dims(model_dim=6, num_heads=1, num_kv_heads=1, head_dim=6, num_layers=1, max_length=8)


def test_equals_block_diagonal_matrices():
    grouped, dense = (Gelu(width=9, groups=groups).module(DIMS, Style()) for groups in (3, 1))
    x, weights = (jax.random.normal(jax.random.key(i), (2, 4, 6)) for i in range(2))
    shapes = jax.eval_shape(grouped.init, jax.random.key(0), x)["params"]
    assert {name: leaf.shape for name, leaf in shapes["up"].items()} == {"group_kernels": (3, 2, 3), "bias": (9,)}
    assert {name: leaf.shape for name, leaf in shapes["down"].items()} == {"group_kernels": (3, 3, 2), "bias": (6,)}
    keys = iter(jax.random.split(jax.random.key(3), 4))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), shapes)

    def blocks(params):
        return {n: {"kernel": block_diag(*p["group_kernels"]), "bias": p["bias"]} for n, p in params.items()}

    def loss(module, arrange, params):
        return (module.apply({"params": arrange(params)}, x) * weights).sum()

    with jax.default_matmul_precision("highest"):
        found, expected = (
            jax.value_and_grad(loss, argnums=2)(*how, params) for how in ((grouped, lambda p: p), (dense, blocks))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_what_it_refuses():
    with pytest.raises(UserError, match="groups=0; it must be at least 1"):
        registry.build({"name": "gelu", "groups": 0})
    stages = (Stage((BlockSpec(feed_forward=Gelu(width=10, groups=4)),)),)
    with pytest.raises(UserError, match="'gelu': groups=4 does not divide model_dim=6 and width=10"):
        Transformer(vocab_size=9, dims=DIMS, stages=stages).check()


def test_rules_over_names_cover_it():
    params = {"up": {"group_kernels": jnp.zeros((1, 2, 4, 8)), "bias": jnp.zeros((1, 16))}}
    tree = {"stage_0": {"block_0": {"feed_forward": params}}}
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=first(4))
    found = parameter_shardings(tree, mesh, has_layer_axis=has_layer_axis)["stage_0"]["block_0"]["feed_forward"]["up"]
    assert found["group_kernels"].spec == PartitionSpec(None, None, "fsdp", None)
    decayed = decay_mask(DECAY_RULES, has_layer_axis)(tree)["stage_0"]["block_0"]["feed_forward"]["up"]
    assert decayed == {"group_kernels": True, "bias": False}
