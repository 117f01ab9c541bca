"""Sequence mixers: attention variants and what stands in their place, one concept per file."""

from zoo.mixers import fourier, mixed_attention, softmax
from zoo.mixers.mixer import Mixer, MixerFacts, Style
from zoo.mixers.registration import registry

names = registry.names

__all__ = ["Mixer", "MixerFacts", "Style", "fourier", "mixed_attention", "names", "registry", "softmax"]
