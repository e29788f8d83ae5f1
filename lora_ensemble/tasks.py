"""What a task is: its columns, its kind, its labels. Both stages, training and dicor, stand on this module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lora_ensemble.errors import UserError

Kind = Literal["multiclass", "binary", "multilabel", "regression"]
# fmt: off
ScoreName = Literal[
    "accuracy", "balanced_accuracy", "f1", "f1_macro", "f1_micro", "f1_weighted", "mcc", "kappa_quadratic",
    "auroc", "average_precision", "log_loss", "pearson", "spearman", "mae", "rmse", "r2",
]
# fmt: on
SPLITS = ("train", "dev", "test")
OOF = "oof"
"""The training examples as a split of their own: each predicted by a model that was trained without its fold."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What is known of a score without computing it; ``scores`` computes it."""

    words: str
    of: Literal["decisions", "probabilities", "values"] = "decisions"
    kinds: tuple[Kind, ...] = ("multiclass", "binary")
    least: float = 0.0
    most: float = 1.0
    sign: int = 1  # -1 where lower is better; a score times its sign is the higher the better
    by_rank: bool = False  # whether it looks at the order of what was said alone
    offsets: bool = False  # whether an ensemble has its classes' offsets chosen for it


_ANY: tuple[Kind, ...] = ("multiclass", "binary", "multilabel")
_VALUES: dict[str, Any] = {"of": "values", "kinds": ("regression",)}
_LOSS: dict[str, Any] = {"most": math.inf, "sign": -1}
_RANKED: dict[str, Any] = {"of": "probabilities", "by_rank": True, "kinds": _ANY}
SCORES: dict[ScoreName, Score] = {
    "accuracy": Score(words="accuracy", kinds=_ANY),
    "balanced_accuracy": Score(words="balanced accuracy", offsets=True),
    "f1": Score(words="F1", kinds=("binary",), offsets=True),
    "f1_macro": Score(words="macro F1", kinds=_ANY, offsets=True),
    "f1_micro": Score(words="micro F1", kinds=_ANY, offsets=True),
    "f1_weighted": Score(words="weighted F1", kinds=_ANY, offsets=True),
    "mcc": Score(words="MCC", least=-1.0, offsets=True),
    "kappa_quadratic": Score(words="quadratic kappa", least=-1.0, offsets=True),
    "auroc": Score(words="AUROC", **_RANKED),
    "average_precision": Score(words="average precision", **_RANKED),
    "log_loss": Score(words="log-loss", of="probabilities", kinds=_ANY, **_LOSS),
    "pearson": Score(words="Pearson r", least=-1.0, **_VALUES),
    "spearman": Score(words="Spearman's rho", least=-1.0, by_rank=True, **_VALUES),
    "mae": Score(words="MAE", **_VALUES, **_LOSS),
    "rmse": Score(words="RMSE", **_VALUES, **_LOSS),
    "r2": Score(words="R²", least=-math.inf, **_VALUES),
}
# Most labels are absent from most texts, so accuracy rewards whoever says that none is there.
DEFAULT_SCORE: dict[Kind, ScoreName] = {
    "multiclass": "accuracy",
    "binary": "accuracy",
    "multilabel": "f1_micro",
    "regression": "pearson",
}


