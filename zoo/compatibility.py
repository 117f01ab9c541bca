"""Which encoding goes with which mixer, decided from declared facts by set logic, without building anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.attention import AttentionMask
from zoo.encodings import Encoding
from zoo.encodings import registry as encodings
from zoo.errors import UserError
from zoo.mixers import Mixer
from zoo.mixers import registry as mixers

_KIND_REASONS = {
    "transform": "the mixer has no product of queries and keys to transform",
    "values": "the mixer does not sum values with normalised weights",
    "toeplitz": "the mixer has no pairwise logits to add a bias of the distance to",
    "multiply": "the mixer has no pairwise logits to multiply",
    "relative": "the term depends on content and distance together and the mixer has no pairwise logits",
    "row_column": "the mixer has no pairwise logits to add row and column biases to",
    "piecewise_linear": "the bias is not a function of the distance alone and the mixer has no pairwise logits",
    "pairwise": "the mixer has no pairwise logits",
    "dense": "the mixer has no pairwise logits",
    "core": "the encoding replaces the attention core and the mixer has none to replace",
    "mask": "the mixer does not let an encoding narrow its mask",
    "side": "the mixer does not carry the encoding's state from layer to layer",
    "embedding": "the mixer's input takes no position embedding",
}


@dataclass(frozen=True)
class Compatibility:
    """True or false, with the reason why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def compatible(
    encoding: Any, mixer: Any, *, mask: AttentionMask | None = None, grouped_heads: bool = False
) -> Compatibility:
    """Whether `mixer` can honour `encoding`, each a name, a config mapping or a part; `encoding` may be a sequence of them.

    `mask` fixes the direction and the parts to be honoured; None asks whether there is any direction for which the pair
    works. `grouped_heads` says that there are fewer key/value heads than query heads.
    """
    sequence = encoding if isinstance(encoding, tuple | list) else (encoding,)
    parts: tuple[Encoding, ...] = tuple(encodings.build(e) for e in sequence)
    part: Mixer = mixers.build(mixer)
    facts = [p.facts() for p in parts]
    taken = part.facts()
    who = f"mixer {part.name!r} cannot be used: "
    if parts:
        who = f"position encoding {' + '.join(repr(p.name) for p in parts)} cannot be used with mixer {part.name!r}: "

    for p, f in zip(parts, facts, strict=True):
        for kind in sorted(f.kinds - taken.accepts):
            reason = taken.refuses.get(kind, _KIND_REASONS[kind])
            return Compatibility(False, f"{who}{p.name!r} brings {kind!r}, but {reason}")
        if f.ordered_keys and not taken.ordered_keys:
            return Compatibility(False, f"{who}{p.name!r} needs keys visited in order, which the mixer does not do")
    for kind, what in (("transform", "transform queries and keys"), ("core", "replace the attention core")):
        doing = [p.name for p, f in zip(parts, facts, strict=True) if kind in f.kinds]
        if len(doing) > 1:
            return Compatibility(False, f"{who}only one encoding can {what}, not {' and '.join(map(repr, doing))}")
    if len(set(parts)) < len(parts):
        return Compatibility(False, f"{who}the same encoding is given twice")
    scales = sorted({f.scale for f in facts if f.scale is not None})
    if len(scales) > 1:
        return Compatibility(False, f"{who}they set the scale of the logits to {' and '.join(map(str, scales))}")
    if grouped_heads and not taken.grouped_heads:
        return Compatibility(False, f"{who}the mixer takes as many key/value heads as query heads")
    return _direction(parts, part, mask, who)


def _direction(parts: tuple[Encoding, ...], mixer: Mixer, mask: AttentionMask | None, who: str) -> Compatibility:
    everyone = [*((p.name, p.facts()) for p in parts), (mixer.name, mixer.facts())]
    not_causal = [name for name, f in everyone if not f.causal]
    not_bidirectional = [name for name, f in everyone if not f.bidirectional]
    if mask is None:
        if not_causal and not_bidirectional:
            one, other = " and ".join(map(repr, not_causal)), " and ".join(map(repr, not_bidirectional))
            return Compatibility(False, f"{who}{one} is bidirectional only, {other} causal only")
        return Compatibility(True)
    if mask.causal and not_causal:
        return Compatibility(False, f"{who}{' and '.join(map(repr, not_causal))} is not defined for a causal mask")
    if not mask.causal and not_bidirectional:
        names = " and ".join(map(repr, not_bidirectional))
        return Compatibility(False, f"{who}{names} is defined for keys at or before the query only; use a causal mask")
    missing = _missing_mask_parts(mixer, mask)
    if missing:
        return Compatibility(False, f"{who}the mixer does not honour the mask's {missing}")
    return Compatibility(True)


def _missing_mask_parts(mixer: Mixer, mask: AttentionMask) -> str:
    """The parts of `mask` that `mixer` does not honour, with its own reasons; empty where it honours all."""
    facts = mixer.facts()
    used = {name for name, value in vars(mask).items() if value is not None and value is not False}
    missing = sorted(used - facts.mask_parts)
    reasons = dict.fromkeys(facts.refuses[name] for name in missing if name in facts.refuses)
    return ": ".join(filter(None, (", ".join(missing), "; ".join(reasons))))


def require_mask(mixer: Mixer, mask: AttentionMask) -> None:
    """Raises where a mixer is handed a mask of which it cannot honour a part; static, so it costs a traced call nothing.

    Raises:
      UserError: names the parts.
    """
    missing = _missing_mask_parts(mixer, mask)
    if missing:
        raise UserError(f"mixer {mixer.name!r} does not honour the mask's {missing}")


def require_compatible(
    encodings: tuple[Encoding, ...], mixer: Mixer, *, mask: AttentionMask, grouped_heads: bool = False
) -> None:
    """Raises the reason where the pair is refused.

    Raises:
      UserError: the reason.
    """
    answer = compatible(encodings, mixer, mask=mask, grouped_heads=grouped_heads)
    if not answer:
        raise UserError(answer.reason)
