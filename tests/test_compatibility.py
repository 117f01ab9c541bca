"""Every pair of encoding and mixer: a yes runs, a no says why; decided without building anything."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import zoo
from kernels.attention import AttentionMask
from tests.encodings.table import ROWS, parameters, tiny_model, tokens
from zoo.compatibility import require_compatible
from zoo.encodings import Encoding, Facts, registry
from zoo.errors import UserError
from zoo.mixers import Mixer, MixerFacts


@dataclasses.dataclass(frozen=True)
class Kernelised(Mixer):
    """A stand-in for linear attention: no pairwise logits, and a reason of its own against Toeplitz terms."""

    name = "kernelised"

    def facts(self) -> MixerFacts:
        return MixerFacts(
            accepts=frozenset({"embedding", "transform"}),
            refuses={"toeplitz": "exp(bias) does not factor into query and key parts"},
            bidirectional=False,
            mask_parts=frozenset({"causal"}),
        )

    def module(self, dims, encodings, style):
        raise AssertionError("compatible must build nothing")


@dataclasses.dataclass(frozen=True)
class Ordered(Encoding):
    name = "ordered"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"core"}), ordered_keys=True, bidirectional=False)


def test_names_configs_and_parts_mean_the_same():
    for encoding in ("rope", {"name": "rope", "theta": 5.0}, registry.build("rope")):
        assert zoo.compatible(encoding, "softmax")


def test_a_refusal_carries_the_reason_and_building_raises_it():
    answer = zoo.compatible("t5", Kernelised())
    assert not answer and answer.reason == (
        "position encoding 't5' cannot be used with mixer 'kernelised': 't5' brings 'toeplitz', but exp(bias) does not "
        "factor into query and key parts"
    )
    with pytest.raises(UserError, match="does not factor"):
        require_compatible(
            zoo.encodings.registry.build("t5") and (zoo.encodings.registry.build("t5"),),
            Kernelised(),
            mask=AttentionMask(),
        )


@pytest.mark.parametrize(
    ("encoding", "mixer", "mask", "reason"),
    [
        ("nezha", Kernelised(), None, "depends on content and distance together"),
        (("rope", {"name": "rope", "theta": 1.0}), "softmax", None, "only one encoding can transform queries and keys"),
        (("alibi", "alibi"), "softmax", None, "the same encoding is given twice"),
        (("t5", {"name": "t5", "scale": 0.5}), "softmax", None, "set the scale of the logits to 0.5 and 1.0"),
        (Ordered(), Kernelised(), None, "replaces the attention core"),
        (Ordered(), "softmax", AttentionMask(), "at or before the query only; use a causal mask"),
        (
            {"name": "alibi", "form": "nonsymmetric"},
            "softmax",
            AttentionMask(causal=True),
            "not defined for a causal mask",
        ),
        ({"name": "alibi", "form": "nonsymmetric"}, Kernelised(), None, "brings 'toeplitz'"),
        ("learned", Kernelised(), AttentionMask(), "'kernelised' is defined for keys at or before"),
        ("learned", Kernelised(), AttentionMask(causal=True, window=(1, 0)), "does not honour the mask's window"),
    ],
)
def test_reasons(encoding, mixer, mask, reason):
    answer = zoo.compatible(encoding, mixer, mask=mask)
    assert not answer and reason in answer.reason


def test_opposite_directions_are_refused_without_a_mask():
    both = ({"name": "alibi", "form": "nonsymmetric"}, {"name": "t5", "bidirectional": False})
    assert "'alibi' is bidirectional only, 't5' causal only" in zoo.compatible(both, "softmax").reason


def test_grouped_heads():
    answer = zoo.compatible("learned", Kernelised(), grouped_heads=True)
    assert "as many key/value heads as query heads" in answer.reason
    assert zoo.compatible("learned", "softmax", grouped_heads=True)


def test_wrong_names_are_errors_not_refusals():
    with pytest.raises(UserError, match="did you mean 'rope'"):
        zoo.compatible("rop", "softmax")
    with pytest.raises(UserError, match="unknown mixer"):
        zoo.compatible("rope", "softmx")


# With the softmax mixer every encoding runs in `make test`; with another those that between them have all it does differently.
COVERING = {"fourier": {"learned", "dpe"}, "mixed_attention": {"deberta", "tape"}}


def mask_of(row):
    return AttentionMask(causal=row.bidirectional is None)


def pairs():
    for row, mixer in itertools.product(ROWS, zoo.mixers.names()):
        costly = zoo.compatible(row.config, mixer, mask=mask_of(row)) and row.name not in COVERING.get(
            mixer, {row.name}
        )
        yield pytest.param(row, mixer, marks=pytest.mark.slow if costly else (), id=f"{row.name}-{mixer}")


@pytest.mark.parametrize(("row", "mixer"), list(pairs()))
def test_a_yes_runs_forward_and_backward_and_a_no_is_raised(row, mixer):
    answer = zoo.compatible(row.config, mixer, mask=mask_of(row))
    model = tiny_model(row.config, mixer=zoo.mixers.registry.build(mixer))
    if not answer:
        with pytest.raises(UserError) as caught:
            model.check()
        assert str(caught.value) == answer.reason
        return
    params = parameters(model)
    ids = tokens(2, 5)
    value, grads = jax.jit(jax.value_and_grad(lambda p: (model.apply(p, ids).hidden ** 2).sum()))(params)
    value, grads = jax.device_get((value, grads))
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads["params"]["stage_0"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.all(np.isfinite(leaf)), name
        # A key bias shifts all logits of a row alike, so softmax passes it no gradient but for relative terms.
        assert np.any(leaf != 0) or name.endswith("mixer/key/bias"), name


def test_softmax_takes_every_encoding():
    assert all(zoo.compatible(row.config, "softmax", mask=mask_of(row)) for row in ROWS)
