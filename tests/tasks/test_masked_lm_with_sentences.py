"""Masked LM with next-sentence or sentence-order prediction: features, both losses and their weights, scores, refusals."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.standins import CLS, MASK, PAD, SEP, LetterTokenizer, ListSource, TinyEncoder, stack
from zoo import data
from zoo.data.pipeline import TRAINING, Pipeline, feature_rng
from zoo.data.tokenizers import load_tokenizer
from zoo.errors import UserError
from zoo.models import build
from zoo.models.presets import preset
from zoo.tasks import registry
from zoo.tasks.masked_lm import MaskedLM
from zoo.tasks.masked_lm_with_sentences import MaskedLMWithSentences

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
VOCABULARY = LetterTokenizer.vocabulary
TEXT = ListSource(
    train=[
        {"text": "ab cd efgh\nij kl mnop qr\nst"},
        {"text": "st uv wx\nyz ab cdef gh"},
        {"text": "one"},
        {"text": "qr st uvwx\nyz\nab cd\nef gh ijkl mn"},
    ]
    * 3
)


def make(**fields):
    return MaskedLMWithSentences(**{"max_length": 16, "rate": 0.3, **fields})


def rows_of(task, directory, epoch=0):
    examples = task.examples(TEXT, "train", LetterTokenizer(), directory).at_epoch(epoch)
    return [
        (examples[k], task.features(examples[k], feature_rng(0, TRAINING, epoch, k), VOCABULARY))
        for k in range(len(examples))
    ]


@pytest.mark.parametrize("objective", ["nsp", "sop"])
def test_features(tmp_path, objective):
    task = make(objective=objective, whole_word=True, replace=(1.0, 0.0, 0.0))
    rows = rows_of(task, tmp_path)
    shapes = {
        **dict.fromkeys(("input_ids", "segment_ids", "token_type_ids"), (16,)),
        **dict.fromkeys(("masked_positions", "masked_labels", "masked_weights"), (5,)),  # ceil(0.3 · 16)
        **dict.fromkeys(("sentence_label", "sentence_weight"), ()),
    }
    for example, row in rows:
        assert {name: value.shape for name, value in row.items()} == shapes
        ids = example["input_ids"]
        at = row["masked_positions"][row["masked_weights"] > 0]
        assert not np.isin(ids[at], (PAD, CLS, SEP)).any()
        np.testing.assert_array_equal(row["masked_labels"][: len(at)], ids[at])
        np.testing.assert_array_equal(np.flatnonzero(row["input_ids"] != ids), at)
        # Words are hidden whole.
        word = np.cumsum(example["word_starts"])
        hidden = row["input_ids"] == MASK
        assert all(hidden[word == w].all() for w in set(word[hidden]))
    labels = {int(row["sentence_label"]) for _, row in rows}
    weights = {float(row["sentence_weight"]) for _, row in rows}
    assert labels == {0, 1} and weights == ({1.0} if objective == "nsp" else {0.0, 1.0})


def test_rows_repeat_and_differ_by_epoch(tmp_path):
    task = make()
    first, again, next_epoch = (rows_of(task, tmp_path, epoch) for epoch in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    same = [np.array_equal(a["input_ids"], b["input_ids"]) for (_, a), (_, b) in zip(first, next_epoch, strict=True)]
    assert np.mean(same) < 0.3
    assert len(list(tmp_path.iterdir())) == 1
    MaskedLM(max_length=16).examples(TEXT, "train", LetterTokenizer(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # one store serves both tasks


def test_batches_through_the_pipeline(tmp_path):
    task = make()
    examples = task.examples(TEXT, "train", LetterTokenizer(), tmp_path)
    pipeline = Pipeline(examples, lambda e, rng: task.features(e, rng, VOCABULARY), seed=0, batch_size=4)
    for step in (0, 9):
        batch = pipeline.batch(step)
        chex.assert_shape([batch["sentence_label"], batch["sentence_weight"]], (4,))
        chex.assert_trees_all_equal(batch, pipeline.batch(step))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SOP, whose two denominators have nothing in common: rows of one segment count for the masks alone."""
    task = make(objective="sop")
    rows = [row for _, row in rows_of(task, tmp_path_factory.mktemp("pairs"))]
    order = sorted(range(len(rows)), key=lambda k: rows[k]["sentence_weight"])
    batch = stack([rows[k] for k in (*order[:2], *order[-4:])])
    assert batch["sentence_weight"].tolist() == [0, 0, 1, 1, 1, 1] and set(batch["sentence_label"][2:]) == {0, 1}
    module = task.module(TinyEncoder())
    return module, jax.jit(module.init)(jax.random.key(0), batch), batch, jax.jit(module.apply)


