"""Where arrays live: a mesh of named axes, and ordered rules from parameter names to partition specs.

Rules are written for the parameter of one layer; a leaf with a layer axis gets a leading None. Everything the optimizer keeps
per parameter is laid out like that parameter; everything else of the training state is replicated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zoo.errors import UserError
from zoo.training.rules import HasLayerAxis, Path, first_match, named_leaves

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

Spec = tuple[str | tuple[str, ...] | None, ...]

# Megatron's layout (arXiv 1909.08053): the first matrix of a pair is split by columns over `tensor`, the second by rows, so
# that a pair needs one reduction; `fsdp` takes the other axis (ZeRO-3, arXiv 1910.02054). Small leaves are replicated.
PARAMETER_RULES: tuple[tuple[str, Spec], ...] = (
    (r"(^|/)embeddings/token/embedding$", ("tensor", "fsdp")),
    (r"(^|/)embeddings/(position|token_type)[^/]*/", ()),
    (r"(^|/)embeddings/project[^/]*/kernel$", (None, "fsdp")),
    (r"(^|/)mixer/(query|key|value|key_pointwise|convolution_value)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)mixer/(query|key|value|key_pointwise|convolution_value)/bias$", ("tensor",)),
    (r"(^|/)mixer/filter/kernel$", ("tensor", None)),
    (r"(^|/)mixer/key_depthwise/kernel$", ()),
    (r"(^|/)mixer/output/kernel$", ("tensor", "fsdp")),
    (r"(^|/)feed_forward/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)feed_forward/(up|gate)/bias$", ("tensor",)),
    (r"(^|/)feed_forward/down/kernel$", ("tensor", "fsdp")),
    # Whole over `tensor`: between the two the groups stand in one axis, which cannot be divided inside each.
    (r"(^|/)feed_forward/(up|gate|down)/group_kernels$", (None, "fsdp", None)),
    (r"(^|/)convolution/kernel$", (None, None, "fsdp")),
    (r"(^|/)pooler/kernel$", ("fsdp", None)),
    (r"(^|/)heads/([^/]+/)*table$", ("tensor", "fsdp")),
    (r"(^|/)heads/([^/]+/)*kernel$", ("fsdp", None)),
    (r"(^|/)heads/", ()),
    (r"(^|/)encodings?(_\d+)?/", ()),
    (r"(^|/)after_\d+/", ()),
    (r"(^|/)(bias|scale)$", ()),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and sequence over `devices` (all of them by default); one size may be −1: the rest.

    Raises:
      UserError: a size that is not positive, two sizes of −1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence), strict=True))
    spelled = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh sizes are positive, and one of them may be -1 for the rest: got {spelled}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"a mesh of {spelled} does not fit {len(devices)} devices; the sizes must multiply to that number"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch [B, ...] lie over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): this process's devices hold the part-th of `parts` equal, contiguous parts of the rows of a batch.

    It follows the mesh, not the number of the process: on a pod `make_mesh` orders the devices by their place in the
    network, and where `tensor` or `sequence` reaches over processes, these hold the same rows.

    Raises:
      UserError: the rows of this process are not such a part.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    places = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    held = sorted({rows.start or 0 for (rows,) in places})
    count, first = len(held), held[0]
    if held != list(range(first, first + count)) or first % count or shards % count:
        spelled = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"in a mesh of {spelled} the devices of process {jax.process_index()} hold the parts {held} of {shards} of a batch, "
            "which is no equal, contiguous share; choose mesh sizes that are multiples or divisors of the devices of a process"
        )
    return first // count, shards // count


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch on the mesh, from the rows that this process has (all of them where there is one process)."""
    sharding = batch_sharding(mesh)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = 1 if jax.process_count() == 1 else batch_part(mesh)[1]
    for name, rows in batch.items():
        if len(rows) * parts % shards:
            raise UserError(
                f"a batch of {len(rows) * parts} rows ({name!r}) cannot be divided over"
                f" data={mesh.shape['data']} times fsdp={mesh.shape['fsdp']}; choose a multiple of {shards}"
            )
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * parts, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def put_whole(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, laid out over the devices of all."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def parameter_shardings(
    params: Any,
    mesh: Mesh,
    *,
    has_layer_axis: HasLayerAxis,
    rules: tuple[tuple[str, Spec], ...] = PARAMETER_RULES,
) -> Any:
    """A tree of `NamedSharding` for a tree of arrays or shapes, by the first rule found in each name.

    Raises:
      UserError: names that no rule covers; a spec longer than the leaf, with an unknown axis, or one whose axis does not
        divide its dimension.
    """
    leaves = named_leaves(params)
    specs = first_match(rules, ["/".join(path) for path, _ in leaves], "sharding")
    shardings = [
        _fit(path, leaf.shape, spec, mesh, has_layer_axis(path))
        for (path, leaf), spec in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def _fit(path: Path, shape: tuple[int, ...], spec: Spec, mesh: Mesh, layer_axis: bool) -> NamedSharding:
    full = (None,) * layer_axis + tuple(tuple(axes) if isinstance(axes, list) else axes for axes in spec)
    name = "/".join(path)
    if len(full) > len(shape):
        raise UserError(f"sharding rule {spec} has more entries than {name} of shape {shape} has dimensions")
    for dimension, axes in enumerate(full):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in mesh.shape:
                raise UserError(
                    f"sharding rule {spec} for {name} names the axis {axis!r}; the mesh has {', '.join(mesh.shape)}"
                )
        size = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if shape[dimension] % size:
            raise UserError(
                f"{name} of shape {shape}: dimension {dimension} ({shape[dimension]}) cannot be divided over mesh axis"
                f" {axes!r} of size {size}; choose another mesh or model size, or a sharding rule that replicates it"
            )
    return NamedSharding(mesh, PartitionSpec(*full))


def state_shardings(
    state: Any,
    mesh: Mesh,
    *,
    has_layer_axis: HasLayerAxis,
    rules: tuple[tuple[str, Spec], ...] = PARAMETER_RULES,
) -> Any:
    """Shardings for a whole `TrainState` (of arrays or of shapes).

    A leaf of the optimizer's state whose path ends in a parameter's path, with that parameter's shape, lies like the parameter.

    Raises:
      UserError: as `parameter_shardings`; or an optimizer array that belongs to no parameter.
    """
    params = parameter_shardings(state.params, mesh, has_layer_axis=has_layer_axis, rules=rules)
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), (_, sharding) in zip(named_leaves(state.params), named_leaves(params), strict=True)
    }

    def like_parameter(path: Path, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return replicated(mesh)
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        raise UserError(f"optimizer state {'/'.join(path)} of shape {leaf.shape} belongs to no parameter")

    opt_state = [like_parameter(path, leaf) for path, leaf in named_leaves(state.opt_state)]
    return state.replace(
        step=replicated(mesh),
        params=params,
        opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), opt_state),
        extra=jax.tree.map(lambda leaf: replicated(mesh), state.extra),
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with shardings, as `Checkpoints.restore` takes it."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
