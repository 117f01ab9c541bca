"""PaTH attention: golden numbers, the blockwise form against its definition in float64, special cases and refusals."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels.attention import (
    AttentionMask,
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Positions,
    RowColumn,
    Toeplitz,
    attention,
)
from kernels.path import carried, logits, path_attention, xla
from tests.kernels.attention_cases import Sizes, Waves, restarting
from tests.memory import assert_linear, temporary_bytes

CAUSAL = AttentionMask(causal=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, whether there is a forget gate, and what else a call is given, from the sizes and a function that draws arrays."""

    sizes: Sizes
    block: int = 64
    forget: bool = False
    terms: tuple[str, ...] = ()
    mask: str = "causal"
    dropout: bool = False


def documents(s: Sizes):
    ids = np.ones((s.B, s.S), np.int32)
    ids[0, 3:8], ids[0, 8:], ids[1, : s.S - s.T + 2] = 2, 3, 0
    ids, positions = jnp.asarray(ids), jnp.asarray(np.stack([restarting(row) for row in ids]))
    query, key = (Positions(x, contiguous=True) for x in (positions[:, s.S - s.T :], positions))
    return ids, (query, key)


def masks(name: str, s: Sizes):
    """(mask, positions)."""
    ids, positions = documents(s) if s.B == 2 else (None, None)
    return {
        "causal": lambda: (CAUSAL, None),
        "window": lambda: (AttentionMask(causal=True, window=(9, 0)), None),
        "block": lambda: (AttentionMask(causal=True, block=5, key_valid=jnp.tile(jnp.arange(s.S) > 2, (s.B, 1))), None),
        "documents": lambda: (
            AttentionMask(True, (6, 0), query_segments=ids[:, s.S - s.T :], key_segments=ids),
            positions,
        ),
    }[name]()


TERMS = {
    "toeplitz": lambda s, draw: Toeplitz(draw(s.N, 9)),
    "row_column": lambda s, draw: RowColumn(draw(s.B, s.N, s.T), draw(s.B, s.N, s.S)),
    "piecewise_linear": lambda s, draw: PiecewiseLinear(
        jnp.abs(draw(9)), jnp.abs(draw(s.B, s.T)), draw(3), draw(s.N, 3), draw(s.N, 2)
    ),
    "pairwise": lambda s, draw: Pairwise({"height": draw(s.N)}, Waves(0.3)),
    "dense": lambda s, draw: Dense(draw(1, s.N, s.T, s.S)),
}
CASES = {
    "one block": Case(Sizes(N=4)),
    "everything": Case(
        Sizes(T=17, S=21, N=4), 8, True, ("toeplitz", "row_column", "pairwise", "dense"), "documents", True
    ),
    "window": Case(Sizes(B=1, T=40, S=40), 8, mask="window", terms=("toeplitz", "piecewise_linear")),
    "block pattern": Case(Sizes(T=14, S=20, N=4, K=1), 8, forget=True, mask="block"),
    "63": Case(Sizes(B=1, T=63, S=63), forget=True),
    "130 of 201": Case(Sizes(B=1, T=130, S=201), forget=True),
    "1000": Case(Sizes(B=1, T=1000, S=1000, H=8), forget=True),
}


def inputs(case: Case, seed: int = 0):
    """((q, k, v, w, beta, log_forget, terms), cotangent), float32; β on both sides of 1, w of length 1."""
    s, rng = case.sizes, np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.5, jnp.float32)

    q, k, v, w = draw(s.B, s.T, s.N, s.H), draw(s.B, s.S, s.K, s.H), draw(s.B, s.S, s.K, s.W), draw(s.B, s.S, s.K, s.H)
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    beta = 2 * jax.nn.sigmoid(4 * draw(s.B, s.S, s.K))
    forget = -jnp.abs(draw(s.B, s.S, s.N)) if case.forget else None
    return (q, k, v, w, beta, forget, tuple(TERMS[t](s, draw) for t in case.terms)), draw(s.B, s.T, s.N, s.W)


