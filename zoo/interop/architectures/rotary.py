"""What families with rotary positions and gated feed-forwards have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import UserError
from zoo.interop.architecture import Tree

# Their name of an activation → our gated feed-forward, the first that fits being written.
GATED = {
    "silu": {"name": "swiglu"},
    "swish": {"name": "swiglu"},
    "gelu": {"name": "geglu", "approximate": False},
    "gelu_new": {"name": "geglu", "approximate": True},
    "gelu_pytorch_tanh": {"name": "geglu", "approximate": True},
    "gelu_fast": {"name": "geglu", "approximate": True},
    "relu": {"name": "reglu"},
}
# Their name of an activation → ours, of poolers and heads.
NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


# Tables of angles, which some files keep.
IGNORED = (r".*inv_freq", r".*freqs_cis")


def gate_activation(tree: Mapping[str, Any]) -> str:
    """The name of the activation of a model's gated feed-forwards."""
    part = tree["feed_forward"]
    return {"swiglu": "silu", "reglu": "relu"}.get(part["name"]) or ("gelu_tanh" if part["approximate"] else "gelu")


def theta(theirs: Mapping[str, Any], default: float, where: str) -> float:
    """The base of the angles of a config.json: in `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling`.

    Raises:
      UserError: angles that change with the length, or otherwise than by their base.
    """
    key = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    return theta_in(theirs.get(key) or {}, theirs.get("rope_theta", default), f"{where}: {key}")


def theta_in(given: Any, default: Any, where: str) -> float:
    """The base of the angles of one entry of rope parameters.

    Raises:
      UserError: begins with `where`.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be a mapping, but is {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    others = {name: value for name, value in given.items() if name not in ("rope_type", "type", "rope_theta")}
    if kind != "default" or others:
        raise UserError(
            f"{where}={dict(given)!r} is not among what this zoo reads: rope_type='default' with rope_theta alone. Nothing is "
            "approximated"
        )
    base = given.get("rope_theta", default)
    if isinstance(base, bool) or not isinstance(base, int | float) or base <= 0:
        raise UserError(f"{where}: rope_theta must be a number above 0, but is {base!r}")
    return float(base)


def parameters(base: float) -> dict[str, Any]:
    """The entry of rope parameters that says `base`."""
    return {"rope_type": "default", "rope_theta": base}


def with_rope(default: float) -> tuple[Callable[..., Tree], Callable[[Tree], dict[str, Any] | None]]:
    """`derive` and `recover` of a family all of whose layers turn by one base, `default` where its config.json has none."""

    def derive(tree: Tree, theirs: Mapping[str, Any], where: str) -> Tree:
        tree["encoding"] = {"name": "rope", "theta": theta(theirs, default, where)}
        return tree

    def recover(tree: Tree) -> dict[str, Any] | None:
        if tree["encoding"].get("name") != "rope":
            return None
        base = tree["encoding"]["theta"]
        # In the words of transformers 5 and of those before it.
        return {"rope_parameters": parameters(base), "rope_theta": base}

    return derive, recover
