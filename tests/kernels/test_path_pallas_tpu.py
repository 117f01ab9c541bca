"""The TPU kernels of PaTH against the float64 reference: compiled on a TPU, interpreted elsewhere, lowered everywhere."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import AttentionMask, Dense, Positions, RowColumn, Toeplitz
from kernels.path import api, pallas_tpu, path_attention
from tests.kernels.attention_cases import Sizes, packed, restarting

ON_TPU = jax.default_backend() == "tpu"
CAUSAL = AttentionMask(causal=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: its sizes, the tokens of a piece and pieces of a block, and what else it is given."""

    sizes: Sizes
    piece: int = 8
    pieces: int = 2
    forget: bool = False
    terms: bool = False
    mask: str = "causal"


def masks(name: str, s: Sizes):
    """(mask, positions)."""
    if name == "causal":
        return CAUSAL, None
    if name == "window":
        return AttentionMask(causal=True, window=(19, 0)), None
    if name == "key_valid":
        return AttentionMask(causal=True, key_valid=jnp.arange(s.S)[None] >= jnp.array([[0], [s.S // 2]])), None
    # Documents that begin and end within blocks, padding behind them; a row of nothing but padding.
    ids = packed(3, s.S // 2, s.S - s.S // 2 - 8, 5)
    ids[-5:] = 0
    ids = np.stack([ids, 0 * ids])[: s.B]
    positions = jnp.asarray(np.stack([restarting(row) for row in ids]))
    ids = jnp.asarray(ids)
    query, key = (Positions(x, contiguous=True) for x in (positions[:, s.S - s.T :], positions))
    mask = AttentionMask(True, query_segments=ids[:, s.S - s.T :], key_segments=ids)
    if name == "documents":
        return mask, None
    return dataclasses.replace(mask, window=(6, 0)), (query, key)


CASES = {
    "7": Case(Sizes(B=1, T=7, S=7)),
    "63, one key head": Case(Sizes(B=1, T=63, S=63, N=3, K=1), forget=True, terms=True),
    "130": Case(Sizes(B=1, T=130, S=130, N=1, K=1, H=8), piece=32, forget=True),
    "documents": Case(Sizes(T=40, S=50, N=4), mask="documents", forget=True),
    "documents by positions": Case(Sizes(T=40, S=50), mask="documents by positions"),
    "window": Case(Sizes(B=1, T=50, S=50), mask="window", forget=True),
    "padding": Case(Sizes(T=40, S=40), mask="key_valid", forget=True),
    # The sizes that a TPU gets.
    "300": Case(Sizes(B=1, T=300, S=300, N=1, K=1), piece=128, pieces=4, forget=True),
    "700": Case(Sizes(B=1, T=700, S=700, N=1, K=1, H=8), piece=128, pieces=4),
}
# The test of bfloat16 takes 130 too.
SLOW = {"130", "window", "documents by positions", "700"}


def inputs(case: Case, seed: int = 0):
    """((q, k, v, w, beta, log_forget, terms), cotangent), float32; β on both sides of 1, w of length 1."""
    s, rng = case.sizes, np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.5, jnp.float32)

    q, k, v, w = draw(s.B, s.T, s.N, s.H), draw(s.B, s.S, s.K, s.H), draw(s.B, s.S, s.K, s.W), draw(s.B, s.S, s.K, s.H)
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    beta = 2 * jax.nn.sigmoid(4 * draw(s.B, s.S, s.K))
    forget = -jnp.abs(draw(s.B, s.S, s.N)) if case.forget else None
    terms = (RowColumn(draw(s.B, s.N, s.T), draw(s.B, s.N, s.S)),) if case.terms else ()
    return (q, k, v, w, beta, forget, terms), draw(s.B, s.T, s.N, s.W)


def value_and_gradients(case: Case, arguments, cotangent, name, times=1):
    mask, positions = masks(case.mask, case.sizes)

    def loss(arguments):
        q, k, v, w, beta, forget, terms = arguments
        given = {"terms": terms, "mask": mask, "positions": positions, "scale": 0.7, "implementation": name}
        out = path_attention(q, k, v, w, beta, log_forget=forget, **given)
        return jnp.sum(out.astype(cotangent.dtype) * cotangent), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return [jax.device_get((out, gradients)) for (_, out), gradients in (run(arguments) for _ in range(times))]


def truth(case: Case, arguments, cotangent):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arguments, cotangent))
        return value_and_gradients(case, *wide, "reference")[0]


@pytest.fixture
def fused(monkeypatch):
    """(case, arguments, cotangent) → two times (out, gradients), interpreted where there is no TPU; `how` as `interpret`."""

    def run(case: Case, arguments, cotangent, how=True):
        monkeypatch.setattr(pallas_tpu, "_PIECE", case.piece)
        monkeypatch.setattr(pallas_tpu, "_PIECES", case.pieces)
        call = functools.partial(original, interpret=how and not ON_TPU)
        monkeypatch.setattr(pallas_tpu, "path_attention", call)
        return value_and_gradients(case, arguments, cotangent, "pallas_tpu", times=2)

    original = pallas_tpu.path_attention
    return run


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else (), id=n) for n in CASES])
def test_kernels_equal_the_definition_in_float64(name, fused):
    """Outputs and the gradients of q, k, v, w, β, the forget gate and of a bias of keys; again the same bits."""
    case = CASES[name]
    arguments, cotangent = inputs(case)
    found, again = fused(case, arguments, cotangent)
    expected = jax.tree.map(np.float32, truth(case, arguments, cotangent))
    chex.assert_trees_all_close(found, expected, atol=3e-5, rtol=1e-4)
    chex.assert_trees_all_equal(found, again)
    if case.sizes.B == 2:
        # Behind the documents there is nothing but padding; so is the first half of the row with key padding.
        nothing = slice(None) if "documents" in case.mask else slice(case.sizes.S // 2)
        assert not any(x[1, nothing].any() for x in (found[0], *found[1][:6]) if x is not None)


def test_no_block_is_revisited_too_late(fused):
    """What plain interpretation cannot see; every kernel, with all that it can be given."""
    case = Case(Sizes(B=1, T=24, S=40, N=2, K=1), piece=4, forget=True, mask="documents")
    arguments, cotangent = inputs(case)
    found, again = fused(case, arguments, cotangent, pltpu.InterpretParams())
    chex.assert_trees_all_close(found, jax.tree.map(np.float32, truth(case, arguments, cotangent)), atol=3e-5)
    chex.assert_trees_all_equal(found, again)


def test_bfloat16_is_as_close_as_its_rounding(fused):
    case = CASES["130"]
    (q, k, v, *others), cotangent = inputs(case)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    found, _ = fused(case, (q, k, v, *others), cotangent)
    expected = truth(case, (*(x.astype(jnp.float32) for x in (q, k, v)), *others), cotangent)
    assert found[0].dtype == jnp.bfloat16
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Eight bits, a few roundings in a row.
        assert np.abs(np.asarray(got, np.float32) - want).max() < 4 * 2**-8 * np.abs(want).max()


def shapes(length=700, width=64, dtype=jnp.bfloat16, heads=4, kv_heads=2):
    q, k = (jax.ShapeDtypeStruct((2, length, n, width), dtype) for n in (heads, kv_heads))
    wide = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    beta, forget = (jax.ShapeDtypeStruct((2, length, n), jnp.float32) for n in (kv_heads, heads))
    return q, k, k, wide, beta, forget, jax.ShapeDtypeStruct((2, length), jnp.int32)


def gradients(q, k, v, w, beta, forget, ids):
    def loss(q, k, v, w, beta, forget):
        mask = AttentionMask(causal=True, query_segments=ids, key_segments=ids)
        call = {"log_forget": forget, "mask": mask, "implementation": "pallas_tpu"}
        return path_attention(q, k, v, w, beta, **call).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=range(6))(q, k, v, w, beta, forget)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_lowers_for_tpu_without_one(dtype):
    text = jax.jit(gradients).trace(*shapes(dtype=dtype)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 7
    assert "700x700" not in text and "768x768" not in text, "an array of all queries by all keys"


@pytest.mark.skipif(ON_TPU, reason="this is a TPU")
def test_on_another_platform_it_fails_at_lowering():
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(gradients).lower(*shapes(length=8))


REFUSED = {
    "bfloat16 and float32, not float16. implementation='xla' does it": {"dtype": jnp.float16},
    "at most 128 wide, not 160": {"width": 160},
    "no Dense and no Toeplitz": {"terms": (Toeplitz(jnp.ones((2, 9))), Dense(jnp.ones((1, 2, 8, 8))))},
    "no block mask": {"mask": AttentionMask(causal=True, block=4)},
    "no dropout": {"dropout": (0.1, jax.random.key(0))},
    "queries of width 128 are at most 65536, not 70000": {"width": 128, "length": 70000},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    call = {"dtype": jnp.bfloat16, "width": 32, "length": 8} | REFUSED[message]
    q = jax.ShapeDtypeStruct((1, call.pop("length"), 2, call.pop("width")), call.pop("dtype"))
    beta = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    attend = functools.partial(path_attention, **call, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=f"'pallas_tpu': .*{message}"):
        jax.eval_shape(lambda q, beta: attend(q, q, q, q, beta), q, beta)


@pytest.mark.parametrize(
    ("chosen", "platform", "length", "dtype"),
    [
        ("pallas_tpu", "tpu", 64, jnp.bfloat16),
        ("xla", "tpu", 63, jnp.bfloat16),
        ("xla", "tpu", 64, jnp.float16),
        ("xla", "gpu", 64, jnp.bfloat16),
    ],
)
def test_what_is_chosen_where_nothing_is_named(monkeypatch, chosen, platform, length, dtype):
    q = jnp.ones((1, length, 2, 32), dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert api._best(q, q, q, (), CAUSAL, None) == chosen
