"""PaTH and PaTH-FoX: what a layer makes of its input, written out; the gate's scale; decoding beside other terms; refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels import path as kernel
from kernels.attention import AttentionMask, Multiply, Positions
from tests.encodings.table import DIMS, parameters, tokens
from zoo.encodings import Dims, Place, Project, Site, logits, registry
from zoo.encodings.path import PathCore
from zoo.errors import UserError
from zoo.layers.arrangements import PreNorm
from zoo.layers.block import BlockSpec
from zoo.layers.feed_forward import Gelu
from zoo.mixers import Style
from zoo.mixers.softmax import Softmax
from zoo.models import Stage, Transformer

N, T, H = 2, 7, 4
SIZES = Dims(N * H, N, 1, H, 1, T)
Q, K, V = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate([(1, T, N, H), (1, T, 1, H), (1, T, 1, H)])
)
X = jax.random.normal(jax.random.key(5), (1, T, N * H))
CAUSAL = AttentionMask(causal=True)


def encoded(config, mask=CAUSAL, place=None, shift=0.5):
    """(w, β, the layer's parameters), with parameters moved off their start by a normal of that deviation."""
    layer = registry.build(config).layer(SIZES)
    site = Site(X, X, {}, Project(None, None, None), place or Place(Positions.arange(T), span=T - 1), mask)

    @jax.jit
    def make():
        leaves, tree = jax.tree.flatten(layer.init(jax.random.key(0), None, Q, K, V, site)["params"])
        moved = [x + shift * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        params = jax.tree.unflatten(tree, moved)
        core = layer.apply({"params": params}, None, Q, K, V, site).core
        return core.w, core.beta, params

    return make()


@pytest.mark.parametrize("form", ["code", "paper"])
def test_directions_and_strengths_written_out(form):
    """w: low rank, three taps within the document, silu in the code's form, length 1; β = 2σ, and 0 where there is padding."""
    found = np.array([1, 1, 1, 2, 2, 2, 0])
    segments = jnp.asarray(found)[None]
    w, beta, params = encoded(
        {"name": "path", "rank": 3, "form": form}, AttentionMask(True, query_segments=segments, key_segments=segments)
    )
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.asarray(X[0], np.float64)
    assert p["down"]["kernel"].shape == (N * H, 3) and p["direction"]["kernel"].shape == (3, H)
    before = x @ p["down"]["kernel"] @ p["direction"]["kernel"]
    expected = np.zeros((T, H))
    for t in range(T):
        for back in range(3):
            if t >= back and found[t] == found[t - back] > 0:
                expected[t] += p["convolution"][2 - back] * before[t - back]
    expected = expected / (1 + np.exp(-expected)) if form == "code" else expected
    expected /= np.sqrt((expected**2).sum(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(w[0, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w[0, :6, 0], axis=-1), 1, atol=1e-4)
    strength = x @ p["strength"]["kernel"] + p["strength"]["bias"]
    np.testing.assert_allclose(beta[0], np.where(found[:, None] > 0, 2 / (1 + np.exp(-strength)), 0), atol=1e-5)


def test_one_full_matrix_and_no_convolution():
    w, _, params = encoded({"name": "path", "rank": None, "width": 1})
    assert set(params) == {"direction", "strength"} and params["direction"]["kernel"].shape == (N * H, H)
    before = np.asarray(X[0]) @ np.asarray(params["direction"]["kernel"])
    expected = before / (1 + np.exp(-before))
    np.testing.assert_allclose(w[0, :, 0], expected / np.linalg.norm(expected, axis=-1, keepdims=True), atol=1e-4)


def test_strengths_begin_near_one():
    _, beta, _ = encoded("path", shift=0.0)
    assert jnp.abs(beta - 1).max() < 0.2


def test_the_gate_stands_inside_the_scale_or_outside():
    """As released (⟨…⟩ + Σ ln f)/√H; form="paper" as FoX adds it, ⟨…⟩/√H + Σ ln f."""
    w, beta, params = encoded("path_fox")

    @jax.jit
    def scores(params):
        alone = {name: tree for name, tree in params.items() if name != "forget"}
        found = {
            (name, form): logits({"name": name, "form": form}, Q, K, params={"layer": tree}, x=X)
            for form in ("code", "paper")
            for name, tree in (("path", alone), ("path_fox", params))
        }
        fox = logits("fox", Q, K, params={"layer": params["forget"]}, x=X) - logits("none", Q, K)
        return found, fox, kernel.logits(Q, K, w, beta)

    found, fox, path = jax.tree.map(lambda x: x[0][:, *np.tril_indices(T)], scores(params))
    chex.assert_trees_all_close(found["path", "code"], path, atol=1e-5)
    chex.assert_trees_all_close(found["path_fox", "code"], path + fox / H**0.5, atol=1e-5)
    chex.assert_trees_all_close(found["path_fox", "paper"], found["path", "paper"] + fox, atol=1e-5)
    assert jnp.abs(found["path", "paper"] - path).max() > 1e-2


def test_decoding_beside_other_terms_a_window_and_documents():
    """Pieces of several tokens equal the full pass (single ones are in the table); keys are cached once, in float32."""
    parts = tuple(registry.build(c) for c in ({"name": "path", "rank": 3}, {"name": "alibi", "form": "causal"}))
    spec = BlockSpec(mixer=Softmax(window=(4, 0)), encodings=parts, arrangement=PreNorm(), feed_forward=Gelu(width=16))
    model = Transformer(
        vocab_size=29, dims=DIMS, stages=(Stage((spec,), 2),), style=Style(stddev=0.3), causal=True, has_pooler=False
    )
    params, ids = parameters(model), tokens(1, 12)
    segments = jnp.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    token = jnp.array([[0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    apply = jax.jit(lambda i, s, p, c=None: model.apply(params, i, segment_ids=s, positions=Positions(p), cache=c))
    full = apply(ids, segments, token).hidden
    cache, found = model.init_cache(1, 12), []
    own = cache.layers[0][0]
    assert own.keys.shape[-1] == 0 and own.encodings[0].keys.shape[-3:] == (12, DIMS.num_kv_heads, DIMS.head_dim)
    assert own.encodings[0].keys.dtype == jnp.float32
    for start, stop in ((0, 6), (6, 12)):
        out = apply(ids[:, start:stop], segments[:, start:stop], token[:, start:stop], cache)
        cache = out.cache
        found.append(out.hidden)
    chex.assert_trees_all_close(jnp.concatenate(found, axis=1)[:, 1:], full[:, 1:], atol=2e-5)


def test_what_it_cannot_do_is_refused():
    assert "only one encoding can transform queries and keys" in zoo.compatible(("path", "rope"), "softmax").reason
    assert zoo.compatible(("path", "alibi", "fox"), "softmax", mask=CAUSAL)
    answer = zoo.compatible("path_fox", "softmax", mask=AttentionMask())
    assert "'path_fox' is defined for keys at or before the query only; use a causal mask" in answer.reason
    core = PathCore("path", K, jnp.ones(K.shape[:3]))
    with pytest.raises(UserError, match="'path' has its own attention, which has no implementation 'pallas_gpu'"):
        core(Q, K, V, mask=CAUSAL, implementation="pallas_gpu")
    with pytest.raises(UserError, match=r"whose terms meet them \(Multiply\); use alibi"):
        core(Q, K, V, mask=CAUSAL, terms=(Multiply(jnp.ones((N, 3))),))
    context = Place(Positions.arange(T), sources=Positions.arange(T), span=T - 1)
    with pytest.raises(UserError, match=r"'path_fox' goes through the tokens.*attention to a context; use alibi"):
        encoded("path_fox", place=context)
    with pytest.raises(UserError, match="'path' has rank=0; it must be at least 1"):
        registry.build({"name": "path", "rank": 0})
