"""Official metrics, over a whole evaluation set at once.

scikit-learn, SciPy's statistics and seqeval are imported where they are used: they take a second, which a training run should
not wait for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np


def classification(gold: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, MCC and, with two classes, F1, by scikit-learn as in GLUE (Wang et al. 2018, arXiv 1804.07461).

    mcc = (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) (for more classes its multi-class form) and
    f1 = 2TP / (2TP+FP+FN) of class 1; each is 0 where undefined.
    """
    from sklearn import metrics

    result = {
        "accuracy": float(metrics.accuracy_score(gold, predicted)),
        "mcc": float(metrics.matthews_corrcoef(gold, predicted)),
    }
    if classes == 2:
        result["f1"] = float(metrics.f1_score(gold, predicted, pos_label=1, zero_division=0))
    return result


def regression(gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Correlations by SciPy in float64 as in GLUE (Wang et al. 2018, arXiv 1804.07461), and the mean squared error.

    * `pearson` = Σ (p − p̄)(g − ḡ) / √(Σ (p − p̄)² Σ (g − ḡ)²); `spearman`: the same of the ranks, ties taking their mean.
      Each is 0 where undefined, that is where predictions or labels are all equal: such predictions order nothing. The
      GLUE metric of Hugging Face gives NaN there. With a prediction that is not finite both are NaN: that is a failure of
      the model, not a lack of order.
    * `pearson_spearman`: the mean of the two, which GLUE's average takes for STS-B.
    """
    from scipy import stats

    gold, predicted = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
    pearson = spearman = 0.0
    if not np.isfinite(predicted).all():
        pearson = spearman = float("nan")
    elif np.ptp(predicted) > 0 and np.ptp(gold) > 0:
        pearson, spearman = (
            float(correlation(predicted, gold)[0]) for correlation in (stats.pearsonr, stats.spearmanr)
        )
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
        "mse": float(np.square(predicted - gold).mean()),
    }


def tagging(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity and word scores of BIO tags, micro-averaged over the set; each is 0 where undefined.

    * `f1`, `precision`, `recall`: entities (type, first word, last word) read strictly by IOB2 (seqeval's mode
      "strict"): an entity begins at B-x and goes on with I-x of the same type; any other I-x is no entity.
    * `f1_lenient`: entities read as conlleval does (seqeval's default): an I-x that follows nothing of its type
      begins one.
    * `token_f1`: over words, see `token_f1`. Some papers report it as F1; it is not comparable with entity F1.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    strict = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns of sets without an entity, for which 0 is meant
        return {
            "f1": float(f1_score(gold, predicted, **strict)),
            "precision": float(precision_score(gold, predicted, **strict)),
            "recall": float(recall_score(gold, predicted, **strict)),
            "f1_lenient": float(f1_score(gold, predicted, zero_division=0)),
            "token_f1": token_f1(gold, predicted),
        }


def token_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """2TP / (2TP+FP+FN) over words, the positives being all tags but O; 0 where there are none.

    TP: gold = predicted ≠ O; FP: predicted ≠ O and another gold; FN: gold ≠ O and another prediction.
    """
    pairs = [(g, p) for row, guess in zip(gold, predicted, strict=True) for g, p in zip(row, guess, strict=True)]
    hits = sum(g == p != "O" for g, p in pairs)
    positives = sum(g != "O" for g, _ in pairs) + sum(p != "O" for _, p in pairs)
    return 2 * hits / positives if positives else 0.0
