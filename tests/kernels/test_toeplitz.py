"""The Toeplitz product: every implementation against the dense matrix in float64, its symmetries, its memory, refusals."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels.toeplitz import api, pallas_tpu, pallas_tpu_dft, toeplitz_matmul, xla
from tests.devices import first
from tests.memory import assert_linear, temporary_bytes


def inputs(length, causal, *, batch=2, heads=3, channels=4, seed=0):
    """(t, x, the cotangent of y), float64 of NumPy."""
    rng = np.random.default_rng(seed)
    t = rng.standard_normal((heads, length if causal else 2 * length - 1))
    x, dy = (rng.standard_normal((batch, length, heads, channels)) for _ in range(2))
    return t, x, dy


def dense(t, causal):
    """`[N, T, T]` from the definition, entry by entry."""
    length = t.shape[1] if causal else (t.shape[1] + 1) // 2
    matrix = np.zeros((t.shape[0], length, length), t.dtype)
    for i in range(length):
        for j in range(i + 1 if causal else length):
            matrix[:, i, j] = t[:, i - j] if causal else t[:, j - i + length - 1]
    return matrix


def truth(t, x, dy, causal):
    """(y, dt, dx) in float64, by the matrix and, for dt, by the sum over each diagonal."""
    matrix, length = dense(t, causal), x.shape[1]
    d_matrix = np.einsum("binc,bjnc->nij", dy, x)
    diagonals = [np.trace(d_matrix, r, axis1=1, axis2=2) for r in range(-length + 1, length)]
    dt = np.stack(diagonals[length - 1 :: -1] if causal else diagonals, axis=1)
    return np.einsum("nij,bjnc->binc", matrix, x), dt, np.einsum("nij,binc->bjnc", matrix, dy)


def value_and_gradients(call, t, x, dy):
    """(y, dt, dx) of `call`(t, x), jitted."""

    def both(t, x, dy):
        y, pull = jax.vjp(call, t, x)
        return y, *pull(dy)

    return jax.jit(both)(t, x, dy)


def assert_close(found, expected, tolerance):
    """Each array within `tolerance` of its largest entry."""
    for name, x, y in zip(("y", "dt", "dx"), found, expected, strict=True):
        worst = np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        assert worst < tolerance, f"{name}: {worst:.2g}"


ON_TPU = jax.default_backend() == "tpu"
LENGTHS = [1, 7, 63, 130, 300]
NAMES = ["reference", "xla"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_matrix_in_float64(name, length, causal):
    """Values and both gradients, in float32 to its rounding and in float64 to that one's."""
    arrays = inputs(length, causal)
    call = functools.partial(toeplitz_matmul, causal=causal, implementation=name)
    expected = truth(*arrays, causal)
    assert_close(value_and_gradients(call, *(jnp.asarray(a, jnp.float32) for a in arrays)), expected, 2e-6)
    with jax.enable_x64(True):
        found = value_and_gradients(call, *(jnp.asarray(a) for a in arrays))
    assert found[0].dtype == jnp.float64
    assert_close(found, expected, 1e-14)


def interpreted(t, x, *, causal, form, interpret=True):
    """The TPU kernels; on a TPU compiled."""
    return pallas_tpu.toeplitz_matmul(t, x, causal=causal, form=form, interpret=interpret and not ON_TPU)


EVERY = [(form, *case) for form in ("direct", "dft") for case in itertools.product((*LENGTHS, 600), (False, True))]
QUICK = {("direct", *case) for case in ((1, False), (130, True), (300, False), (600, True))}
QUICK |= {("dft", *case) for case in ((7, True), (300, False))}
FORMS = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY]