def value_and_gradients(case: Case, arguments, cotangent, name, dtype=jnp.float32):
    mask, positions = masks(case.mask, case.sizes)
    given = {"mask": mask, "positions": positions, "scale": 0.7, "implementation": name}
    if case.dropout:
        given["dropout"] = (0.3, jax.random.key(5))

    def loss(arguments):
        q, k, v, w, beta, forget, terms = arguments
        out = path_attention(q, k, v, w, beta, log_forget=forget, terms=terms, **given)
        return jnp.sum(out * jnp.asarray(cotangent, out.dtype)), out

    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), arguments)
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast)
    return out, gradients


def truth(case: Case, arguments, cotangent):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        found = value_and_gradients(case, arguments, cotangent, "reference", jnp.float64)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


SLOW = {"1000", "130 of 201", "block pattern", "window", "63"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else (), id=n) for n in CASES])
def test_blocks_equal_the_definition_in_float64(name, monkeypatch):
    """Outputs and the gradients of q, k, v, w, β, the forget gate and every term."""
    case = CASES[name]
    arguments, cotangent = inputs(case)
    monkeypatch.setattr(xla, "_BLOCK", case.block)
    with jax.default_matmul_precision("highest"):
        found = value_and_gradients(case, arguments, cotangent, "xla")
    chex.assert_trees_all_close(found, truth(case, arguments, cotangent), rtol=1e-4, atol=3e-5)


ROWS, C = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
Q, K = np.sin(0.3 * ROWS + 0.7 * C + 0.1), np.cos(0.2 * ROWS - 0.5 * C + 0.4)
V = np.sin(0.11 * (ROWS + 1) * (C + 1))
W = np.cos(0.9 * ROWS + 1.1 * C)
W = W / np.linalg.norm(W, axis=1, keepdims=True)
BETA = 2 / (1 + np.exp(0.5 - 0.5 * np.arange(4)))
LOG_FORGET = -np.log1p(np.exp(-np.array([2.0, 1.0, 0.0, -1.0])))
GOLDEN = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (Q, K, V, W, BETA, LOG_FORGET)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_golden_values():
    q, k, v, w, beta, forget = GOLDEN
    close(beta[0, :, 0], [0.755081, 1, 1.244919, 1.462117])
    score, attend = jax.jit(logits), jax.jit(path_attention, static_argnames="implementation")
    scores = score(q, k, w, beta)[0, 0]
    close(scores[1, :2], [0.815621, 1.238573])
    close(scores[2, :3], [0.238251, 0.325509, 1.246241])
    close(scores[3], [0.143784, 0.504952, 0.916932, 1.018435])
    close(2 * scores[3, 0], 0.287567)
    close(score(q, k, w, beta, log_forget=forget)[0, 0, 3], [-2.175887, -1.501457, -0.396330, 1.018435])
    close(score(q, k, w, beta, log_forget=forget / 2)[0, 0, 3], [-1.016052, -0.498252, 0.260301, 1.018435])
    for implementation in ("reference", "xla"):
        out = attend(q, k, v, w, beta, implementation=implementation)
        close(out[0, 3, 0], [0.306648, 0.572328, 0.762641, 0.855188])


def test_golden_values_of_one_block():
    q, k, _, w, beta, _ = (x[None, :, None, :, 0] for x in GOLDEN)
    queries, local, keys, u = jax.jit(xla.compact)(q[:, :, :, None], k, w, beta)
    close(queries[0, 0, 0, 3], [0.492146, -0.264287, -0.114601, 0.580792])
    close(keys[0, 0, 0, 0], [0.834111, -0.281938, -0.246147, 0.758498])
    solved = [[0.755081, 0, 0, 0], [-0.533065, 1, 0, 0], [0.599280, -0.542268, 1.244919, 0]]
    solved.append([0.157348, 1.123301, -1.140840, 1.462117])
    close(u[0, 0, 0], np.array(solved) @ W)
    close(local[0, 0, 0, 3] / 2, [0.143784, 0.504952, 0.916932, 1.018435])


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_inverse_of_a_block(size):
    a = np.tril(np.random.default_rng(size).normal(size=(2, 3, size, size)), -1) / np.sqrt(size)
    found = np.asarray(jax.jit(xla.inverse)(jnp.asarray(a, jnp.float32)))
    expected = np.linalg.inv(np.eye(size) + a)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_no_solve_is_left_to_lapack():
    """Two batches of them at a time stop jaxlib 0.10 for ever on a CPU; a training step has as many as it has layers."""
    (q, k, v, w, beta, _, _), _ = inputs(CASES["63"])
    gradient = jax.jit(jax.grad(lambda *given: path_attention(*given).sum(), argnums=(0, 1, 2, 3, 4)))
    assert "lapack" not in gradient.lower(q, k, v, w, beta).as_text()


