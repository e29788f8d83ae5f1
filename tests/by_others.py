"""Members' probabilities and how good they are, by scipy and scikit-learn."""

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, log_loss


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
