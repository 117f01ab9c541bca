"""What every mixer with queries and keys does with its encodings: apply them in turn, and bring values back in reverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from zoo.encodings import Encoded, EncodingLayer, Site


def encode(
    layers: Sequence[EncodingLayer | None],
    encoded: Encoded,
    shared: tuple[Any, ...],
    site: Site,
    caches: tuple[Any, ...],
) -> tuple[Encoded, tuple[Site, ...]]:
    """q, k, v through every encoding's layer in turn, and the site each was called at.

    Transforms compose and terms join; at most one layer sets the scale and one the core. A layer that narrows the mask narrows
    it for those after it too; `Encoded.mask` of the result is the mask to use. `Encoded.cache` of the result is the tuple of
    the encodings' caches.

    Raises:
      ValueError: two layers set different scales.
    """
    sites, new_caches = [], []
    for layer, own_shared, cache in zip(layers, shared, caches, strict=True):
        sites.append(site._replace(cache=cache))
        if layer is None:
            new_caches.append(cache)
            continue
        new = layer(own_shared, encoded.q, encoded.k, encoded.v, sites[-1])
        if None not in (encoded.scale, new.scale) and encoded.scale != new.scale:
            raise ValueError(f"two encodings set the scale of the logits, to {encoded.scale} and {new.scale}")
        encoded = new._replace(
            terms=encoded.terms + tuple(new.terms),
            scale=encoded.scale if new.scale is None else new.scale,
            core=new.core or encoded.core,
        )
        site = site if new.mask is None else site._replace(mask=new.mask)
        new_caches.append(new.cache)
    return encoded._replace(cache=tuple(new_caches), mask=site.mask), tuple(sites)


def bring_back(
    layers: Sequence[EncodingLayer | None],
    out: jax.Array,
    shared: tuple[Any, ...],
    side: dict[str, Any],
    sites: tuple[Site, ...],
) -> tuple[jax.Array, dict[str, Any]]:
    """`out` `[B, T, N, H]` through the layers' ways back, last first."""
    for layer, own_shared, site in reversed(list(zip(layers, shared, sites, strict=True))):
        if layer is not None:
            out, side = layer.back(out, own_shared, side, site)
    return out, side
