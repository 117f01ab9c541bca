"""Every architecture against the source library at random weights: loaded, run, differentiated, exported and loaded there again.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.interop import parameters
from zoo.interop.architectures import architecture

pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

import torch  # noqa: E402

from tests.peers import checkpoints  # noqa: E402

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
# At padding nobody reads what is computed, and libraries differ.
BY_TOKEN = ("hidden", "logits")


@pytest.fixture(scope="module", params=sorted(checkpoints.CASES))
def case(request, tmp_path_factory):
    """(the source's model, inputs and outputs; its directory; ours)."""
    made = checkpoints.make(checkpoints.CASES[request.param], seed=len(request.param))
    directory = tmp_path_factory.mktemp("checkpoint")
    made.model.save_pretrained(directory)
    return made, directory, zoo.load_pretrained(directory)


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    if name in BY_TOKEN and ours.shape[:2] == mask.shape:
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    return float(np.abs(ours - theirs).max())


def compare(ours, theirs: dict[str, np.ndarray], mask: np.ndarray) -> None:
    assert np.abs(theirs["hidden"]).max() > 0.1
    for name, expected in theirs.items():
        found = getattr(ours, name)
        assert found is not None, name
        assert difference(name, found, expected, mask) < TOLERANCE, name


def test_outputs(case):
    made, _, ours = case
    compare(ours.apply(**made.inputs), made.outputs, made.inputs["attention_mask"])


def test_gradients(case):
    made, _, ours = case
    weights = {n: np.random.default_rng(1).standard_normal(a.shape).astype(np.float32) for n, a in made.outputs.items()}
    real = made.inputs["attention_mask"]
    for name in BY_TOKEN:
        if name in weights and weights[name].shape[:2] == real.shape:
            weights[name] *= real.reshape(real.shape + (1,) * (weights[name].ndim - 2))
    theirs = checkpoints.run(made.model, made.inputs)
    sum((theirs[name] * torch.tensor(weight)).sum() for name, weight in weights.items()).backward()

    taken = ("input_ids", "attention_mask", "token_type_ids")
    arguments = [jnp.asarray(made.inputs[n], jnp.int32) if n in made.inputs else None for n in taken]

    def loss(params):
        out = ours.module.apply({"params": params}, *arguments)
        return sum((getattr(out, name) * weight).sum() for name, weight in weights.items())

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(loss))(ours.params)
    family = architecture(ours.architecture, "test")
    names = [head.name for head in ours.heads]
    mapped = parameters.written_out(family, ours.config, names, ours.model.stages, ours.parameter_shapes())
    gradients = dict(parameters.store(found, family, mapped))
    expected = {n: p.grad.numpy() for n, p in made.model.named_parameters() if p.grad is not None}
    if not names:
        gradients = {n.removeprefix(family.prefix): g for n, g in gradients.items()}
    assert set(expected) == set(gradients)
    size = max(np.abs(g).max() for g in expected.values())
    apart = {n: float(np.abs(gradients[n] - g).max()) / size for n, g in expected.items()}
    assert max(apart.values()) < 1e-4, {n: d for n, d in apart.items() if d >= 1e-4}


def test_exported_and_loaded_there(case, tmp_path):
    made, directory, ours = case
    out = zoo.export(ours, tmp_path / "exported")
    theirs, report = type(made.model).from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        again = {n: t.numpy() for n, t in checkpoints.run(theirs.eval(), made.inputs).items()}
    for name, expected in made.outputs.items():
        assert difference(name, again[name], expected, made.inputs["attention_mask"]) < 1e-6, name
    before, after = (json.loads(Path(d, "config.json").read_text()) for d in (directory, out))
    assert after["architectures"] == before["architectures"]
    assert {k: v for k, v in after.items() if k in before and before[k] != v and k != "transformers_version"} == {}
