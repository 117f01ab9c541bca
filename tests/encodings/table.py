"""The shared test table: one row per encoding."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.encodings import Dims, registry
from zoo.layers.arrangements import PreNorm
from zoo.layers.block import BlockSpec
from zoo.layers.feed_forward import Gelu
from zoo.mixers import Mixer, Style
from zoo.mixers.softmax import Softmax
from zoo.models import Stage, Transformer


class Row(NamedTuple):
    """An encoding under test.

    Attributes:
      bidirectional, causal: its config without and with a causal mask; None where it is not defined for that.
      shift_invariant: whether only r = j − i matters to it.
      max_span: the distance beyond which it is an error, None for none.
    """

    name: str
    bidirectional: dict[str, Any] | None
    causal: dict[str, Any] | None
    shift_invariant: bool
    max_span: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The one to use where the direction does not matter; `tiny_model` of it is causal where it must be."""
        return self.causal if self.bidirectional is None else self.bidirectional


YARN = {"name": "rope", "scaling": {"name": "yarn", "factor": 4.0, "original_length": 8}}
MUSIC = {"name": "music", "length": 4, "bidirectional": True}
DEBERTA_V1 = {"name": "deberta", "buckets": None, "max_distance": 4, "share_projections": False, "norm": False}

ROWS = (
    Row("none", {"name": "none"}, {"name": "none"}, True),
    Row("learned", {"name": "learned"}, {"name": "learned"}, False),
    Row("learned-interpolated", {"name": "learned", "interpolate": 12}, {"name": "learned", "interpolate": 9}, False),
    Row("sinusoidal", {"name": "sinusoidal"}, {"name": "sinusoidal"}, False),
    Row("dpe", {"name": "dpe", "layers": 1}, None, False),
    Row("rope", {"name": "rope"}, {"name": "rope", "layout": "interleaved", "fraction": 0.5}, True),
    Row("t5", {"name": "t5"}, {"name": "t5", "bidirectional": False, "num_buckets": 8, "max_distance": 16}, True),
    Row("alibi", {"name": "alibi"}, {"name": "alibi", "form": "causal"}, True),
    Row("alibi-nonsymmetric", {"name": "alibi", "form": "nonsymmetric"}, None, True),
    Row("nezha", {"name": "nezha", "limit": 3}, {"name": "nezha", "limit": 3, "phase": "paper"}, True),
    Row("kerple_log", {"name": "kerple_log"}, {"name": "kerple_log", "parametrisation": "softplus"}, True),
    Row("kerple_power", {"name": "kerple_power"}, {"name": "kerple_power"}, True),
    Row("tisa", {"name": "tisa"}, {"name": "tisa", "bumps": 2}, True),
    Row("sandwich", {"name": "sandwich"}, {"name": "sandwich", "width": 8}, True),
    Row("fire", None, {"name": "fire", "threshold": 4.0, "width": 4}, False),
    Row("rope-yarn", YARN, {**YARN, "layout": "interleaved"}, True),
    Row("xpos", None, {"name": "xpos"}, True, max_span=32768),
    Row("pia", {"name": "pia"}, {"name": "pia", "layout": "interleaved", "frequencies": "paper"}, False),
    Row("gta", {"name": "gta"}, {"name": "gta", "layout": "half"}, True),
    Row("cope", None, {"name": "cope", "max_count": 4}, True),
    Row("fox", None, {"name": "fox"}, True),
    Row("path", None, {"name": "path", "rank": 3}, True),
    Row("path_fox", None, {"name": "path_fox", "rank": None, "width": 2, "form": "paper"}, True),
    Row("shaw", {"name": "shaw", "limit": 3}, {"name": "shaw", "limit": 3, "share_heads": False}, True),
    Row("music", MUSIC, {"name": "music", "length": 4, "beyond": "zero"}, True),
    Row("transformer_xl", {"name": "transformer_xl", "untie": True}, {"name": "transformer_xl", "clamp": 4}, True),
    Row("deberta", {"name": "deberta", "buckets": 4, "max_distance": 8}, DEBERTA_V1, True),
    Row("huang_m1", {"name": "huang_m1", "limit": 3}, {"name": "huang_m1", "limit": 3}, True),
    Row("huang_m2", {"name": "huang_m2", "limit": 3}, {"name": "huang_m2", "limit": 3}, True),
    Row("huang_m3", {"name": "huang_m3", "limit": 3}, {"name": "huang_m3", "limit": 3}, True),
    Row("huang_m4", {"name": "huang_m4", "limit": 3}, {"name": "huang_m4", "limit": 3, "keys": False}, True),
    Row("irpe", {"name": "irpe", "on": ("query", "key", "value")}, {"name": "irpe", "share_heads": False}, True),
    Row("irpe-bias", {"name": "irpe", "mode": "bias"}, {"name": "irpe", "mode": "bias", "mapping": "quantized"}, True),
    Row("tupe", {"name": "tupe"}, {"name": "tupe", "form": "paper"}, False),
    Row("cpe", {"name": "cpe"}, {"name": "cpe", "width": 4}, True),
    Row("tape", {"name": "tape", "gates": 3}, {"name": "tape", "gates": 3, "mixing": "full"}, True),
    Row("bipe_rope", {"name": "bipe_rope", "separators": (2, 9)}, {"name": "bipe_rope", "separators": (2, 9)}, True),
    Row("bipe_alibi", None, {"name": "bipe_alibi", "separators": (2, 9), "slope_factor": 4.0}, True),
)

DIMS = Dims(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=2, max_length=32)


def tiny_model(
    config: dict[str, Any], *, causal: bool = False, stages: int = 1, mixer: Mixer | None = None, **kwargs: Any
) -> Transformer:
    """Two layers, as one scanned stage or as several stages of one; causal where asked for or where there is no other way."""
    causal = causal or not registry.build(config).facts().bidirectional
    spec = BlockSpec(
        mixer=mixer or Softmax(),
        encodings=(registry.build(config),),
        arrangement=PreNorm(),
        feed_forward=Gelu(width=16),
    )
    depth = (Stage((spec,), DIMS.num_layers),) if stages == 1 else tuple(Stage((spec,)) for _ in range(DIMS.num_layers))
    return Transformer(
        vocab_size=29, dims=DIMS, stages=depth, style=Style(stddev=0.3), causal=causal, has_pooler=False, **kwargs
    )


@functools.cache  # Equal models are equal values: half of a property's time went into making them anew.
def parameters(model: Transformer, seed: int = 0) -> Any:
    """Parameters with every leaf moved off its initial value, so that a bias or scale that is dropped shows.

    Compiling Threefry for each leaf takes four times as long as the generator that XLA has, and moving the leaves in the same program as long again.
    """
    key = jax.random.key(seed, impl="unsafe_rbg")
    tree = jax.jit(lambda: model.init(key, jnp.zeros((1, 4), jnp.int32)))()
    rng = np.random.default_rng(seed + 1)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), tree)


def tokens(batch: int, length: int, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 29, (batch, length), np.int32))
