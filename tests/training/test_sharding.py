"""Rules to shardings; and any mesh trains like one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.devices import first
from tests.training.tiny import has_layer_axis, make_batch, setup
from zoo.errors import UserError
from zoo.training import sharding
from zoo.training.rules import named_leaves


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def specs(params, mesh, **options):
    tree = sharding.parameter_shardings(shapes(params), mesh, has_layer_axis=has_layer_axis, **options)
    return {"/".join(path): leaf.spec for path, leaf in named_leaves(tree)}


def test_default_rules_cover_the_zoo():
    block = {
        "mixer": {name: {"kernel": (3, 8, 8), "bias": (3, 8)} for name in ("query", "key", "value", "output")},
        "feed_forward": {name: {"kernel": (3, 8, 8), "bias": (3, 8)} for name in ("up", "gate", "down")},
        "norm_mixer": {"scale": (3, 8), "bias": (3, 8)},
        "convolution": {"kernel": (3, 5, 4, 8), "bias": (3, 8)},
    }
    model = {
        "embeddings": {"token": {"embedding": (32, 8)}, "token_type": {"embedding": (2, 8)}, "norm": {"scale": (8,)}},
        "encodings": {"0": {"table": (33, 8)}},
        "stage_0": {"block_0": block},
        "final_norm": {"scale": (8,)},
        "pooler": {"kernel": (8, 8), "bias": (8,)},
    }
    found = specs(
        {"model": model, "heads": {"dense": {"kernel": (8, 3), "bias": (3,)}, "masked_lm": {"table": (32, 8)}}},
        sharding.make_mesh(2, 2, 2, devices=first(8)),
    )
    assert found["model/embeddings/token/embedding"] == P("tensor", "fsdp")
    assert found["model/stage_0/block_0/mixer/query/kernel"] == P(None, "fsdp", "tensor")
    assert found["model/stage_0/block_0/mixer/query/bias"] == P(None, "tensor")
    assert found["model/stage_0/block_0/mixer/output/kernel"] == P(None, "tensor", "fsdp")
    assert found["model/stage_0/block_0/mixer/output/bias"] == P(None)
    assert found["model/stage_0/block_0/feed_forward/down/kernel"] == P(None, "tensor", "fsdp")
    assert found["model/stage_0/block_0/norm_mixer/scale"] == P(None)
    assert found["model/stage_0/block_0/convolution/kernel"] == P(None, None, None, "fsdp")
    assert found["model/encodings/0/table"] == P()
    assert found["model/embeddings/token_type/embedding"] == P()
    assert found["heads/dense/kernel"] == P("fsdp", None)
    assert found["heads/dense/bias"] == P()
    assert found["heads/masked_lm/table"] == P("tensor", "fsdp")


def test_mesh_takes_the_rest():
    assert dict(sharding.make_mesh(fsdp=2, tensor=2, devices=first(8)).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "sequence": 1,
    }
    assert dict(sharding.make_mesh(1, -1, devices=first(4)).shape)["fsdp"] == 4


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (-1, -1), (0,), (-1, 3)])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(*sizes, devices=first(8))


def test_mistakes_are_named():
    mesh = sharding.make_mesh(2, 2, 2, devices=first(8))
    with pytest.raises(UserError, match=r"no sharding rule covers odd/thing, strange;"):
        specs({"odd": {"thing": (8,)}, "pooler": {"kernel": (8, 8)}, "strange": (8, 8)}, mesh)
    with pytest.raises(
        UserError, match=r"embeddings/token/embedding of shape \(33, 8\): dimension 0 \(33\).*'tensor' of size 2"
    ):
        specs({"embeddings": {"token": {"embedding": (33, 8)}}}, mesh)
    with pytest.raises(UserError, match=r"stage_0/w of shape \(2, 6\): dimension 1 \(6\).*of size 4"):
        specs({"stage_0": {"w": (2, 6)}}, mesh, rules=(("", (("data", "fsdp"),)),))
    with pytest.raises(UserError, match="more entries than w of shape"):
        specs({"w": (8,)}, mesh, rules=(("", ("data", "fsdp")),))
    with pytest.raises(UserError, match="names the axis 'model'"):
        specs({"w": (8,)}, mesh, rules=(("", ("model",)),))
    with pytest.raises(UserError, match=r"6 rows .* multiple of 4"):
        sharding.put_batch({"input_ids": np.zeros((6, 4), np.int32)}, mesh)


def curve(mesh, **options):
    tiny = setup(mesh, dropout=True, **options)
    state, losses = tiny.fresh(), []
    for i in range(6):
        state, metrics = tiny.train_step(state, tiny.put(make_batch(i)))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["update_norm"])])
    return tiny, state, np.array(losses)


@pytest.fixture(scope="module")
def one_device():
    return curve(sharding.make_mesh(devices=first(1)))


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_any_mesh_gives_the_curve_of_one_device(one_device, sizes):
    """With dropout: its bits, too, are the same on any number of devices."""
    tiny, state, losses = curve(sharding.make_mesh(*sizes, devices=first(8)))
    np.testing.assert_allclose(losses, one_device[2], rtol=2e-5)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(one_device[1].params), rtol=1e-4, atol=1e-5
    )
    kernel = state.params["stage_0"]["feed_forward"]["up"]["kernel"]
    moments = state.opt_state[1].mu["stage_0"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding == moments.sharding == tiny.shardings.params["stage_0"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8 // sizes[1], 16 // sizes[2])


def test_accumulation_on_a_mesh_gives_the_curve_of_one_device(one_device):
    """Without dropout, whose key differs between micro-batches."""
    mesh = sharding.make_mesh(2, 2, 2, devices=first(8))
    tiny, plain = setup(mesh, accumulation=2), setup()
    a, b = tiny.fresh(), plain.fresh()
    for i in range(4):
        a, m = tiny.train_step(a, tiny.put(make_batch(i)))
        b, n = plain.train_step(b, plain.put(make_batch(i)))
        assert float(m["loss"]) == pytest.approx(float(n["loss"]), rel=1e-5)
