"""Our mixed attention, in a whole model, against transformers' ConvBERT in PyTorch at the same random weights, padding among the tokens.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers import ours
from tests.peers.compare import check_gradients
from tests.peers.drawn import random_inputs, random_weight
from tests.peers.weights import convbert_layer, to_ours
from zoo.models import build

torch = pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

pytestmark = pytest.mark.peers

LAYERS = 2
# In the second 5 heads are more than head_ratio divides, and the convolution is narrower than in any checkpoint.
CASES = {
    "base": dict(hidden_size=48, num_attention_heads=4, intermediate_size=64),
    "medium-small": dict(
        hidden_size=40, num_attention_heads=5, intermediate_size=80, num_groups=2, head_ratio=2, conv_kernel_size=3
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_gradients(case):
    """Within 1e-5 at every real token, though what stands in padding reaches them through the windows."""
    rng = np.random.default_rng(sorted(CASES).index(case))
    theirs = transformers.ConvBertConfig(
        vocab_size=37,
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=13,
        embedding_size=CASES[case]["hidden_size"],
        **CASES[case],
    )
    model = transformers.ConvBertModel(theirs)
    weights = {name: random_weight(rng, name, tuple(p.shape)) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weights[name]))
    inputs = random_inputs(rng, vocabulary=37)
    names = ("input_ids", "attention_mask", "token_type_ids")
    out = model(**{n: torch.tensor(inputs[n], dtype=torch.long) for n in names}, output_hidden_states=True)
    cotangent = (
        rng.standard_normal(out.last_hidden_state.shape).astype(np.float32) * inputs["attention_mask"][..., None]
    )
    (out.last_hidden_state * torch.tensor(cotangent)).sum().backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    mixer = {"name": "mixed_attention", "pads": "tokens"}
    mixer |= {"head_ratio": theirs.head_ratio, "width": theirs.conv_kernel_size}
    config = ours.config({"name": "learned"}, width=theirs.intermediate_size, approximate=False, epsilon=1e-12)
    config["mixer"], config["feed_forward"]["groups"] = mixer, theirs.num_groups
    config["model"] |= dict(vocab_size=37, model_dim=theirs.hidden_size, num_heads=theirs.num_attention_heads)
    config["model"] |= dict(num_layers=LAYERS, max_length=13, pooler=False)
    module = build(config)

    def tree(arrays):
        named = {f"convbert.{name}": array for name, array in arrays.items()}
        return to_ours(named, "convbert", LAYERS, convbert_layer(theirs.num_groups))["model"]

    given = {name: jnp.asarray(inputs[name]) for name in names}

    @jax.jit
    def run(params):
        def loss(params):
            found = module.apply(
                {"params": params},
                given["input_ids"],
                token_type_ids=given["token_type_ids"],
                segment_ids=given["attention_mask"],
                hidden_states=True,
            )
            return (found.hidden * cotangent).sum(), found.hidden_states

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        (_, states), found = jax.device_get(run(jax.tree.map(jnp.asarray, tree(weights))))
    real = inputs["attention_mask"].astype(bool)
    expected = torch.stack(out.hidden_states).detach().numpy()
    np.testing.assert_allclose(states[:, real], expected[:, real], rtol=0, atol=1e-5)
    check_gradients(found, tree(gradients))
