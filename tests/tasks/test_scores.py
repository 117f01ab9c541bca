"""The official scores against seqeval and scikit-learn, and by hand."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from zoo.tasks import scores


def tags(text):
    return text.split()


@pytest.mark.parametrize(
    ("predicted", "lenient", "strict"),
    [
        ("O I-PER I-PER", {("PER", 1, 2)}, set()),
        ("B-PER I-LOC O", {("PER", 0, 0), ("LOC", 1, 1)}, {("PER", 0, 0)}),
        ("B-PER I-PER I-LOC O", {("PER", 0, 1), ("LOC", 2, 2)}, {("PER", 0, 1)}),
        ("I-PER O I-LOC I-PER", {("PER", 0, 0), ("LOC", 2, 2), ("PER", 3, 3)}, set()),
    ],
)
def test_golden_entities(predicted, lenient, strict):
    """Each metric finds exactly the golden entities: against gold with one of them it scores by their number."""
    words = predicted.split()
    for entities, key in ((lenient, "f1_lenient"), (strict, "f1")):
        for kind, start, end in entities:
            gold = ["O"] * len(words)
            gold[start] = f"B-{kind}"
            gold[start + 1 : end + 1] = [f"I-{kind}"] * (end - start)
            assert scores.tagging([gold], [words])[key] == pytest.approx(2 / (1 + len(entities)))
    if not strict:
        assert scores.tagging([words], [words])["f1"] == 0.0


def test_golden_f1():
    gold, predicted = [tags("B-PER I-PER O B-LOC")], [tags("I-PER I-PER O B-LOC")]
    result = scores.tagging(gold, predicted)
    assert result["f1_lenient"] == 1.0
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["precision"] == 1.0 and result["recall"] == 0.5


def test_golden_micro_average():
    gold = [tags("O O B-MISC I-MISC B-MISC O O"), tags("B-PER I-PER O")]
    predicted = [tags("O O B-MISC I-MISC B-MISC I-MISC O"), tags("B-PER I-PER O")]
    assert scores.tagging(gold, predicted)["f1"] == pytest.approx(2 / 3)


def test_strict_f1_equals_seqeval_and_a_plain_count_on_random_tags():
    rng = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
    for trial in range(20):
        lengths = rng.integers(1, 12, 30)
        gold, predicted = ([list(rng.choice(tags, n)) for n in lengths] for _ in range(2))
        for row, guess in zip(gold, predicted, strict=True):  # half the words right, so that there are hits
            guess[:] = [g if rng.random() < 0.5 else p for g, p in zip(row, guess, strict=True)]
        result = scores.tagging(gold, predicted)
        assert result["f1"] == f1_score(gold, predicted, mode="strict", scheme=IOB2), trial
        assert result["f1_lenient"] == f1_score(gold, predicted), trial
        ours, theirs = _entities(predicted), _entities(gold)
        assert result["f1"] == pytest.approx(2 * len(ours & theirs) / (len(ours) + len(theirs)))


def _entities(rows):
    """Entities by the letter of IOB2: B-x, then as many I-x as follow."""
    found = set()
    for r, tags in enumerate(rows):
        for start, tag in enumerate(tags):
            if tag.startswith("B-"):
                end = start + 1
                while end < len(tags) and tags[end] == "I-" + tag[2:]:
                    end += 1
                found.add((r, tag[2:], start, end))
    return found


def test_token_f1_counts_words():
    assert scores.token_f1([["B-X", "O", "B-X"]], [["B-X", "B-X", "O"]]) == 0.5
    assert scores.token_f1([["B-X", "O"]], [["I-X", "O"]]) == 0.0
    assert scores.token_f1([["O"]], [["O"]]) == 0.0


def test_a_set_without_entities_scores_zero_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = scores.tagging([["O", "O"]], [["O", "O"]])
    assert set(result.values()) == {0.0}


def test_binary_scores_by_hand():
    gold, predicted = np.asarray([1, 1, 1, 0, 0, 0, 0, 1]), np.asarray([1, 1, 0, 0, 0, 1, 0, 0])
    result = scores.classification(gold, predicted, 2)  # TP 2, FN 2, FP 1, TN 3
    assert result["accuracy"] == 5 / 8
    assert result["f1"] == pytest.approx(4 / 7)
    assert result["mcc"] == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5))


def test_constant_predictions_and_more_classes():
    assert scores.classification(np.asarray([0, 0, 1]), np.zeros(3, int), 2) == {
        "accuracy": pytest.approx(2 / 3),
        "mcc": 0.0,
        "f1": 0.0,
    }
    assert set(scores.classification(np.asarray([0, 1, 2]), np.asarray([0, 1, 2]), 3)) == {"accuracy", "mcc"}


def test_correlations_equal_scipy_and_a_plain_count():
    rng = np.random.default_rng(0)
    gold = np.round(rng.uniform(0, 5, 200) * 4) / 4  # with ties, as STS-B has them
    predicted = np.round(gold + rng.normal(0, 2, 200), 1).astype(np.float32)
    result = scores.regression(gold, predicted)
    assert result["pearson"] == pytest.approx(np.corrcoef(gold, predicted)[0, 1], abs=1e-12)
    ranks = [[(v < w).sum() + ((v == w).sum() + 1) / 2 for w in v] for v in (gold, predicted)]
    assert result["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert abs(result["spearman"] - result["pearson"]) > 0.01, "they are told apart"
    assert result["pearson"] == stats.pearsonr(predicted.astype(float), gold).statistic
    assert result["spearman"] == stats.spearmanr(predicted.astype(float), gold).statistic
    assert result["pearson_spearman"] == (result["pearson"] + result["spearman"]) / 2
    assert result["mse"] == pytest.approx(np.mean((predicted - gold) ** 2))
    assert scores.regression(gold, -predicted)["pearson"] == pytest.approx(-result["pearson"])


def test_correlations_where_they_are_undefined():
    """Equal predictions, or equal labels, score 0 in silence; what is not finite scores NaN."""
    gold = np.asarray([1.0, 2.0, 4.0])
    zeros = {"pearson": 0.0, "spearman": 0.0, "pearson_spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores.regression(gold, np.full(3, 2.5)) == {**zeros, "mse": pytest.approx(4.75 / 3)}
        assert scores.regression(np.ones(3), gold) == {**zeros, "mse": pytest.approx(10 / 3)}
        assert scores.regression(gold[:1], gold[:1]) == {**zeros, "mse": 0.0}
        assert all(map(math.isnan, scores.regression(gold, [1.0, math.nan, 2.0]).values()))
