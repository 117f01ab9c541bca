"""Files of weights that torch, safetensors and transformers write and read: the same values with us, both ways.

Needs the extra `peers`: `make test-peers`.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from tests.interop import mutations
from zoo.errors import UserError
from zoo.interop.weights import open_weights, write_weights

torch = pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")
import safetensors.torch  # noqa: E402

pytestmark = pytest.mark.peers

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "bfloat16", "float32", "float64"]
VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "sliced": lambda t: t[1:, ::2, 1],
    "narrow": lambda t: t.narrow(2, 1, 2),
    "permuted": lambda t: t.permute(1, 2, 0)[:, None],
    "one": lambda t: t[1, 1, 1],
    "flat": lambda t: t.reshape(-1),
    "empty": lambda t: t[:, 1:1],
    "diagonal": lambda t: t[0].diagonal(),
    "windows": lambda t: t.reshape(-1).as_strided((3, 4), (2, 1), 1),
    "expanded by one": lambda t: t.expand(1, 1, *t.shape),
}


def drawn():
    """(each dtype, in each view), and so that none but the bits are compared, every bit pattern may come."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        shape, wanted = (2, 4, 3), getattr(torch, dtype)
        base = torch.randint(
            0, 2 if dtype == "bool" else 256, (24 * wanted.itemsize,), generator=generator, dtype=torch.uint8
        )
        base = base.view(wanted).reshape(shape)
        tensors |= {f"{dtype}.{name}": view(base) for name, view in VIEWS.items()}
    return tensors


def same(weights, tensors):
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        found = weights.read(name)
        assert str(tensor.dtype) == f"torch.{found.dtype.name}" and tuple(tensor.shape) == found.shape, name
        assert (
            tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
            == found.tobytes()
        ), name


def test_every_dtype_and_view_that_torch_saves(tmp_path):
    tensors = drawn()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with open_weights(tmp_path) as weights:
        same(weights, tensors)
    safetensors.torch.save_file({n: t.contiguous().clone() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        same(weights, tensors)


def test_what_we_write_is_read_by_safetensors_for_torch(tmp_path):
    tensors = drawn()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "ours").mkdir()
    with open_weights(tmp_path) as weights:
        write_weights(tmp_path / "ours", ((name, weights.read(name)) for name in weights))
    found = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    with open_weights(tmp_path) as weights:
        same(weights, found)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=24, num_attention_heads=2, intermediate_size=40, num_hidden_layers=2
    )
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_what_transformers_writes(tmp_path, shard):
    model = bert().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "1GB" else 3)
    state = model.state_dict()
    with open_weights(tmp_path) as weights:
        assert "bert.embeddings.word_embeddings.weight" in weights
        same(weights, {name: state[name] for name in weights})


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_what_we_write_is_read_by_transformers(tmp_path, limit):
    model = bert()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    write_weights(tmp_path, state, max_shard_bytes=limit)
    model.config.save_pretrained(tmp_path)
    again, said = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])


def test_tied_tensors_parameters_and_metadata(tmp_path):
    model = bert()
    for state in (model.state_dict(), dict(model.named_parameters()), model.state_dict(keep_vars=True)):
        torch.save(state, tmp_path / "pytorch_model.bin")
        with open_weights(tmp_path) as weights:
            same(weights, state)


def hooked(parameter):
    parameter.note = "an attribute of its own"
    return parameter


REFUSED = {
    "whole model": (lambda: torch.nn.Linear(2, 2), "the global 'torch.nn.modules.linear.Linear'"),
    "training state": (
        lambda: {
            "epoch": 3,
            "model": bert().state_dict(),
            "optimizer": torch.optim.AdamW(bert().parameters()).state_dict(),
        },
        "its tensors are nested under the key 'model'",
    ),
    "expanded": (lambda: {"x": torch.zeros(1).expand(10)}, "tensor 'x' has 10 elements, more than its storage"),
    "complex": (lambda: {"x": torch.zeros(1, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
    "float8": (lambda: {"x": torch.zeros(1, dtype=torch.float8_e4m3fn)}, "'torch.float8_e4m3fn'"),
    "sparse": (lambda: {"x": torch.eye(2).to_sparse()}, "'torch._utils._rebuild_sparse_tensor'"),
    "meta": (lambda: {"x": torch.zeros(1, device="meta")}, "'torch._utils._rebuild_meta_tensor_no_storage'"),
    "attribute": (
        lambda: {"x": hooked(torch.nn.Parameter(torch.zeros(1)))},
        "'torch._utils._rebuild_parameter_with_state'",
    ),
    "NumPy": (lambda: {"x": np.zeros(1)}, r"'numpy\."),
    "negated": (lambda: {"x": torch._neg_view(torch.ones(2))}, "_rebuild_tensor_v2 with other arguments"),
    "device": (lambda: {"x": torch.device("cpu")}, "'torch.device'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_else_torch_saves_is_refused_by_name(tmp_path, case):
    make, message = REFUSED[case]
    torch.save(make(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_other_formats_of_torch_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"as torch wrote before 1.6"):
        open_weights(tmp_path)
    torch.save(torch.load(path, weights_only=True), path)  # as the message says
    with open_weights(tmp_path) as weights:
        assert weights.read("x") == 0
    torch.save({"x": torch.zeros(1)}, path, pickle_protocol=4)
    with pytest.raises(UserError, match=r"its pickle is of protocol 4; torch.save writes 2"):
        open_weights(tmp_path)


def test_what_we_take_of_spoiled_archives_torch_reads_alike(tmp_path):
    path, taken, end = tmp_path / "pytorch_model.bin", 0, time.monotonic() + 5
    for number in range(10**6):
        if time.monotonic() > end:
            break
        rng = random.Random(number)
        path.write_bytes(mutations.rewritten(rng, rng.choice(mutations.torch_archives()), pickle_alone=True))
        try:
            with open_weights(tmp_path) as weights:
                same(weights, torch.load(path, map_location="cpu", weights_only=True))
            taken += 1
        except UserError:
            pass
        except BaseException as error:
            error.add_note(f"seed {number}")
            raise
    assert taken > 5