@pytest.mark.parametrize(("form", "length", "causal"), FORMS)
def test_tpu_kernels_equal_the_matrix(form, length, causal):
    """In float32 to its rounding. In bfloat16 y and dx to that of t and of the result, dt to that of a product of 16 bits at least."""
    t, x, dy = inputs(length, causal, heads=2)
    call = functools.partial(interpreted, causal=causal, form=form)
    found = value_and_gradients(call, *(jnp.asarray(a, jnp.float32) for a in (t, x, dy)))
    assert_close(found, truth(t, x, dy, causal), 2e-6)

    given = jnp.asarray(t, jnp.float32), *(jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
    found = value_and_gradients(call, *given)
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    expected = truth(*(np.asarray(a, np.float64) for a in given), causal)
    assert_close(found, expected, 2**-7)
    np.testing.assert_allclose(found[1], expected[1], atol=2**-16 * np.abs(expected[1]).max())


@pytest.mark.parametrize(
    ("most", "length", "factors"),
    [
        (16, 3000, (4, 16)),
        pytest.param(16, 1100, (2, 16), marks=pytest.mark.slow),
        pytest.param(128, 131_067, (16, 128), marks=pytest.mark.slow),
    ],
)
def test_a_third_factor(most, length, factors, monkeypatch):
    """As sequences of more than 8,192 tokens have; with `most` of 16 those of more than 1,024 have it."""
    monkeypatch.setattr(pallas_tpu_dft, "_MOST", most)
    t, x, dy = inputs(length, False, heads=1, channels=1)
    plan = pallas_tpu_dft.Plan(length, 2, jnp.dtype(jnp.float32))
    assert (plan.outer, plan.inner) == factors
    call = functools.partial(interpreted, causal=False, form="dft")
    found = value_and_gradients(call, *(jnp.asarray(a, jnp.float32) for a in (t, x, dy)))
    with jax.enable_x64(True):
        exact = functools.partial(toeplitz_matmul, implementation="xla")
        expected = [np.asarray(a) for a in value_and_gradients(exact, *map(jnp.asarray, (t, x, dy)))]
    assert_close(found, expected, 2e-6)


@pytest.mark.skipif(ON_TPU, reason="is about interpretation")
@pytest.mark.parametrize(("form", "causal"), [("direct", False), ("direct", True), ("dft", True)])
def test_no_kernel_revisits_a_block_or_reads_what_it_has_not_written(form, causal):
    """Two blocks of rows or more and two chunks of tokens, by an interpretation that finds what the plain one hides."""
    t, x, dy = inputs(600, causal, batch=3, heads=2, channels=50 if form == "direct" else 6)
    call = functools.partial(interpreted, causal=causal, form=form, interpret=pltpu.InterpretParams())
    found = value_and_gradients(call, *(jnp.asarray(a, jnp.float32) for a in (t, x, dy)))
    assert_close(found, truth(t, x, dy, causal), 2e-6)


def gradients(t, x, causal=False):
    call = functools.partial(toeplitz_matmul, causal=causal, implementation="pallas_tpu")
    return jax.jit(jax.grad(lambda t, x: call(t, x).astype(jnp.float32).sum(), argnums=(0, 1))).trace(t, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("length", "causal"), [(1, False), (300, True), (3000, False), (3000, True), (20_000, False)])
def test_lowers_for_tpu_without_a_tpu(length, causal, dtype):
    t = jax.ShapeDtypeStruct((3, length if causal else 2 * length - 1), jnp.float32)
    x = jax.ShapeDtypeStruct((2, length, 3, 64), dtype)
    assert "tpu_custom_call" in gradients(t, x, causal).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.skipif(ON_TPU, reason="this is a TPU")
def test_on_another_platform_it_fails_at_lowering():
    with pytest.raises(ValueError, match="interpret mode"):
        gradients(jnp.ones((2, 9)), jnp.ones((1, 5, 2, 4))).lower()


@pytest.mark.parametrize(
    ("chosen", "platform", "dtype", "length"),
    [
        ("pallas_tpu", "tpu", jnp.bfloat16, 512),
        ("pallas_tpu", "tpu", jnp.float32, 1),
        ("xla", "tpu", jnp.float64, 512),
        ("xla", "tpu", jnp.float32, 2**22),
        ("xla", "gpu", jnp.bfloat16, 512),
        ("xla", "cpu", jnp.float32, 512),
    ],
)
def test_what_is_chosen_where_nothing_is_named(chosen, platform, dtype, length):
    assert api.best(platform, length, jnp.dtype(dtype)) == chosen


@pytest.mark.parametrize(
    ("chosen", "length", "rows", "dtype", "causal"),
    [
        ("direct", 512, 128, jnp.float32, False),
        ("direct", 2048, 128, jnp.bfloat16, False),
        ("dft", 4096, 128, jnp.bfloat16, False),
        ("direct", 4096, 128, jnp.bfloat16, True),
        ("dft", 2048, 128, jnp.float32, False),
        ("dft", 1024, 8, jnp.float32, False),
        ("dft", 2**20, 1, jnp.bfloat16, True),
    ],
)
def test_the_form_is_chosen_by_length_rows_and_precision(chosen, length, rows, dtype, causal):
    assert pallas_tpu.cheapest(length, rows, jnp.dtype(dtype), causal) == chosen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_once(name, causal):
    """x, y and their gradients are bfloat16, t and its gradient float32."""
    t, x, dy = inputs(63, causal)
    t, (x, dy) = jnp.asarray(t, jnp.float32), (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
    call = functools.partial(toeplitz_matmul, causal=causal, implementation=name)
    found = value_and_gradients(call, t, x, dy)
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    expected = truth(*(np.asarray(a, np.float64) for a in (t, x, dy)), causal)
    # Half a unit in the last of eight bits; nothing that leaves in float32 has met a rounding.
    assert_close(found, expected, 2**-8)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-6 * np.abs(expected[1]).max())


def test_a_value_worked_out_before():
    """Four tokens; the table by look-back 3, 2, …, −3 is 0.7, 0.6, …, 0.1, and by j − i the same from the past on."""
    t = jnp.asarray([[0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    x = jnp.asarray([1, -1, 2, 0.5])[None, :, None, None]
    for name in NAMES:
        y = toeplitz_matmul(t, x, implementation=name)
        np.testing.assert_allclose(y[0, :, 0, 0], [0.55, 0.80, 1.05, 1.30], atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_shorter_sequence_sees_the_middle_of_the_table(causal):
    """And a shift of the input is a shift of the output, as far as the sequence goes."""
    t, x, _ = (jnp.asarray(a, jnp.float32) for a in inputs(40, causal))
    whole = toeplitz_matmul(t, x, causal=causal)
    later = toeplitz_matmul(t, jnp.pad(x, ((0, 0), (5, 0), (0, 0), (0, 0)))[:, :40], causal=causal)
    if causal:
        np.testing.assert_allclose(later[:, 5:], whole[:, :35], atol=1e-5)
    short = t[:, :30] if causal else t[:, 10:-10]
    ended = jnp.where(jnp.arange(40)[None, :, None, None] < 30, x, 0)
    expected = toeplitz_matmul(t, ended, causal=causal)[:, :30]
    np.testing.assert_allclose(toeplitz_matmul(short, x[:, :30], causal=causal), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_tap_shifts_the_sequence(name):
    """t that is 1 at j − i = −3 alone moves the sequence three tokens on; causal, with look-back 3, too."""
    _, x, _ = (jnp.asarray(a, jnp.float32) for a in inputs(20, False))
    moved = np.pad(np.asarray(x), ((0, 0), (3, 0), (0, 0), (0, 0)))[:, :20]
    two_sided, causal = jnp.zeros((3, 39)).at[:, 19 - 3].set(1), jnp.zeros((3, 20)).at[:, 3].set(1)
    np.testing.assert_allclose(toeplitz_matmul(two_sided, x, implementation=name), moved, atol=1e-6)
    np.testing.assert_allclose(toeplitz_matmul(causal, x, causal=True, implementation=name), moved, atol=1e-6)


def test_no_gradient_from_the_future_where_causal():
    t, x, _ = (jnp.asarray(a, jnp.float32) for a in inputs(20, True))
    dx = jax.grad(lambda x: toeplitz_matmul(t, x, causal=True)[:, 8].sum())(x)
    assert np.abs(dx[:, :9]).min() > 1e-4 and np.abs(dx[:, 9:]).max() < 1e-6


def test_rows_of_a_long_sequence():
    """At 2^17 tokens, a few tokens and a few table entries by their sums in float64."""
    length, causal = 2**17, False
    t, x, dy = inputs(length, causal, batch=1, heads=2, channels=1)
    call = functools.partial(toeplitz_matmul, causal=causal, implementation="xla")
    y, dt, dx = value_and_gradients(call, *(jnp.asarray(a, jnp.float32) for a in (t, x, dy)))
    for n in range(2):
        for i in (0, 1, 70_001, length - 1):
            row, column = t[n, length - 1 - i : 2 * length - 1 - i], t[n, i : i + length][::-1]
            # 2e-6 of the usual size of a sum of so many, √T.
            np.testing.assert_allclose(y[0, i, n, 0], row @ x[0, :, n, 0], atol=2e-6 * length**0.5)
            np.testing.assert_allclose(dx[0, i, n, 0], column @ dy[0, :, n, 0], atol=2e-6 * length**0.5)
        for r in (0, -50_000, length - 1):
            here = slice(max(0, -r), length - max(0, r))
            there = slice(max(0, r), length - max(0, -r))
            expected = dy[0, here, n, 0] @ x[0, there, n, 0]
            np.testing.assert_allclose(dt[n, r + length - 1], expected, atol=2e-6 * length**0.5)


@pytest.mark.cpu
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_length(causal):
    def peak(length):
        t = jax.ShapeDtypeStruct((2, length if causal else 2 * length - 1), jnp.float32)
        x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        loss = jax.grad(lambda t, x: (toeplitz_matmul(t, x, causal=causal) ** 2).sum(), argnums=(0, 1))
        return temporary_bytes(loss, t, x)

    assert_linear(peak, 4096)


def test_sizes_of_transforms():
    assert [xla.smooth_size(n) for n in (1, 2, 13, 259, 2**18 - 1, 2_000_001)] == [2, 2, 16, 270, 2**18, 2_025_000]
    assert [xla.power_of_two(n) for n in (1, 2, 13, 16, 259)] == [2, 2, 16, 16, 512]


def test_gradients_take_five_real_transforms():
    """x, dy and t forward, dx and dt back."""
    t, x, dy = (jnp.asarray(a, jnp.float32) for a in inputs(32, False))
    gradients = jax.jit(lambda t, x, dy: jax.vjp(toeplitz_matmul, t, x)[1](dy))
    kinds = re.findall(r"fft_type=(\w+)", gradients.lower(t, x, dy).compile().as_text())
    assert sorted(kinds) == ["IRFFT"] * 2 + ["RFFT"] * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_the_arguments(dtype):
    t, x = jnp.ones((3, 39)), jnp.ones((2, 20, 3, 4), dtype)
    kept = jax.tree.leaves(jax.eval_shape(lambda t, x: jax.vjp(toeplitz_matmul, t, x)[1], t, x))
    assert sorted((a.shape, a.dtype) for a in kept) == sorted((a.shape, a.dtype) for a in (x, t))


@pytest.mark.parametrize(("form", "causal"), [("xla", False), ("xla", True), ("direct", True), ("dft", False)])
def test_twice_run_gives_the_same_bits(form, causal):
    arrays = [jnp.asarray(a, jnp.float32) for a in inputs(130, causal)]
    xla_or_fused = toeplitz_matmul if form == "xla" else functools.partial(interpreted, form=form)
    call = functools.partial(xla_or_fused, causal=causal)
    for x, y in zip(*(value_and_gradients(call, *arrays) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("causal", [False, True])
def test_each_device_has_its_own_rows_and_heads(causal):
    """dt is summed over the devices of the batch; nothing is gathered."""
    mesh = Mesh(np.array(first(4)).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    t, x, dy = (np.asarray(a, np.float32) for a in inputs(20, causal, batch=4, heads=4))
    specs = (PartitionSpec("tensor"), *(PartitionSpec("data", None, "tensor"),) * 2)
    put = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((t, x, dy), specs, strict=True)]

    def both(t, x, dy):
        y, pull = jax.vjp(functools.partial(toeplitz_matmul, causal=causal, implementation="xla"), t, x)
        return y, *pull(dy)

    compiled = jax.jit(both).lower(*put).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(*put), truth(*(a.astype(np.float64) for a in (t, x, dy)), causal), 2e-6)


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("shape", [(1, 3, 2, 0), (0, 3, 2, 4)])
def test_without_channels_or_batch_it_is_empty(name, shape):
    t = jnp.ones((2, 5))
    y, pull = jax.vjp(functools.partial(toeplitz_matmul, implementation=name), t, jnp.ones(shape))
    dt, dx = pull(y)
    assert y.shape == dx.shape == shape and dt.shape == t.shape and not dt.any()


def ones(*shape):
    return jnp.ones(shape)


REFUSED = {
    r"x has shape \(2, 5, 4\), expected \[B, T, N, C\]": {"x": ones(2, 5, 4)},
    "x has shape .*at least one token": {"x": ones(2, 0, 4, 8)},
    r"t has shape \(4, 5\), expected \[4, 9\]: causal=False takes one row per head and 2T − 1": {"t": ones(4, 5)},
    r"t has shape \(4, 9\), expected \[4, 5\]: causal=True .* by look-back": {"causal": True},
    r"t has shape \(1, 9\), expected \[4, 9\]": {"t": ones(1, 9)},
    "t is int32, expected a floating": {"t": jnp.ones((4, 9), jnp.int32)},
    "x is int32, expected a floating": {"x": jnp.ones((2, 5, 4, 8), jnp.int32)},
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
    call = {"t": ones(4, 9), "x": ones(2, 5, 4, 8)} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        toeplitz_matmul(call.pop("t"), call.pop("x"), **call)


def test_what_the_tpu_kernels_do_not_compute_is_refused(our_own_checks):
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"in float32, not float64\. implementation='xla' does it"),
    ):
        toeplitz_matmul(ones(4, 9), ones(2, 5, 4, 8).astype(jnp.float64), implementation="pallas_tpu")
    x, t = jax.ShapeDtypeStruct((1, 2**22, 1, 1), jnp.float32), jax.ShapeDtypeStruct((1, 2**23 - 1), jnp.float32)
    with pytest.raises(ValueError, match=r"at most 1048576 tokens, not 4194304\. implementation='xla' does it"):
        jax.eval_shape(functools.partial(toeplitz_matmul, implementation="pallas_tpu"), t, x)
