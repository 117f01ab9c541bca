"""Our BERT against transformers' in PyTorch at the same random weights: every layer, pooled, logits, losses, gradients.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.peers import ours
from tests.peers.compare import check_gradients, check_outputs
from tests.peers.drawn import random_inputs, random_weight
from tests.peers.weights import to_ours
from zoo.models import preset

torch = pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

pytestmark = pytest.mark.peers

LAYERS = 2
# Sizes of transformers' BertConfig; the second has an epsilon that would show if a norm did not honour it.
CASES = {
    "pretraining": dict(hidden_size=32, num_attention_heads=2, intermediate_size=128, max_position_embeddings=13),
    "tanh, longer table": dict(
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=30,
        type_vocab_size=3,
        layer_norm_eps=0.02,
        hidden_act="gelu_pytorch_tanh",
    ),
    "masked_lm": dict(hidden_size=24, num_attention_heads=3, intermediate_size=96, max_position_embeddings=16),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def computed(request):
    """(inputs, their outputs, their gradients as our tree, our results)."""
    rng = np.random.default_rng(sorted(CASES).index(request.param))
    theirs = transformers.BertConfig(
        vocab_size=37,
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **CASES[request.param],
    )
    pairs = request.param != "masked_lm"
    model = (transformers.BertForPreTraining if pairs else transformers.BertForMaskedLM)(theirs)
    weights = {n: random_weight(rng, n, tuple(p.shape)) for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weights[name]))
    inputs = random_inputs(rng, vocabulary=37, types=theirs.type_vocab_size)
    if not pairs:
        del inputs["next_sentence_label"]
    out = model(**{n: torch.tensor(a, dtype=torch.long) for n, a in inputs.items()}, output_hidden_states=True)
    out.loss.backward()
    outputs = {"loss": out.loss, "hidden_states": torch.stack(out.hidden_states)}
    if pairs:
        outputs |= {"logits": out.prediction_logits, "sentence_logits": out.seq_relationship_logits}
        outputs["pooled"] = model.bert.pooler(out.hidden_states[-1])
    else:
        outputs["logits"] = out.logits
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    results = ours.run(our_config(theirs, pooler=pairs), inputs, to_ours(weights, "bert", LAYERS))
    return (
        inputs,
        {name: tensor.detach().numpy() for name, tensor in outputs.items()},
        to_ours(gradients, "bert", LAYERS),
        results,
    )


def our_config(theirs, *, pooler: bool) -> dict:
    return ours.config(
        {"name": "learned"},
        width=theirs.intermediate_size,
        approximate=theirs.hidden_act == "gelu_pytorch_tanh",
        epsilon=theirs.layer_norm_eps,
        vocab_size=theirs.vocab_size,
        model_dim=theirs.hidden_size,
        num_heads=theirs.num_attention_heads,
        num_layers=theirs.num_hidden_layers,
        max_length=theirs.max_position_embeddings,
        token_types=theirs.type_vocab_size,
        pooler=pooler,
    )


def test_outputs(computed):
    inputs, outputs, _, results = computed
    check_outputs(results, outputs, inputs["attention_mask"])


def test_gradients(computed):
    _, _, theirs, results = computed
    check_gradients(results.gradients, theirs)


def test_the_preset_has_their_defaults():
    theirs, ours_ = transformers.BertConfig(), preset("bert-base")
    expected = our_config(theirs, pooler=True)
    expected["model"] |= {
        "dropout": theirs.hidden_dropout_prob,
        "attention_dropout": theirs.attention_probs_dropout_prob,
        "arrangement": "post_norm",
    }
    del expected["model"]["pooler"], expected["feed_forward"]["approximate"]
    assert theirs.hidden_act == "gelu"
    assert ours_ == expected