def test_without_reflections_it_is_attention_and_with_a_gate_fox():
    (q, k, v, w, beta, forget, _), _ = inputs(CASES["63"])

    @jax.jit
    def both(q, k, v, w, beta, forget):
        sums = jnp.swapaxes(jnp.cumsum(forget, axis=1), 1, 2)
        found = [path_attention(q, k, v, w, 0 * beta, log_forget=gate) for gate in (None, forget)]
        return found, [attention(q, k, v, terms=terms, mask=CAUSAL) for terms in ((), (RowColumn(sums, -sums),))]

    chex.assert_trees_all_close(*both(q, k, v, w, beta, forget), atol=1e-5)


def test_reflections_of_one_direction_alternate():
    """β = 2 and one w: H² = I, so a score depends on the parity of i − j alone."""
    q, k = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, 6, 1, 4)) for x in ([1.0, 2, 0, -1], [0.5, 1, 1, 2]))
    w = jnp.broadcast_to(jnp.array([0.6, 0, 0.8, 0]), k.shape)
    scores = np.asarray(jax.jit(logits)(q, k, w, jnp.full((1, 6, 1), 2.0), scale=1.0))[0, 0]
    odd = 0.5 - 2 * 0.6 * (0.6 * 0.5 + 0.8)
    rows, columns = np.tril_indices(6)
    np.testing.assert_allclose(scores[rows, columns], np.where((rows - columns) % 2, odd, 0.5), atol=1e-5)


def test_packed_equals_separate():
    """Also where documents begin and end within blocks, and with a forget gate."""
    (q, k, v, w, beta, forget, _), _ = inputs(Case(Sizes(B=1, T=150, S=150, N=4), forget=True))
    ids = jnp.repeat(jnp.array([[1, 2, 3]], jnp.int32), 50, axis=1)
    mask = AttentionMask(causal=True, query_segments=ids, key_segments=ids)
    run = jax.jit(lambda mask, *x: path_attention(*x[:5], log_forget=x[5], mask=mask))
    together = run(mask, q, k, v, w, beta, forget)
    for start in (0, 50, 100):
        alone = run(CAUSAL, *(x[:, start : start + 50] for x in (q, k, v, w, beta, forget)))
        chex.assert_trees_all_close(together[:, start : start + 50], alone, atol=1e-6)


def test_rows_without_keys_are_zero_with_zero_gradients():
    case = Case(Sizes(T=6, S=6))
    arguments, cotangent = inputs(case)
    mask = AttentionMask(causal=True, key_valid=jnp.array([[False] * 6, [False] * 2 + [True] * 4]))

    def loss(arguments):
        out = path_attention(*arguments[:5], mask=mask)
        return jnp.sum(out * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)
    chex.assert_tree_all_finite((out, gradients))
    assert not out[0].any() and not out[1, :2].any() and out[1, 2:].all()
    assert not any(x[0].any() or x[1, :2].any() for x in gradients[:5])
    assert gradients[3][1, 3:].any()


def test_bfloat16_is_as_close_as_its_rounding():
    case = dataclasses.replace(CASES["130 of 201"], sizes=Sizes(B=1, T=130, S=201, H=8))
    (q, k, v, w, beta, forget, _), cotangent = inputs(case)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    expected = truth(case, (*wide, w, beta, forget, ()), cotangent)

    def loss(arguments):
        out = path_attention(*arguments[:5], log_forget=arguments[5], scale=0.7)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v, w, beta, forget))
    for found, wanted in zip((out, *gradients), (expected[0], *expected[1][:6]), strict=True):
        # Eight bits, a few roundings in a row.
        assert np.abs(np.asarray(found, np.float32) - wanted).max() < 4 * 2**-8 * np.abs(wanted).max()


