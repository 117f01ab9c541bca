"""The registry of position encodings."""

from zoo.encodings.encoding import Encoding
from zoo.registry import Registry

registry = Registry("encoding", Encoding)
