"""A module as small as the trainer can be tested with: token ids in, two losses of unequal weights out."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.devices import first
from zoo.training import optimizer, schedules, sharding, step

VOCABULARY, WIDTH, LENGTH = 16, 8, 4


class Output(NamedTuple):
    losses: dict[str, Any]
    predictions: dict[str, Any]


class Embeddings(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Embed(VOCABULARY, WIDTH, name="token")(ids)


class Block(nn.Module):
    dropout: bool = False

    @nn.compact
    def __call__(self, x, train):
        h = nn.gelu(nn.Dense(2 * WIDTH, name="up")(x))
        h = nn.Dropout(0.5, deterministic=not train)(h) if self.dropout else h
        return nn.LayerNorm(name="norm_output")(x + nn.Dense(WIDTH, name="down")(h))


class Layers(nn.Module):
    dropout: bool = False

    @nn.compact
    def __call__(self, x, train):
        return Block(self.dropout, name="feed_forward")(x, train), None


class Tiny(nn.Module):
    dropout: bool = False

    @nn.compact
    def __call__(self, batch, train):
        stack = nn.scan(
            Layers,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
            in_axes=nn.broadcast,
        )
        x, _ = stack(self.dropout, name="stage_0")(Embeddings(name="embeddings")(batch["input_ids"]), train)
        logits = nn.Dense(VOCABULARY, name="heads")(x)
        nll = -jnp.take_along_axis(nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]
        weight = batch["weights"] * batch["example_weight"][:, None]
        square = jnp.sum(jnp.square(x.mean((1, 2)) - batch["target"]) * batch["example_weight"])
        return Output(
            {"tokens": (jnp.sum(nll * weight), jnp.sum(weight)), "square": (square, jnp.sum(batch["example_weight"]))},
            {"best": jnp.argmax(logits, -1)},
        )


def has_layer_axis(path):
    return any(part.startswith("stage_") for part in path)


def make_batch(seed, rows=16):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (rows, LENGTH), dtype=np.int32),
        "labels": rng.integers(0, VOCABULARY, (rows, LENGTH), dtype=np.int32),
        # The share of targets grows with the row number, so that micro-batches have very different weights.
        "weights": (rng.random((rows, LENGTH)) < np.arange(1, rows + 1)[:, None] / rows).astype(np.float32),
        "target": rng.normal(size=rows).astype(np.float32),
        "example_weight": (rng.random(rows) < 0.8).astype(np.float32),
        "example_index": np.arange(rows, dtype=np.int32) + 100 * seed,
    }


@functools.cache
def initial_params():
    return jax.device_get(
        jax.jit(lambda: Tiny().init(jax.random.key(0), make_batch(0, rows=1), train=False)["params"])()
    )


class Setup(NamedTuple):
    mesh: Any
    shardings: Any
    fresh: Any
    train_step: Any

    def put(self, batch):
        return sharding.put_batch(batch, self.mesh)


LAMB = optimizer.Lamb(learning_rate=0.02)


def setup(mesh=None, part=LAMB, dropout=False, coefficients=(("tokens", 1.0), ("square", 0.5)), seed=7, **options):
    """Everything train.py makes, at the smallest size; the same choices are compiled once for all tests."""
    mesh = mesh if mesh is not None else sharding.make_mesh(devices=first(1))
    return _setup(mesh, part, dropout, coefficients=coefficients, seed=seed, **options)


@functools.cache
def _setup(mesh, part, dropout, *, coefficients, **options):
    schedule = schedules.Linear(warmup=2).build(part.learning_rate, 20)
    transformation = part.build(schedule, has_layer_axis=has_layer_axis)
    state = step.initial_state(initial_params(), transformation)
    shardings = sharding.state_shardings(state, mesh, has_layer_axis=has_layer_axis)

    def fresh():
        # A copy: the step donates its state, and device_put may alias what is there already.
        return jax.device_put(jax.tree.map(np.array, state), shardings)

    options |= {"coefficients": dict(coefficients), "schedule": schedule, "shardings": shardings}
    return Setup(mesh, shardings, fresh, step.make_train_step(Tiny(dropout).apply, transformation, **options))
