"""One update as one compiled function, sharded and donated, without a host sync inside.

The loss is Σ_c coefficient_c · sum_c / weight_c. Sums and weights are added over devices and micro-batches before the division,
so that accumulation and any number of devices give the gradient of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from zoo.errors import UserError, near
from zoo.training import loss_scale
from zoo.training.keys import key_for
from zoo.training.loss_scale import LossScale
from zoo.training.sharding import BATCH_AXES, batch_sharding, replicated

Batch = dict[str, jax.Array]
Scalars = dict[str, jax.Array]
Losses = dict[str, tuple[jax.Array, jax.Array]]
LossesOf = Callable[[Any, Batch, jax.Array], tuple[Scalars, Scalars]]
Objective = Callable[[Scalars, Scalars], jax.Array]
Gradient = tuple[Scalars, Scalars, Any]
NonFinite = Literal["stop", "skip"]


@flax.struct.dataclass
class TrainState:
    """All that an update reads and writes. `step` counts batches, which is also the data position.

    `extra["skipped"]` counts batches that made no update, since their loss, gradient or update was not finite; `extra["halted"]` is true
    after such a batch under the policy "stop": until the caller notices, further calls change nothing. With loss scaling
    `extra` has what `loss_scale.fresh` says as well.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: dict[str, jax.Array]


def initial_state(params: Any, optimizer: optax.GradientTransformation, scaling: LossScale | None = None) -> TrainState:
    """The state before the first update. Pure, so that it can be evaluated for its shapes and compiled into shards."""
    extra = {"skipped": jnp.zeros((), jnp.int32), "halted": jnp.zeros((), jnp.bool_), **loss_scale.fresh(scaling)}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), extra)


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    coefficients: Mapping[str, float],
    shardings: TrainState,
    seed: int = 0,
    accumulation: int = 1,
    nonfinite: NonFinite = "stop",
    scaling: LossScale | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """The compiled update (state, batch) → (new state, metrics). The state given is donated: it must not be used again.

    `apply({"params": params}, batch, train=True, rngs={"dropout": key})` returns an object whose `.losses` maps each name to
    (sum, weight), scalars; weights may depend on the batch only. A loss
    without a coefficient has 1. Batch leaves are [B, ...]; micro-batch a of `accumulation`
    holds the rows a, a + accumulation, … (so each device cuts up the rows it has).
    The dropout key is a function of (seed, step, micro-batch). With `scaling` the backward pass starts from the loss times
    `extra["loss_scale"]`, and an overflow of the gradient leaves the update out under either policy.

    Metrics, fp32 scalars on the device: `loss`, `loss/<name>` (means), `grad_norm` (before clipping), `update_norm`,
    `param_norm` (before the update), `learning_rate`, with scaling `loss_scale` (this step's) and `overflows` (before it), and the
    boolean `finite`, which an overflow leaves true. Where it is false the parameters and the
    optimizer's state are untouched; under "skip" the step and `extra["skipped"]` are counted, under "stop" nothing changes but
    `extra["halted"]`.

    Raises:
      UserError: (at the first call) coefficients for other losses than the module's; a batch that does not divide.
    """
    if accumulation < 1:
        raise UserError(f"accumulation is a positive number of micro-batches, not {accumulation}")
    if nonfinite not in ("stop", "skip"):
        raise UserError(f"the policy for non-finite steps is 'stop' or 'skip', not {nonfinite!r}")
    mesh = shardings.step.mesh

    def losses_of(params: Any, batch: Batch, key: jax.Array) -> tuple[Scalars, Scalars]:
        losses = apply({"params": params}, batch, train=True, rngs={"dropout": key}).losses
        for name in coefficients:
            if name not in losses:
                raise UserError(f"there is a coefficient for the loss {name!r}, which is none; {near(name, losses)}")
        sums = {name: jnp.float32(total) for name, (total, _) in losses.items()}
        return sums, {name: jnp.float32(weight) for name, (_, weight) in losses.items()}

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        batch = _spread_over_sequence(batch, mesh)
        key = key_for(seed, "dropout", state.step)
        scale = loss_scale.scale_of(state.extra)

        def objective(sums: Scalars, weights: Scalars) -> jax.Array:
            return scale * _total_loss(coefficients, sums, jax.lax.stop_gradient(weights))[0]

        if accumulation == 1:
            sums, weights, grads = _gradient(losses_of, objective, state.params, batch, key)
        else:
            micro = _split(batch, accumulation, mesh), jax.random.split(key, accumulation)
            sums, weights, grads = _accumulated_gradient(losses_of, objective, state.params, *micro)
        grads = jax.tree.map(lambda grad: grad / scale, grads)
        loss, means = _total_loss(coefficients, sums, weights)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        update_norm = optax.tree.norm(updates)
        # A finite gradient can still make an update that is not, by a learning rate that is far too high.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & ~state.extra["halted"]
        overflow = loss_scale.is_overflow(state.extra, loss, grad_norm) & ~state.extra["halted"]
        metrics = {
            "loss": loss,
            **{f"loss/{name}": mean for name, mean in means.items()},
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": jnp.float32(schedule(state.step - state.extra["skipped"])),
            **loss_scale.metrics(state.extra),
            "finite": finite | overflow,
        }
        params = optax.apply_updates(state.params, updates)
        extra = loss_scale.moved(state.extra, finite, overflow, scaling)
        new = TrainState(state.step + 1, params, opt_state, extra)
        return _keep_if(finite, overflow, state, new, nonfinite), metrics

    return jax.jit(
        update,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=_compiler_options(mesh),
    )


