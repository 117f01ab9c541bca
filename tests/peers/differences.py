"""How far our model is from the source library's: in outputs, in gradients, and in what that library computes from our export."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import zoo
from tests.peers import checkpoints
from zoo.interop import parameters
from zoo.interop.architectures import architecture
from zoo.interop.pretrained import Pretrained
from zoo.interop.weights import open_weights

# At padding nobody reads what is computed, and libraries differ.
BY_TOKEN = ("hidden", "logits")


def of_outputs(made: checkpoints.Made, ours: Pretrained) -> float:
    """The largest difference of an output at a real token; every output of theirs must be there."""
    assert np.abs(made.outputs["hidden"]).max() > 0.1
    found = ours.apply(**made.inputs)
    return of_arrays(found._asdict(), made.outputs, made.inputs["attention_mask"] > 0)


def of_gradients(made: checkpoints.Made, ours: Pretrained) -> float:
    """The largest difference of a gradient, relative to the largest gradient; of the sum of all outputs in random proportions."""
    rng, real = np.random.default_rng(1), made.inputs["attention_mask"]
    weights = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in made.outputs.items()}
    for name in BY_TOKEN:
        if name in weights and weights[name].shape[:2] == real.shape:
            weights[name] *= real.reshape(real.shape + (1,) * (weights[name].ndim - 2))
    theirs = checkpoints.run(made.model, made.inputs)
    sum((theirs[name] * torch.tensor(weight)).sum() for name, weight in weights.items()).backward()
    expected = {n: p.grad.numpy() for n, p in made.model.named_parameters() if p.grad is not None}
    found = _in_their_names(_gradients(made, ours, weights), ours, expected)
    # A tied table goes by the name that torch met first; without the tie the library has a bias that it does not use.
    tied = architecture(ours.architecture, "test").tied
    expected = {name if name in found else tied.get(name, name): gradient for name, gradient in expected.items()}
    if not set(expected) <= set(found):
        expected = _saved_gradients(made.model)
    assert set(expected) <= set(found) <= {*expected, *tied.values()}, set(expected) ^ set(found)
    size = max(float(np.abs(gradient).max()) for gradient in expected.values())
    return max(float(np.abs(found[name] - gradient).max()) for name, gradient in expected.items()) / size


def of_export(made: checkpoints.Made, ours: Pretrained, before: Path, after: Path) -> float:
    """The largest difference of an output that the source library computes from our export; `before` is what was loaded.

    Every tensor must be taken, and config.json must say again what it said.
    """
    exported = zoo.export(ours, after)
    theirs, report = type(made.model).from_pretrained(exported, output_loading_info=True, attn_implementation="eager")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        again = {name: tensor.numpy() for name, tensor in checkpoints.run(theirs.eval(), made.inputs).items()}
    said, says = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (before, exported))
    changed = {key for key in says if key in said and said[key] != says[key]} - {"transformers_version"}
    assert not changed, {key: (said[key], says[key]) for key in changed}
    return of_arrays(again, made.outputs, made.inputs["attention_mask"] > 0)


def of_arrays(found: Mapping[str, object], expected: Mapping[str, np.ndarray], real: np.ndarray) -> float:
    """The largest difference of these arrays, where they are of tokens at the real ones."""
    return max(_apart(name, found[name], array, real) for name, array in expected.items())


def _saved_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients by the names that their parameters have in a file, where those are not the modules' (Nomic BERT)."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
            parameter.copy_(original.grad)
    with tempfile.TemporaryDirectory() as folder:
        copied.save_pretrained(folder)
        with open_weights(Path(folder)) as weights:
            return {name: weights.read(name) for name in weights.names()}


def _apart(name: str, found: object, expected: np.ndarray, real: np.ndarray) -> float:
    assert found is not None, f"{name} is missing"
    found = np.asarray(found)
    assert found.shape == expected.shape, name
    if name in BY_TOKEN and found.shape[:2] == real.shape:
        found, expected = found[real], expected[real]
    return float(np.abs(found - expected).max())


def _gradients(made: checkpoints.Made, ours: Pretrained, weights: dict[str, np.ndarray]) -> dict:
    taken = ("input_ids", "attention_mask", "token_type_ids")
    arguments = [jnp.asarray(made.inputs[n], jnp.int32) if n in made.inputs else None for n in taken]

    def total(params: dict) -> jax.Array:
        out = ours.module.apply({"params": params}, *arguments)
        return sum((getattr(out, name) * weight).sum() for name, weight in weights.items())

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(total))(ours.params)


def _in_their_names(tree: dict, ours: Pretrained, known: Container[str]) -> dict[str, np.ndarray]:
    """A head that has other names in some files gets those that are `known`."""
    family, names = architecture(ours.architecture, "test"), [head.name for head in ours.heads]
    mapped = parameters.written_out(family, ours.config, names, ours.model.stages, ours.parameter_shapes(), known)
    bare = "" if names else family.prefix
    return {name.removeprefix(bare): array for name, array in parameters.store(tree, family, mapped)}
