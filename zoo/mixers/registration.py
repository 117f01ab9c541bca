"""The registry of sequence mixers."""

from zoo.mixers.mixer import Mixer
from zoo.registry import Registry

registry = Registry("mixer", Mixer)
