"""Members' probabilities and how good they are, by scipy and scikit-learn."""

import warnings

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics
from sklearn.metrics import accuracy_score, log_loss

DECIDED = {
    "accuracy": accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "f1": metrics.f1_score,
    "f1_macro": lambda y, d: metrics.f1_score(y, d, average="macro"),
    "f1_micro": lambda y, d: metrics.f1_score(y, d, average="micro"),
    "f1_weighted": lambda y, d: metrics.f1_score(y, d, average="weighted"),
    "mcc": metrics.matthews_corrcoef,
    # With all labels: without, scikit-learn would move those that are left together.
    "kappa_quadratic": lambda y, d: metrics.cohen_kappa_score(y, d, labels=np.arange(9), weights="quadratic"),
}
VALUED = {
    "pearson": lambda y, x: pearsonr(x, y).statistic,
    "spearman": lambda y, x: spearmanr(x, y).statistic,
    "mae": metrics.mean_absolute_error,
    "rmse": metrics.root_mean_squared_error,
    "r2": lambda y, x: metrics.r2_score(y, x) if np.ptp(y) else np.nan,  # scikit-learn says 0 or 1 of constant labels
}


def score_of(name, said, labels, kind):
    """A score by name, of decisions or values (N,) or of probabilities (N, classes); NaN where it is undefined.

    Of auroc and average_precision scikit-learn says what a class against the rest has; a class without examples, and
    for auroc one that is all there is, has none. Warnings of what is undefined are its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in DECIDED or name in VALUED:
            return float((DECIDED | VALUED)[name](labels, said))
        if name == "log_loss":
            return log_loss(labels, said, labels=np.arange(said.shape[1]))
        one = metrics.roc_auc_score if name == "auroc" else metrics.average_precision_score
        classes = [1] if kind == "binary" else range(said.shape[1])
        least = 0 if name == "average_precision" else 1  # examples of the rest that it takes
        there = [c for c in classes if 0 < (labels == c).sum() <= len(labels) - least]
        return float(np.mean([one(labels == c, said[:, c]) for c in there])) if there else np.nan


def probabilities(logits, kind):
    """(M, N, classes) with scipy, or the values."""
    if kind == "multiclass":
        return softmax(logits.astype(float), axis=-1)
    if kind == "binary":
        return np.concatenate([expit(-logits.astype(float)), expit(logits.astype(float))], axis=-1)
    return logits[..., 0].astype(float)


def worth(prediction, labels, kind, criterion):
    """The higher the better, by scikit-learn and scipy."""
    if kind == "regression":
        return pearsonr(prediction, labels).statistic if criterion == "score" else -np.mean((prediction - labels) ** 2)
    if criterion == "score":
        return accuracy_score(labels, prediction.argmax(-1))
    return -log_loss(labels, prediction, labels=np.arange(prediction.shape[-1]))
