"""Config → Transformer: plain values become frozen parts, and no module sees a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from zoo.encodings import Dims
from zoo.encodings import registry as encodings
from zoo.errors import UserError, near
from zoo.layers.activations import Activation
from zoo.layers.arrangements import registry as arrangements
from zoo.layers.block import BlockSpec
from zoo.layers.convolution import registry as convolutions
from zoo.layers.feed_forward import registry as feed_forwards
from zoo.layers.norms import registry as norms
from zoo.mixers import Style
from zoo.mixers import registry as mixers
from zoo.models import remat
from zoo.models.stage import Stage
from zoo.models.transformer import Pooling, Transformer
from zoo.registry import coerce, make

_DTYPES = {None: jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_BLOCK_PARTS = ("mixer", "encoding", "feed_forward", "norm", "arrangement", "convolution")


@dataclass(frozen=True)
class ModelConfig:
    """The scalars of a model, `config.model`; its parts stand beside it: encoding, mixer, feed_forward, norm.

    Attributes:
      vocab_size: None = that of the tokenizer, which the trainer fills in.
      dtype: of activations and matrix products. None = float32; the trainer fills in bfloat16 where it finds a TPU or GPU.
        float16 is trained with a dynamic loss scale.
      num_kv_heads: None = num_heads.
      head_dim: None = model_dim / num_heads.
      embedding_dim: None = model_dim.
      embedding_projection: a dense layer behind the embeddings, from embedding_dim to model_dim; None = where the two differ, true
        = always (FNet).
      pooler: a dense layer and `pooler_activation` on one vector of the row, "gelu" (by the error function), "gelu_tanh", "relu", "silu"
        or "tanh"; with `pooler_norm` the norm of the model follows (ModernBERT's head). `pooler_bias` None = use_bias.
      pooling: that vector: "first" is the first token's, "mean" the mean over the real tokens; "late" has the dense layer at every
        token and takes the mean of what the pooler gives (EuroBERT).
      remat: what the backward pass computes again instead of keeping it: "none", "full", all of a block, "dots", all but matrix products and
        what attention gives (three quarters of bert-base's memory), "dots_no_batch", of the products those of projections alone.
      unroll: repeats of a stage laid out one after another in the compiled program; compiling then takes time by depth. None = all on a
        GPU, where a loop copies what the backward pass needs of every layer (a sixth of bert-base's step at 128 tokens), else 1. All is
        faster on a CPU, too (a tenth, at 4 layers).
      stages: the depth where one pattern repeated `num_layers` times does not say it: a tuple of mappings with
        `pattern` (a tuple of mappings that replace parts: mixer, encoding, feed_forward, norm, arrangement, convolution),
        `repeats` and `share`; `num_layers` then counts the blocks in all.
    """

    vocab_size: int | None
    model_dim: int
    num_heads: int
    num_layers: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 512
    token_types: int = 2
    embedding_dim: int | None = None
    embedding_projection: bool | None = None
    embedding_norm: bool = True
    pooler: bool = True
    pooling: Pooling = "first"
    pooler_activation: Activation = "tanh"
    pooler_norm: bool = False
    pooler_bias: bool | None = None
    causal: bool = False
    use_bias: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    stddev: float = 0.02
    arrangement: str = "post_norm"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: str = "none"
    unroll: int | None = None
    stages: tuple[Any, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "model_dim", "num_heads", "num_layers", "max_length", "unroll"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim is None and self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim={self.model_dim} is no multiple of num_heads={self.num_heads}; change one, or set head_dim"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a rate in [0, 1), not {getattr(self, name)}")
        if self.remat not in remat.names():
            raise ValueError(f"remat={self.remat!r}; {near(self.remat, remat.names())}")

    def dims(self) -> Dims:
        return Dims(
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.model_dim // self.num_heads,
            num_layers=self.num_layers,
            max_length=self.max_length,
        )


def build(config: Mapping[str, Any]) -> Transformer:
    """The model of a config with keys model, encoding, mixer, feed_forward and norm, and convolution where every block has one.

    Raises:
      UserError: names the wrong part or value, or the reason why two parts do not go together.
    """
    model = make(ModelConfig, dict(config["model"]), "model")
    if model.vocab_size is None:
        raise UserError("model.vocab_size is not set: give the size of the tokenizer's vocabulary")
    parts = {name: config[name] for name in ("mixer", "encoding", "feed_forward", "norm")}
    dims, style = model.dims(), _style(model)
    stages = _stages(model, {**parts, "arrangement": model.arrangement, "convolution": config.get("convolution")})
    transformer = Transformer(
        vocab_size=model.vocab_size,
        dims=dims,
        stages=stages,
        style=style,
        embedding_dim=model.embedding_dim or model.model_dim,
        embedding_projection=model.embedding_projection,
        token_types=model.token_types,
        embedding_norm=model.embedding_norm,
        norm=norms.build(config["norm"]),
        has_pooler=model.pooler,
        pooling=model.pooling,
        pooler_activation=model.pooler_activation,
        pooler_bias=model.pooler_bias,
        has_pooler_norm=model.pooler_norm,
        causal=model.causal,
        remat_policy=model.remat,
        unroll=model.unroll,
    )
    transformer.check()
    return transformer


def _style(model: ModelConfig) -> Style:
    return Style(
        dtype=_DTYPES[model.dtype],
        use_bias=model.use_bias,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        stddev=model.stddev,
    )


def _stages(model: ModelConfig, parts: Mapping[str, Any]) -> tuple[Stage, ...]:
    if not model.stages:
        return (Stage((_block(parts, {}, "model"),), model.num_layers),)
    stages = []
    for index, stage in enumerate(model.stages):
        where = f"model.stages[{index}]"
        unknown = sorted(set(stage) - {"pattern", "repeats", "share"})
        if unknown or "pattern" not in stage:
            raise UserError(f"{where} takes pattern (a tuple of mappings), repeats and share, not {sorted(stage)}")
        pattern = tuple(_block(parts, own, f"{where}.pattern") for own in stage["pattern"])
        repeats = coerce(stage.get("repeats", 1), int, f"{where}.repeats")
        if repeats < 1 or not pattern:
            raise UserError(f"{where} needs a pattern of at least one block and repeats of at least 1, not {repeats}")
        stages.append(Stage(pattern, repeats, coerce(stage.get("share", False), bool, f"{where}.share")))
    blocks = sum(len(stage.pattern) * stage.repeats for stage in stages)
    if blocks != model.num_layers:
        raise UserError(f"model.stages has {blocks} blocks, model.num_layers is {model.num_layers}; make them equal")
    return tuple(stages)


def _block(parts: Mapping[str, Any], own: Mapping[str, Any], where: str) -> BlockSpec:
    for name in own:
        if name not in _BLOCK_PARTS:
            raise UserError(f"{where} has no part {name!r}; {near(name, _BLOCK_PARTS)}")
    chosen = {**parts, **own}
    encoding, convolution = chosen["encoding"], chosen["convolution"]
    return BlockSpec(
        mixer=mixers.build(chosen["mixer"]),
        encodings=tuple(encodings.build(e) for e in (encoding if isinstance(encoding, tuple | list) else (encoding,))),
        feed_forward=feed_forwards.build(chosen["feed_forward"]),
        norm=norms.build(chosen["norm"]),
        arrangement=arrangements.build(chosen["arrangement"]),
        convolution=None if convolution is None else convolutions.build(convolution),
    )