def _compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool] | None:
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    # cuBLAS adds a bias to a product on its way to memory. Products by Triton, which XLA would try first, leave it to a pass of its own.
    return {"xla_gpu_enable_triton_gemm": False}


def make_eval_step(
    apply: Callable[..., Any], *, shardings: TrainState
) -> Callable[[Any, Batch], tuple[Losses, dict[str, jax.Array]]]:
    """The compiled evaluation (params, batch) → (losses {name: (sum, weight)}, predictions {name: [B, ...]}), replicated."""
    mesh = shardings.step.mesh

    def evaluate(params: Any, batch: Batch) -> tuple[Losses, dict[str, jax.Array]]:
        output = apply({"params": params}, _spread_over_sequence(batch, mesh), train=False)
        return dict(output.losses), dict(output.predictions)

    return jax.jit(evaluate, in_shardings=(shardings.params, batch_sharding(mesh)), out_shardings=replicated(mesh))


def _total_loss(coefficients: Mapping[str, float], sums: Scalars, weights: Scalars) -> tuple[jax.Array, Scalars]:
    """Σ_c coefficient_c · sum_c / weight_c, and the means sum_c / weight_c; a loss without any target in the batch is 0."""
    safe = {name: jnp.where(weight > 0, weight, 1.0) for name, weight in weights.items()}
    means = {name: jnp.where(weights[name] > 0, 1.0, 0.0) * sums[name] / safe[name] for name in sorted(sums)}
    return sum(coefficients.get(name, 1.0) * mean for name, mean in means.items()), means


def _gradient(losses_of: LossesOf, objective: Objective, params: Any, batch: Batch, key: jax.Array) -> Gradient:
    """The losses' sums and weights, and the gradient of the objective made of them, in one go."""

    def total(params: Any) -> tuple[jax.Array, tuple[Scalars, Scalars]]:
        sums, weights = losses_of(params, batch, key)
        return objective(sums, weights), (sums, weights)

    grads, (sums, weights) = jax.grad(total, has_aux=True)(params)
    return sums, weights, grads


def _accumulated_gradient(
    losses_of: LossesOf, objective: Objective, params: Any, batches: Batch, keys: jax.Array
) -> Gradient:
    """The same for micro-batches [A, B/A, ...]: exactly the gradient of the loss of all rows together."""

    # The weights of the whole batch are needed before the first backward pass. They depend on the batch only, so the compiler
    # drops the network from this pass (a test counts the matrix products of the compiled program).
    def weights_of(carry: None, micro: tuple[Batch, jax.Array]) -> tuple[None, Scalars]:
        return None, losses_of(params, *micro)[1]

    each = jax.lax.scan(weights_of, None, (batches, keys))[1]
    weights = {name: jnp.sum(weight) for name, weight in each.items()}

    def total(params: Any, micro: tuple[Batch, jax.Array]) -> tuple[jax.Array, Scalars]:
        sums, _ = losses_of(params, *micro)
        return objective(sums, weights), sums

    def add(grads: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, Scalars]:
        more, sums = jax.grad(total, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, grads, more), sums

    grads, each = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batches, keys))
    return {name: jnp.sum(total) for name, total in each.items()}, weights, grads


def _split(batch: Batch, accumulation: int, mesh: jax.sharding.Mesh) -> Batch:
    """[B, ...] → [accumulation, B/accumulation, ...], every device keeping its own rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def split(rows: jax.Array) -> jax.Array:
        if len(rows) % (accumulation * shards):
            raise UserError(
                f"a batch of {len(rows)} rows cannot be divided into {accumulation} micro-batches over data"
                f" times fsdp = {shards} devices; choose a multiple of {accumulation * shards}"
            )
        parts = jnp.moveaxis(rows.reshape(len(rows) // accumulation, accumulation, *rows.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    return jax.tree.map(split, batch)


def _spread_over_sequence(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The second axis of [B, T, ...] leaves over the mesh axis `sequence`."""
    size = mesh.shape["sequence"]
    if size == 1:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))
    for name, rows in batch.items():
        if rows.ndim > 1 and rows.shape[1] % size:
            raise UserError(
                f"{name!r} of shape {rows.shape} cannot be divided over the mesh axis sequence={size}; choose a multiple of it"
            )
    return {
        name: jax.lax.with_sharding_constraint(rows, sharding) if rows.ndim > 1 else rows
        for name, rows in batch.items()
    }


def _keep_if(
    finite: jax.Array, overflow: jax.Array, old: TrainState, new: TrainState, nonfinite: NonFinite
) -> TrainState:
    """`new` where the step was finite; where it overflowed, `old` at the next batch; else what the policy says."""
    passed = finite | overflow | (nonfinite == "skip")
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (new.params, new.opt_state), (old.params, old.opt_state))
    skipped = old.extra["skipped"] + jnp.where(passed & ~finite, 1, 0)
    step = jnp.where(passed, new.step, old.step)
    return TrainState(step, *kept, {**new.extra, "skipped": skipped, "halted": ~passed})
