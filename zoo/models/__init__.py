"""The Transformer, what decoding carries, and presets as plain data."""

from zoo.models.build import ModelConfig, build
from zoo.models.cache import DecodingCache
from zoo.models.presets import preset
from zoo.models.stage import Stage
from zoo.models.transformer import EncoderOutput, Transformer

__all__ = ["DecodingCache", "EncoderOutput", "ModelConfig", "Stage", "Transformer", "build", "preset"]
