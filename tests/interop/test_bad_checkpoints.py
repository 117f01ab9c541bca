"""A checkpoint with something wrong: what is said, and that nothing is approximated, executed or allocated for it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.interop import small_checkpoints
from zoo.errors import UserError
from zoo.interop.load import tokenizer_in


def refused(directory: Path, **arguments) -> str:
    with pytest.raises(UserError) as error:
        zoo.load_pretrained(directory, **arguments)
    return str(error.value)


def test_every_key_without_a_place_is_listed(tmp_path):
    tensors = small_checkpoints.weights()
    tensors["bert.encoder.layer.1.attention.self.querry.weight"] = tensors.pop(
        "bert.encoder.layer.1.attention.self.query.weight"
    )
    tensors["bert.encoder.layer.0.output.dense.bias"] = np.zeros(7, np.float32)
    tensors["bert.embeddings.extra"] = np.zeros(3, np.float32)
    del tensors["cls.predictions.bias"]
    said = refused(small_checkpoints.write(tmp_path / "bert", tensors))
    assert "the weights are not those that config.json describes (bert)" in said
    assert (
        "layer.1.attention.self.query.weight is missing; is it bert.encoder.layer.1.attention.self.querry.weight?"
        in said
    )
    assert "bert.encoder.layer.0.output.dense.bias is [7], config.json describes [16]" in said
    assert "bert.embeddings.extra [3] has no place in this architecture" in said
    assert "cls.predictions.bias is missing" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(hidden_act="mish"), "hidden_act='mish' is not among what this zoo computes"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key' is not among"),
        (dict(is_decoder=True), "is_decoder=True is not among"),
        (dict(model_type="bertt"), "model_type 'bertt' is no architecture of this zoo; did you mean 'bert'"),
        (dict(model_type=None), "the key 'model_type', which names the architecture, is missing"),
        (
            dict(auto_map={"AutoModel": "code.Model"}),
            "names code of its own (auto_map: {'AutoModel': 'code.Model'}), which is never run",
        ),
        (dict(architectures=["BertForMultipleChoice"]), "the heads of 'BertForMultipleChoice' are not among ours"),
        (dict(architectures="BertModel"), "architectures must be a list of one class"),
        (dict(hidden_size="16"), "hidden_size must be of type int, but is '16'"),
        (dict(hidden_size=True), "hidden_size must be of type int, but is True"),
        (dict(num_attention_heads=3), "model_dim=16 is no multiple of num_heads=3"),
        (dict(hidden_size=10**12), "hidden_size=1000000000000 is larger than any model's"),
        (dict(num_hidden_layers=10**7), "describes 10000000 layers, the weights are 42 tensors"),
        (dict(num_hidden_layers=0), "num_layers must be at least 1"),
        (dict(vocab_size=10**7), "word_embeddings.weight is [17, 16], config.json describes [10000000, 16]"),
    ],
)
def test_settings(tmp_path, change, words):
    directory = small_checkpoints.write(tmp_path / "bert", **change)
    tracemalloc.start()
    said = refused(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in said and str(directory) in said
    assert peak < 50 * 2**20


def test_labels_that_are_not_the_classifiers(tmp_path):
    tensors = {n: t for n, t in small_checkpoints.weights().items() if not n.startswith("cls.")}
    tensors |= {"classifier.weight": np.zeros((3, 16), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    tensors |= {
        "bert.pooler.dense.weight": np.eye(16, dtype=np.float32),
        "bert.pooler.dense.bias": np.zeros(16, np.float32),
    }
    kind = dict(architectures=["BertForSequenceClassification"])
    two = small_checkpoints.write(tmp_path / "two", tensors, id2label={"0": "no", "1": "yes"}, **kind)
    assert "id2label names 2 labels, classifier.weight has 3 rows" in refused(two)
    gap = small_checkpoints.write(tmp_path / "gap", tensors, id2label={"0": "a", "1": "b", "3": "c"}, **kind)
    assert "must number its labels from 0 to 2" in refused(gap)
    unnamed = small_checkpoints.write(tmp_path / "unnamed", tensors, architectures=None)
    assert "the weights may be of classification or token_tagging; add it" in refused(unnamed)
    good = zoo.load_pretrained(
        small_checkpoints.write(tmp_path / "good", tensors, id2label={"0": "a", "1": "b", "2": "c"}, **kind)
    )
    assert good.labels == ("a", "b", "c") and good.heads[0].classes == 3


def test_an_output_table_that_is_not_the_token_table(tmp_path):
    tensors = small_checkpoints.weights()
    table = tensors["bert.embeddings.word_embeddings.weight"]
    same = small_checkpoints.write(tmp_path / "same", {**tensors, "cls.predictions.decoder.weight": table})
    assert zoo.load_pretrained(same).heads[0].name == "masked_lm"
    other = small_checkpoints.write(tmp_path / "other", {**tensors, "cls.predictions.decoder.weight": table + 1})
    assert "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight" in refused(other)


def test_a_vocabulary_of_the_wrong_size(tmp_path):
    directory = small_checkpoints.write(tmp_path / "bert")
    with (directory / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("one\nmore\n")
    assert "the tokenizer has 19 pieces, the token table 17 rows" in refused(directory)


def test_what_is_no_checkpoint(tmp_path):
    assert "no such directory" in refused(tmp_path / "nothing")
    assert "neither a checkpoint's directory nor a run folder: it has no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "model_type": "nezha"}')
    assert "the key 'model_type' stands there twice" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "must hold a JSON object" in refused(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5)
    assert "nested too deep" in refused(tmp_path)


def test_the_encoder_alone_of_a_class_that_is_not_ours(tmp_path):
    tensors = small_checkpoints.weights()
    directory = small_checkpoints.write(tmp_path / "bert", tensors, architectures=["BertForMultipleChoice"])
    bert = zoo.load_pretrained(directory, heads=False)
    assert bert.heads == () and bert.tokenizer is not None
    assert bert.apply(np.array([[2, 5, 3]])).logits is None


def test_keys_that_change_nothing_and_old_names_are_read(tmp_path):
    tensors = small_checkpoints.weights()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(160)[None]
    new = small_checkpoints.write(tmp_path / "new", tensors)
    odd = small_checkpoints.write(
        tmp_path / "old", old, use_cache=True, pooler_type="first_token_transform", directionality="bidi"
    )
    ids = np.array([[2, 5, 6, 3]])
    np.testing.assert_array_equal(
        zoo.load_pretrained(new).apply(ids).logits, zoo.load_pretrained(odd).apply(ids).logits
    )


def test_without_tokenizer_files(tmp_path):
    directory = small_checkpoints.write(tmp_path / "bert")
    (directory / "vocab.txt").unlink()
    assert zoo.load_pretrained(directory).tokenizer is None


def test_pieces_whose_ids_the_architecture_shifts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    (tmp_path / "sentencepiece.bpe.model").touch()
    with pytest.raises(UserError, match="gives the pieces of a SentencePiece model other ids"):
        tokenizer_in(tmp_path)


def test_wrong_input_to_apply(tmp_path):
    bert = zoo.load_pretrained(small_checkpoints.write(tmp_path / "bert"))
    for arguments, words in [
        (dict(input_ids=np.array([[17]])), "input_ids has values from 17 to 17; they must be 0 to 16"),
        (dict(input_ids=np.array([1, 2])), r"must be integers \[B, T\]"),
        (dict(input_ids=np.array([[1.5]])), r"must be integers \[B, T\]"),
        (
            dict(input_ids=np.array([[1, 2]]), attention_mask=np.array([[1]])),
            r"attention_mask is \[1, 1\], input_ids \[1, 2\]",
        ),
        (dict(input_ids=np.array([[1]]), token_type_ids=np.array([[2]])), "token_type_ids has values from 2 to 2"),
        (
            dict(input_ids=np.zeros((1, 161), int)),
            "encoding 'learned' has max_length=160 positions, the sequence has 161",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            bert.apply(**arguments)


def test_export_refuses_what_the_source_library_has_not(tmp_path):
    bert = zoo.load_pretrained(small_checkpoints.write(tmp_path / "bert"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="taken is there already"):
        zoo.export(bert, tmp_path / "taken")
    with pytest.raises(UserError, match="model_type 'bertt' is no architecture of this zoo; did you mean 'bert'"):
        zoo.export(bert, tmp_path / "new", model_type="bertt")
    assert not (tmp_path / "new").exists()


def test_memory_stays_below_twice_the_checkpoint(tmp_path):
    tensors, rows = small_checkpoints.weights(), 400_000
    tensors["bert.embeddings.word_embeddings.weight"] = np.ones((rows, 16), np.float32)
    tensors["cls.predictions.bias"] = np.ones(rows, np.float32)
    directory = small_checkpoints.write(tmp_path / "bert", tensors, vocab_size=rows)
    size = (directory / "model.safetensors").stat().st_size
    zoo.load_pretrained(directory)  # what is compiled or imported once
    tracemalloc.start()
    zoo.load_pretrained(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < 2 * size + 4 * 2**20, (size, peak)


def test_convert_there_and_back(tmp_path):
    from zoo.__main__ import main

    directory = small_checkpoints.write(tmp_path / "bert")
    assert main(["convert", str(directory), str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    ids = np.array([[2, 5, 6, 3]])
    logits = [zoo.load_pretrained(tmp_path / name).apply(ids).logits for name in ("bert", "run", "again")]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    encoder = zoo.load_pretrained(tmp_path / "run", heads=False)
    assert encoder.heads == () and set(encoder.params) == {"model"}
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert described["architectures"] == ["BertForMaskedLM"] and described["vocab_size"] == 17
