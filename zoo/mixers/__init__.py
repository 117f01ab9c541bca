"""Sequence mixers: attention variants and what stands in their place, one concept per file."""

from zoo.mixers import softmax
from zoo.mixers.mixer import Context, Mixer, MixerFacts, Style
from zoo.mixers.registration import registry

names = registry.names

__all__ = ["Context", "Mixer", "MixerFacts", "Style", "names", "registry", "softmax"]