def test_heads_lie_under_their_objectives(trained):
    _, variables, _, _ = trained
    assert jax.tree.map(jnp.shape, variables["params"]["heads"]) == {
        "masked_lm": {
            "dense": {"kernel": (8, 6), "bias": (6,)},
            "norm": {"scale": (6,), "bias": (6,)},
            "bias": (40,),
        },
        "sop": {"output": {"kernel": (8, 2), "bias": (2,)}},
    }


def test_losses_equal_a_dense_recomputation(trained):
    _, variables, batch, apply = trained
    output = apply(variables, batch)
    params = variables["params"]
    alone = MaskedLM(max_length=16).module(TinyEncoder())
    heads = {"masked_lm": params["heads"]["masked_lm"]}
    expected = jax.jit(alone.apply)({"params": {"model": params["model"], "heads": heads}}, batch)
    chex.assert_trees_all_close(output.losses["masked_lm"], expected.losses["masked_lm"], rtol=1e-6)
    assert output.losses["masked_lm"][1] == batch["masked_weights"].sum()

    inputs = {name: batch[name] for name in ("segment_ids", "token_type_ids")}
    pooled = TinyEncoder().apply({"params": params["model"]}, batch["input_ids"], **inputs).pooled
    logits = np.asarray(pooled, np.float64) @ np.asarray(params["heads"]["sop"]["output"]["kernel"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    losses = -log_p[np.arange(6), batch["sentence_label"]] * batch["sentence_weight"]
    total, weight = output.losses["sop"]
    chex.assert_trees_all_close(total, np.float32(losses.sum()), rtol=1e-5)
    assert weight == 4
    chex.assert_trees_all_close(output.predictions["sentence_loss"], losses.astype(np.float32), rtol=1e-5)
    correct = (logits.argmax(1) == batch["sentence_label"]) * batch["sentence_weight"]
    chex.assert_trees_all_equal(output.predictions["sentence_correct"], correct.astype(np.float32))


def test_the_pooled_output_knows_the_segments(trained):
    _, variables, batch, apply = trained
    other = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}
    assert apply(variables, batch).losses["sop"][0] != apply(variables, other).losses["sop"][0]


def test_two_micro_batches_are_the_big_one(trained):
    """Both sums and both weights add up, and so does the gradient once the whole batch's weights divide."""
    module, variables, batch, _ = trained

    def totals(params, batch):
        return {name: jnp.stack(loss) for name, loss in module.apply({"params": params}, batch).losses.items()}

    def loss(params, batch, weights):
        return sum(total / weights[name] for name, (total, _) in totals(params, batch).items())

    params = variables["params"]
    halves = [jax.tree.map(lambda x: x[:3], batch), jax.tree.map(lambda x: x[3:], batch)]
    found = [jax.jit(totals)(params, half) for half in halves]
    whole = jax.jit(totals)(params, batch)
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *found), whole, rtol=1e-6)
    # A mean of means would not do: the denominators of the halves differ, and each loss has its own.
    assert found[0]["sop"][1] != found[1]["sop"][1] and whole["sop"][1] != whole["masked_lm"][1]
    weights = {name: weight for name, (_, weight) in whole.items()}
    gradient = jax.jit(jax.grad(loss))
    summed = jax.tree.map(jnp.add, *(gradient(params, half, weights) for half in halves))
    chex.assert_trees_all_close(summed, gradient(params, batch, weights), atol=1e-6)


def test_a_row_of_weight_zero_adds_nothing(trained):
    _, variables, batch, apply = trained
    without = {**batch, "example_weight": np.float32([1, 1, 1, 1, 1, 0])}
    output = apply(variables, without)
    assert output.losses["sop"][1] == 3
    assert output.losses["masked_lm"][1] == batch["masked_weights"][:5].sum()
    assert all(float(value[-1]) == 0 for value in output.predictions.values())


