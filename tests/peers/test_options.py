"""Single layers of public models against transformers' in PyTorch at the same random weights: heads, pooler, convolution.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from tests.peers.drawn import random_weight
from zoo.encodings import Dims, Place
from zoo.layers.activations import activate
from zoo.layers.convolution import Convolution
from zoo.layers.norms import LayerNorm
from zoo.mixers import Style
from zoo.tasks.heads import DiscriminatorHead, MaskedLMHead

torch = pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

pytestmark = pytest.mark.peers

ZEROS = jax.nn.initializers.zeros
D, V = 12, 29
RNG = np.random.default_rng(0)
HIDDEN, BESIDE = RNG.normal(size=(2, 2, 7, D)).astype(np.float32)
REAL = np.arange(7) < np.array([[7], [4]])


def drawn(module):
    """The module in evaluation with random weights, and these by name, kernels as ours."""
    module.eval()
    weights = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            array = random_weight(RNG, name, tuple(parameter.shape))
            parameter.copy_(torch.tensor(array))
            weights[name] = array.T if array.ndim > 1 else array
    return weights


def close(ours, theirs):
    # Values of size one to three after one or two products of 12 and 36 numbers.
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kernel", "groups", "activation"), [(3, 1, "gelu"), (5, 3, "tanh")])
def test_the_convolution_of_deberta_v2(kernel, groups, activation):
    from transformers.models.deberta_v2.modeling_deberta_v2 import ConvLayer

    config = transformers.DebertaV2Config(
        hidden_size=D, conv_kernel_size=kernel, conv_groups=groups, conv_act=activation
    )
    theirs = ConvLayer(config)
    weights = drawn(theirs)
    # There pads are zero before: the embeddings are multiplied with the mask.
    hidden = torch.tensor(HIDDEN * REAL[..., None])
    expected = theirs(hidden, torch.tensor(BESIDE), torch.tensor(REAL.astype(np.int64)))
    segments = REAL.astype(np.int32)
    dims = Dims(model_dim=D, num_heads=1, num_kv_heads=1, head_dim=D, num_layers=1, max_length=7)
    params = {"kernel": weights["conv.weight"], "bias": weights["conv.bias"]}
    with jax.default_matmul_precision("highest"):
        added = (
            Convolution(kernel, groups, activation)
            .module(dims, Style())
            .apply(
                {"params": params},
                HIDDEN,
                AttentionMask(query_segments=segments, key_segments=segments),
                Place(Positions.arange(7)),
            )
        )
    norm = {"scale": weights["LayerNorm.weight"], "bias": weights["LayerNorm.bias"]}
    ours = LayerNorm(config.layer_norm_eps).module(np.float32).apply({"params": norm}, BESIDE + added)
    close(ours[REAL], expected[REAL])


def test_the_discriminator_of_electra():
    from transformers.models.electra.modeling_electra import ElectraDiscriminatorPredictions

    theirs = ElectraDiscriminatorPredictions(transformers.ElectraConfig(hidden_size=D))
    weights = drawn(theirs)
    params = {
        ours: {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}
        for ours, name in (("dense", "dense"), ("output", "dense_prediction"))
    }
    ours = DiscriminatorHead("gelu", np.float32, ZEROS).apply({"params": params}, HIDDEN)
    close(ours, theirs(torch.tensor(HIDDEN)))


def test_the_head_of_modernbert():
    """Before the vocabulary in masked LM, and over [CLS] as its pooler, where activation and norm stand in the same order."""
    from transformers.models.modernbert.modeling_modernbert import ModernBertPredictionHead

    theirs = ModernBertPredictionHead(transformers.ModernBertConfig(hidden_size=D, num_attention_heads=2))
    weights = drawn(theirs)
    expected = theirs(torch.tensor(HIDDEN))
    norm = {"scale": weights["norm.weight"]}
    params = {"dense": {"kernel": weights["dense.weight"]}, "norm": norm}
    head = MaskedLMHead(D, "gelu", 1e-5, np.float32, ZEROS, transform_bias=False, output_bias=False)
    table = RNG.normal(size=(V, D)).astype(np.float32)
    close(head.apply({"params": params}, HIDDEN, table), expected @ torch.tensor(table).T)
    pooled = activate("gelu", HIDDEN @ weights["dense.weight"])
    close(LayerNorm(1e-5, use_bias=False).module(np.float32).apply({"params": norm}, pooled), expected)