def check_score(name: str | None, kind: Kind) -> ScoreName:
    """The score of that name, or the default of the kind for None; ``UserError`` where the kind has no such score."""
    fitting, wanted = [n for n, about in SCORES.items() if kind in about.kinds], name or DEFAULT_SCORE[kind]
    for known in fitting:
        if known == wanted:
            return known
    raise UserError(f"score is {name!r}; a {kind} task has one of {', '.join(fitting)}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: what to read, what to predict, and how the prediction is scored.

    Raises ``UserError`` where the fields contradict each other.
    """

    name: str
    """Name of the task; also the name of its folder in the pool."""
    kind: Kind
    """multiclass (cross-entropy, accuracy, argmax), binary (BCE with logits, accuracy, logit > 0), multilabel (any of
    several labels: the mean of their BCE, micro F1, each logit > 0) or regression (MSE, Pearson r, the value)."""
    score: str | None = None
    """What decides: best epochs, early exit, members and ensembles. accuracy, balanced_accuracy, f1 (binary), f1_macro,
    f1_micro, f1_weighted, mcc, kappa_quadratic (labels in their order), auroc, average_precision or log_loss; of
    multilabel accuracy (the share of right decisions about a label), the last three or an F1 (micro, macro, weighted);
    for regression pearson, spearman, mae, rmse or r2. None: accuracy, f1_micro for multilabel, or pearson."""
    text: list[str] = field(default_factory=list)
    """One text column, or two that are cross-encoded as a pair."""
    label: str | list[str] = "label"
    """The label column. Of multilabel one that names the labels of each text, joined by ``label_separator`` or as a
    list, where an empty cell is a text without labels; or a list of columns, of 0 and 1 (or false and true)."""
    label_separator: str = ","
    """Multilabel: what stands between the names in a cell of one label column."""
    label_names: Sequence[str | bool | int | float] = field(default_factory=list)
    """The label values as they stand in the files, in the order of the outputs (not for regression).
    Required for multiclass and multilabel; binary defaults to 0 and 1, several columns to their names. Numbers match
    whatever way they are written (1 is 1.0). YAML reads yes, no, on and off as booleans, which are refused: write them
    in quotes."""
    label_range: list[float] = field(default_factory=list)
    """Regression only: lowest and highest label; a label outside is an error. Empty: any finite number."""
    id: str | None = None
    """The column of unique example ids. None: examples are named by their position in the file."""
    columns: list[str] = field(default_factory=list)
    """All the columns, in their order, of CSV or TSV files without a header line. Empty: the first line names them."""
    train: str | None = None
    """Training file below ``data.root`` (.tsv, .csv, .jsonl, .parquet, packed as .gz or not; the course's .csv files
    are recognised as tab-separated), or the split's name where ``dataset`` is given."""
    dev: str | float | None = None
    """Dev file (or split name): what epochs, members and ensembles are chosen on. A share, 0.2, is kept apart from the
    training file for it: by ids and labels alone, every class in this share, a ``group`` never torn apart."""
    test: str | None = None
    """Test file (or split name); may have no labels."""
    dataset: str | None = None
    """Name of a data set of the Hugging Face hub (or a local folder that `datasets` loads) instead of files."""
    dataset_config: str | None = None
    """Configuration name of that data set, if it has several."""
    group: str | None = None
    """A column of the training and dev files: examples that belong together (a writer's, a document's) and are no
    independent evidence. No split tears them apart."""
    weight: str | None = None
    """A column of the training file: how much each example counts in the loss, 0 or more."""
    class_weights: str | list[float] | None = None
    """How much examples of each class count in the loss: a number for each, in the order of the labels, or balanced:
    so many for a rare class that all classes count alike. An example's weight is that of its class times its own.
    Multilabel: a number for each label, by which its loss counts where the label is there."""
    label_smoothing: float = 0.0
    """For classifiers: this part of an example's label (of each of several) is spread evenly over all classes."""
    metrics: list[str] = field(default_factory=list)
    """Further curves on dev: classes of torchmetrics by name, as ``model.metrics`` has them for all tasks."""
    leaderboard_column: str = "Prediction"
    """Header of the value column in the course's leaderboard files, which ``dicor apply`` writes for the presets."""
    overall: float | None = None
    """Its weight in the overall score of several tasks, where each of them says it, or ``data.overall`` for all."""

    def __post_init__(self) -> None:
        check_task_name(self.name)
        kinds, classes, bounds = get_args(Kind), len(self.label_names), len(self.label_range)
        regression, names = self.kind == "regression", f"label_names has {classes} entries"

        def refuse(wrong: bool, why: str) -> None:
            if wrong:
                raise UserError(f"task {self.name!r}: {why}")

        refuse(self.kind not in kinds, f"kind is {self.kind!r}; expected one of {', '.join(kinds)}")
        refuse(len(self.text) not in (1, 2), f"text names {len(self.text)} columns; expected one, or two for a pair")
        refuse(self.kind == "multiclass" and classes < 2, f"{names}; multiclass needs them all")
        refuse(self.kind == "binary" and classes not in (0, 2), f"{names}; binary needs two or none")
        several = self.kind == "multilabel"
        refuse(several and len(self.labels) < 2, f"{names}; multilabel needs them all, or label: a list of columns")
        refuse(not several and isinstance(self.label, list), "label names several columns, which is for multilabel")
        refuse(regression and classes > 0, "label_names has no meaning for regression; use label_range")
        wrong_range = bounds > 0 and (not regression or bounds != 2)
        refuse(wrong_range, "label_range is [lowest, highest], for regression only")
        for name in self.label_names:
            word = "yes" if name else "no"
            yaml = f'which is what YAML makes of {word}; write "{word}" in quotes, or whatever stands in the data'
            refuse(isinstance(name, bool), f"label_names holds {name}, {yaml}")
        refuse(len(set(self.labels)) < len(self.labels), f"label_names holds a name twice: {self.labels}")
        if isinstance(self.label, list):
            fits = len(set(self.label)) == len(self.label) == len(self.labels)
            refuse(not fits, f"label is {self.label}; expected a column for each of {self.labels}, none twice")
        separator = self.label_separator
        wrong = not separator if several else separator != ","
        refuse(wrong, f"label_separator is {separator!r}; expected what stands between names, for multilabel only")
        weights, smoothing = self.class_weights, self.label_smoothing
        refuse(regression and weights is not None, "class_weights are for classes; give weight: a column")
        refuse(regression and smoothing != 0, "label_smoothing is for classes")
        refuse(not 0 <= smoothing < 1, f"label_smoothing is {smoothing}; expected a share from 0 to below 1")
        refuse(
            several and weights == "balanced", "class_weights is balanced; of multilabel give a number for each label"
        )
        if weights not in (None, "balanced"):
            numbers = list(weights) if isinstance(weights, list) else []
            good = len(numbers) == len(self.labels) and max(numbers) > 0 and all(0 <= w < math.inf for w in numbers)
            expected = f"{len(self.labels)} numbers of at least 0: one for each label"
            either = "" if several else "balanced, or "
            refuse(not good, f"class_weights is {weights!r}; expected {either}{expected}")
        apart = isinstance(self.dev, float) and not 0 < self.dev < 1
        refuse(apart, f"dev is {self.dev}; expected a file, or a share between 0 and 1 of the training file")
        headless = bool(self.columns) and self.dataset is not None
        refuse(headless, "columns is for files without a header; a data set names its columns")
        weight = 1.0 if self.overall is None else self.overall
        refuse(not 0 < weight < math.inf, f"overall is {weight}; expected a weight above 0, for data.overall")
        try:
            check_score(self.score, self.kind)
        except UserError as e:
            refuse(True, str(e))

    @property
    def labels(self) -> list[str]:
        """Label values in the order of the outputs; empty for regression."""
        unsaid = self.label_columns if isinstance(self.label, list) else ["0", "1"] if self.kind == "binary" else []
        return [str(name) for name in self.label_names] or unsaid

    @property
    def label_columns(self) -> list[str]:
        """The columns that hold the labels."""
        return list(self.label) if isinstance(self.label, list) else [self.label]

    @property
    def num_outputs(self) -> int:
        """C, see ``outputs_of``."""
        return outputs_of(self.kind, self.labels)

    @property
    def scored_by(self) -> ScoreName:
        """The task's score by name."""
        return check_score(self.score, self.kind)

    @property
    def sign(self) -> int:
        """The score's: -1 where lower is better."""
        return SCORES[self.scored_by].sign

    @property
    def recorded(self) -> dict[str, Any]:
        """What a member's settings say of how the task is scored, and of its loss: nothing of what is a default."""
        score = None if self.scored_by == DEFAULT_SCORE[self.kind] else self.scored_by
        own = {"score": score, "overall": self.overall, "class_weights": self.class_weights}
        own |= {"label_smoothing": self.label_smoothing or None}
        return {key: value for key, value in own.items() if value is not None}

    @property
    def score_name(self) -> str:
        """The task's score in words."""
        return SCORES[self.scored_by].words


def outputs_of(kind: Kind, labels: Sequence[str]) -> int:
    """C: one per class for multiclass, one per label for multilabel, otherwise 1."""
    return len(labels) if kind in ("multiclass", "multilabel") else 1


def check_task_name(name: str) -> None:
    """``UserError`` unless ``name`` can be the name of a task's folder."""
    good = name and all(c.isalnum() or c in "-_." for c in name) and name[0] not in ".-"
    if not good or len(name.encode()) > 150:  # file systems end at 255 bytes
        raise UserError(
            f"task {name!r}: a task's name is a folder's name: letters, digits, '-', '_', '.', 150 bytes at most"
        )


PRESETS = {
    "sst": Task(
        name="sst",
        kind="multiclass",
        text=["sentence"],
        label="sentiment",
        label_names=["0", "1", "2", "3", "4"],
        id="id",
        train="ids-sst-train.csv",
        dev="ids-sst-dev.csv",
        test="ids-sst-test-student.csv",
        leaderboard_column="Predicted_Sentiment",
    ),
    "quora": Task(
        name="quora",
        kind="binary",
        text=["sentence1", "sentence2"],
        label="is_duplicate",
        id="id",
        train="quora-train.csv",
        dev="quora-dev.csv",
        test="quora-test-student.csv",
        leaderboard_column="Predicted_Is_Paraphrase",
    ),
    "sts": Task(
        name="sts",
        kind="regression",
        text=["sentence1", "sentence2"],
        label="similarity",
        label_range=[0.0, 5.0],
        id="id",
        train="sts-train.csv",
        dev="sts-dev.csv",
        test="sts-test-student.csv",
        # The course's own spelling; its leaderboard reads this header to the letter.
        leaderboard_column="Predicted_Similiary",
    ),
}
"""The three tasks of both reports."""
