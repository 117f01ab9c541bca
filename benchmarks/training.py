"""The training step of masked LM that train.py compiles, over batches of random tokens: what benchmarks of a step measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from zoo.models import build
from zoo.models.parameters import has_layer_axis
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.flops import FORWARD_AND_BACKWARD, forward_flops
from zoo.training.optimizer import registry as optimizers
from zoo.training.sharding import batch_sharding, make_mesh, put_batch, state_shardings, with_shardings
from zoo.training.step import TrainState, initial_state, make_train_step

LEARNING_RATE = 1e-4


def random_batch(task: MaskedLM, vocabulary: int, rows: int, documents: int = 1) -> dict[str, np.ndarray]:
    """Full rows with their masked positions, the arrays that train.py's pipeline makes; each row holds so many documents."""
    rng, length = np.random.default_rng(0), task.max_length
    shape, every = (rows, length), np.tile(np.arange(length), (rows, 1))
    masked = np.sort(rng.permuted(every, axis=1)[:, : task.slots], axis=1)
    # A document begins at token 0, the others at random ones.
    begins = np.zeros(shape, bool)
    np.put_along_axis(begins, rng.permuted(every[:, 1:], axis=1)[:, : documents - 1], True, axis=1)
    begins[:, 0] = True
    since = np.maximum.accumulate(np.where(begins, every, 0), axis=1)
    return {
        "input_ids": rng.integers(5, vocabulary, shape).astype(np.int32),
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32),
        "positions": (every - since).astype(np.int32),
        "masked_positions": masked.astype(np.int32),
        "masked_labels": rng.integers(5, vocabulary, masked.shape).astype(np.int32),
        "masked_weights": np.ones(masked.shape, np.float32),
        "example_weight": np.ones(rows, np.float32),
    }


@dataclass(frozen=True)
class Training:
    """What train.py makes of a config and a task. `fresh()` is a state of random parameters on `mesh`; `update` is compiled at
    its first call and takes the state's buffers."""

    mesh: Mesh
    shapes: TrainState
    fresh: Callable[[], TrainState]
    update: Any
    losses: Callable[..., Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], task: MaskedLM, optimizer: str, mesh: Mesh | None = None) -> Training:
        """mesh: of all devices by default; those of another need not be there to compile for."""
        model, schedule = build(config), optax.constant_schedule(LEARNING_RATE)
        mesh = make_mesh() if mesh is None else mesh
        module = task.module(model)
        transformation = optimizers.build({"name": optimizer}).build(schedule, has_layer_axis=has_layer_axis)

        def fresh() -> TrainState:
            row = jax.tree.map(jnp.asarray, random_batch(task, model.vocab_size, 1))
            variables = module.init({"params": jax.random.key(0)}, row, train=False)
            return initial_state(variables["params"], transformation)

        shapes = jax.eval_shape(fresh)
        shardings = state_shardings(shapes, mesh, has_layer_axis=has_layer_axis)
        update = make_train_step(
            module.apply, transformation, schedule=schedule, coefficients=task.coefficients, shardings=shardings
        )
        shapes = with_shardings(shapes, shardings)
        return cls(mesh, shapes, jax.jit(fresh, out_shardings=shardings), update, module.apply)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_batch(dict(batch), self.mesh)

    def compiled(self, batch: Mapping[str, jax.Array]) -> Any:
        """`update` for batches like this one; no state need be there."""
        return self.update.lower(self.shapes, batch).compile()

    def compiled_for_mesh(self, batch: Mapping[str, np.ndarray]) -> Any:
        """`update` for batches of these shapes on the devices of the mesh, none of which need be there."""
        sharding = batch_sharding(self.mesh)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
        platform = self.mesh.devices.flat[0].platform
        platforms = ("cuda" if platform == "gpu" else platform,)
        return self.update.trace(self.shapes, shapes).lower(lowering_platforms=platforms).compile()

    def flops(self, batch: Mapping[str, jax.Array]) -> float:
        """Model FLOPs of one update, as train.py counts them for `timing.jsonl`."""

        def losses(params: Any, batch: Any) -> Any:
            return self.losses({"params": params}, batch, train=False)

        return FORWARD_AND_BACKWARD * forward_flops(losses, self.shapes.params, batch)