def test_losses_are_float32_in_a_bfloat16_model(trained):
    _, variables, batch, _ = trained
    module = make(objective="sop").module(TinyEncoder(dtype=jnp.bfloat16))
    output = jax.eval_shape(module.apply, variables, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {np.dtype("float32")}


def test_score_adds_before_it_divides():
    predictions = {
        "loss_sum": np.float32([3, 1]),
        "weight": np.float32([3, 1]),
        "correct": np.float32([0, 1]),
        "sentence_loss": np.float32([0.5, 0]),
        "sentence_weight": np.float32([1, 0]),
        "sentence_correct": np.float32([1, 0]),
    }
    assert make(objective="sop").score(predictions, [None, None]) == {
        "loss": 1.0,
        "perplexity": pytest.approx(np.e),
        "accuracy": 0.25,
        "sop_loss": 0.5,
        "sop_accuracy": 1.0,
    }
    with pytest.raises(UserError, match="no row of the evaluation set has two segments"):
        make().score({**predictions, "sentence_weight": np.zeros(2)}, [None, None])


def test_coefficients_name_the_losses():
    assert make().coefficients == {"masked_lm": 1.0, "nsp": 1.0}
    weighted = make(objective="sop", masked_lm_coefficient=2.0, sentence_coefficient=0.5)
    assert weighted.coefficients == {"masked_lm": 2.0, "sop": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "next"}, "'nsp'"),
        ({"max_length": 4}, "max_length must be at least 5"),
        ({"short_rate": 1.5}, "short_rate must be between 0 and 1"),
        ({"sentence_coefficient": -1.0}, "sentence_coefficient must not be negative"),
        ({"rate": 0.0}, "rate must be between 0 and 1"),
        ({"specials": "row"}, "specials"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        registry.build({"name": "masked_lm_with_sentences", **fields})


def test_models_that_cannot_are_refused():
    with pytest.raises(UserError, match=r"needs a model with a pooler; set model\.pooler"):
        make().module(TinyEncoder(has_pooler=False))
    with pytest.raises(UserError, match=r"model\.token_types is 0, at least 2"):
        make().module(TinyEncoder(token_types=0))


def test_a_corpus_of_one_document_is_refused_by_name(tmp_path):
    one = ListSource(dev=[{"text": "ab cd\nef"}])
    with pytest.raises(UserError, match=r"'masked_lm_with_sentences', split 'dev': .* this corpus is one document"):
        make().examples(one, "dev", LetterTokenizer(), tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the data sets in ../shared/data")
def test_chinese_text(tmp_path):
    """10 news articles with jieba's words through a tiny NEZHA: shares, no special target, both losses at chance."""
    tokenizer = load_tokenizer(REAL / "vocab" / "zh_21128.txt.xz", chinese_words=True)
    file = str(REAL / "zh_text" / "news_sample.txt.xz")
    source = data.registry.build({"name": "text", "train": (file,), "documents": "blank_line"})
    task = MaskedLMWithSentences(max_length=128, max_predictions=20, whole_word=True)
    examples = task.examples(source, "train", tokenizer, tmp_path)
    vocabulary = tokenizer.vocabulary
    pipeline = Pipeline(examples, lambda e, rng: task.features(e, rng, vocabulary), seed=0, batch_size=256)
    batch = pipeline.batch(0)
    used = batch["masked_weights"] > 0
    assert not np.isin(batch["masked_labels"][used], vocabulary.special).any()
    assert 0.13 < used.sum() / (batch["segment_ids"] > 0).sum() < 0.17
    shown = np.take_along_axis(batch["input_ids"], batch["masked_positions"], 1)
    assert abs((shown[used] == vocabulary.mask).mean() - 0.8) < 0.03
    labels = np.concatenate([pipeline.batch(step)["sentence_label"] for step in range(4)])
    assert 0.45 <= labels.mean() <= 0.60

    config = preset("nezha-base")
    config["model"].update(model_dim=32, num_heads=2, num_layers=1, vocab_size=vocabulary.size, max_length=128)
    config["feed_forward"] = {"name": "gelu", "width": 64}
    module = task.module(build(config))
    small = {name: value[:8] for name, value in batch.items()}
    variables = jax.jit(module.init)(jax.random.key(0), small)
    losses = jax.jit(module.apply)(variables, small).losses
    assert float(losses["masked_lm"][0] / losses["masked_lm"][1]) == pytest.approx(np.log(vocabulary.size), rel=0.05)
    assert float(losses["nsp"][0] / losses["nsp"][1]) == pytest.approx(np.log(2), rel=0.2)
    assert losses["nsp"][1] == 8 and losses["masked_lm"][1] == small["masked_weights"].sum()