@pytest.mark.cpu
def test_memory_is_linear_in_length():
    """Of the gradients of two layers over packed documents, in a scan as in a model."""

    def peak(length):
        q, v = (jax.ShapeDtypeStruct((1, length, heads, 4), jnp.float32) for heads in (2, 1))
        beta, forget = (jax.ShapeDtypeStruct((1, length, heads), jnp.float32) for heads in (1, 2))

        def loss(arrays, ids):
            q, k, v, w, beta, forget = arrays
            mask = AttentionMask(causal=True, query_segments=ids, key_segments=ids)

            def layer(q, _):
                return path_attention(q, k, v, w, beta, log_forget=forget, mask=mask), None

            return jax.lax.scan(layer, q, None, length=2)[0].sum()

        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return temporary_bytes(jax.grad(loss), (q, v, v, v, beta, forget), ids)

    assert_linear(peak, 2048)


def test_carried_keys_are_what_the_last_query_meets():
    """In one piece, and as a cache that goes on by pieces of any length."""
    (q, k, _, w, beta, _, _), _ = inputs(Case(Sizes(B=2, T=90, S=90)))
    scores = jax.jit(logits)(q, k, w, beta, scale=1.0)[:, :, -1]
    keys, go_on = k[:, :0], jax.jit(carried)
    for start, stop in ((0, 70), (70, 71), (71, 90)):
        keys = go_on(k[:, start:stop], w[:, start:stop], beta[:, start:stop], keys)
    chex.assert_trees_all_close(jnp.einsum("bnh,bsnh->bns", q[:, -1], keys), scores, atol=1e-5)
    chex.assert_trees_all_close(go_on(k, w, beta), keys, atol=1e-5)


def ones(*shape):
    return jnp.ones(shape)


REFUSED = {
    "q has 6 tokens and k 5: the queries are the last tokens": {"q": ones(2, 6, 4, 8)},
    "must be a multiple": {"k": ones(2, 5, 3, 8), "v": ones(2, 5, 3, 8)},
    r"v has shape .*expected \[2, 5, 2, any width\]": {"v": ones(2, 4, 2, 8)},
    r"w has shape \(2, 5, 4, 8\), expected \[2, 5, 2, 8\]": {"w": ones(2, 5, 4, 8)},
    r"beta has shape \(2, 5, 4\), expected \[2, 5, 2\]": {"beta": ones(2, 5, 4)},
    "beta is int32, expected a floating": {"beta": jnp.ones((2, 5, 2), jnp.int32)},
    r"log_forget has shape \(2, 5, 2\), expected \[2, 5, 4\]": {"log_forget": ones(2, 5, 2)},
    r"the mask must be AttentionMask\(causal=True\)": {"mask": AttentionMask()},
    "prefix_length shows keys after the query": {"mask": AttentionMask(True, prefix_length=jnp.ones(2, jnp.int32))},
    r"key_valid has shape .*expected \[2, 5\]": {"mask": AttentionMask(True, key_valid=jnp.ones((2, 4), bool))},
    "terms that are added to the scores, not Multiply": {"terms": (Multiply(ones(4, 9)),)},
    r"Toeplitz.values .*expected \[4, any size\]": {"terms": (Toeplitz(ones(3, 9)),)},
    "expected a scalar": {"scale": ones(4)},
    "dropout rate is 1": {"dropout": (1.0, jax.random.key(0))},
    "'pallas_gpu': this version has no such kernel; those that exist: reference, xla, pallas_tpu": {
        "implementation": "pallas_gpu"
    },
    "'fast': there is no such implementation": {"implementation": "fast"},
}


@pytest.fixture
def our_own_checks():
    """What a user meets: shape annotations are checked under pytest only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, our_own_checks):
    call = {name: ones(2, 5, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2), ("w", 2))}
    call |= {"beta": ones(2, 5, 2)} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        path_attention(**call)


def test_keys_that_do_not_fit_a_cache_are_refused(our_own_checks):
    with pytest.raises(ValueError, match=r"before has shape \(2, 3, 1, 8\), expected \[2, any length, 2, 8\]"):
        carried(ones(2, 5, 2, 8), ones(2, 5, 2, 8), ones(2, 5, 2), ones(2, 3, 1, 8))
