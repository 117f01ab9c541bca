"""Kernels over several devices: each computes its part of the batch and of the heads, and nothing is gathered for it.

XLA knows nothing of what is inside a custom call, so it would gather the operands. The rule says which axes of operands and results belong
together, as an einsum does; an axis may be divided among devices or must be whole on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning

# Batch and key/value heads may be divided; lengths, widths and the query heads that share a key head are whole.
DIVIDED = ("b", "m")


def by_batch_and_heads(
    function: Callable[..., tuple[jax.Array, ...]], operands: Sequence[str], results: Sequence[str], *, group: int
) -> Callable[..., Any]:
    """`function` of arrays, a tuple of arrays, as an operation that is divided among the devices it runs on.

    Args:
      function: is called with the parts that one device has.
      operands, results: the axes of each array (of the first operand b is the first), letters between spaces: b batch, m key/value heads, n query heads; all others
        are whole on each device. Results without b are summed over the devices that divide the batch.
      group: query heads of each key/value head.
    """

    def axes(array: str) -> str:
        return array.replace("n", "(m g)" if group > 1 else "m")

    rule = f"{', '.join(map(axes, operands))} -> {', '.join(map(axes, results))}"
    letters = list(dict.fromkeys(rule.split("->")[0].replace("(", " ").replace(")", " ").replace(",", " ").split()))
    letters += [
        x for x in dict.fromkeys(rule.split("->")[1].replace(",", " ").split()) if x.isalpha() and x not in letters
    ]
    of_batch = ["b" in result.split() for result in results]

    def partition(mesh, operand_shapes, result_shapes):
        given = jax.tree.map(lambda x: x.sharding, operand_shapes)
        made = jax.tree.map(lambda x: x.sharding, result_shapes)
        over = given[0].spec[0] if given[0].spec else None
        if over is None or all(of_batch):
            return mesh, function, made, given

        def local(*parts):
            found = zip(function(*parts), of_batch, strict=True)
            return tuple(x if whole else jax.lax.psum(x, over) for x, whole in found)

        return mesh, local, made, given

    operation = custom_partitioning(function)
    operation.def_partition(
        partition,
        sharding_rule=rule,
        need_replication_factors=tuple(x for x in letters if x not in DIVIDED),
        reduction_factors=() if any(of_batch) else ("b",),
        **({"g": group} if group > 1 else {}),
    )
    return operation
