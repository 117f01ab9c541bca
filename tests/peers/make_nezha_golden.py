"""Writes tests/models/golden/nezha.npz: what the NEZHA of transformers computes, at random weights.

NEZHA left transformers with version 5; 4.57.6 is the last with it, and needs an environment of its own:

    python3.11 -m venv ../nezha-venv && ../nezha-venv/bin/pip install torch==2.13.0 transformers==4.57.6
    ../nezha-venv/bin/python -m tests.peers.make_nezha_golden

The file holds, for each case, the inputs, every parameter, and the results: `<case>/input/…`, `<case>/weight/<their name>`,
`<case>/output/…` and `<case>/gradient/<their name>`, all float32 or int32. Run again it holds the same inputs and weights
(NumPy's seeds); results may differ in the last digits on another processor.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers.models.deprecated.nezha import NezhaConfig, NezhaForMaskedLM, NezhaForPreTraining

from tests.peers.drawn import LENGTH, random_inputs, random_weight

GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "nezha.npz"
# Rows are longer than the clipping distance, so that pairs of tokens are clipped on both sides.
CASES = {
    "pretraining": dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, max_relative_position=4),
    "masked_lm": dict(
        hidden_size=16, num_attention_heads=4, intermediate_size=32, max_relative_position=3, hidden_act="gelu_new"
    ),
}
VOCABULARY, LAYERS = 37, 2


def main() -> None:
    arrays = {}
    for index, (case, sizes) in enumerate(CASES.items()):
        arrays.update({f"{case}/{name}": array for name, array in run(case, sizes, seed=index).items()})
    save(arrays)
    print(f"{len(arrays)} arrays, {GOLDEN.stat().st_size} bytes in {GOLDEN}")


def run(case: str, sizes: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    config = NezhaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS,
        max_position_embeddings=LENGTH,
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **sizes,
    )
    model = (NezhaForPreTraining if case == "pretraining" else NezhaForMaskedLM)(config)
    weights = {name: random_weight(rng, name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(weights[name]))
    inputs = random_inputs(rng, vocabulary=VOCABULARY)
    if case == "masked_lm":
        del inputs["next_sentence_label"]
    given = {name: torch.tensor(array, dtype=torch.long) for name, array in inputs.items()}
    out = model(**given, output_hidden_states=True)
    out.loss.backward()
    outputs = {"loss": out.loss, "hidden_states": torch.stack(out.hidden_states)}
    if case == "pretraining":
        outputs |= {"logits": out.prediction_logits, "sentence_logits": out.seq_relationship_logits}
        outputs["pooled"] = model.nezha.pooler(out.hidden_states[-1])
    else:
        outputs["logits"] = out.logits
    return {
        **{f"input/{name}": array for name, array in inputs.items()},
        **{f"weight/{name}": array for name, array in weights.items()},
        **{f"output/{name}": tensor.detach().numpy() for name, tensor in outputs.items()},
        **{f"gradient/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()},
    }


def save(arrays: dict[str, np.ndarray]) -> None:
    """An .npz that is the same bytes for the same arrays: `np.savez` would write the time into it."""
    with zipfile.ZipFile(GOLDEN, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            entry = zipfile.ZipInfo(name + ".npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
