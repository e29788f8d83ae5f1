"""What ``dicor`` is asked for, and from that a method with every parameter decided; only then is numpy imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from lora_ensemble.dicor.choose import settings as s
from lora_ensemble.dicor.choose.settings import MethodName, Similarity, Strategy
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import OOF, PRESETS, Kind

if TYPE_CHECKING:
    from lora_ensemble.dicor.choose.methods import Method

Form = Literal["auto", "logits", "probabilities", "decisions"]
T = TypeVar("T")
METHODS: tuple[MethodName, ...] = get_args(MethodName)

# Which options each method listens to.
LISTENS: dict[MethodName, tuple[str, ...]] = {
    "best": (),
    "omni": ("strategy",),
    "dicor": ("size", "top_k", "similarity", "strategy", "temperature"),
    "dicor-auto": ("size", "top_k", "similarity", "strategy", "trade_off", "temperature"),
    "greedy": ("size", "top_k"),
    "greedy-score": ("size", "top_k"),
    "greedy-bagged": ("size", "top_k"),
    "weighted": ("top_k", "temperature"),
    "weighted-offset": ("top_k", "temperature"),
    "exhaustive": ("size", "top_k", "strategy"),
}


def option(
    text: str,
    default: Any = None,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    nargs: str | None = None,
    required: bool = False,
    type: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a dataclass that is an option: its help, and what argparse must know besides. False: a flag."""
    argument = {"choices": choices, "metavar": metavar, "nargs": nargs, "required": required, "type": type}
    if default is False:
        argument["action"] = "store_true"
    known = {key: value for key, value in argument.items() if value}
    return field(default=default, metadata={"help": text, "default": default, **known})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add those fields of a dataclass that are options; a field ``from_`` is --from."""
    for f in fields(options):
        if f.metadata:
            parser.add_argument("--" + f.name.rstrip("_").replace("_", "-"), dest=f.name, **f.metadata)


def options_of(given: argparse.Namespace, options: type[T]) -> T:
    """The dataclass with what was given for its fields."""
    return options(**{f.name: getattr(given, f.name) for f in fields(options)})  # type: ignore[arg-type]


def _size(text: str) -> int | str:
    return text if text == "auto" else int(text)


_size.__name__ = "number"  # what argparse calls it: invalid number value: 'many'


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of the methods; None: nothing."""

    size: int | Literal["auto"] | None = option(
        "members in the ensemble (dicor: multiclass 11, regression 10, others 4; dicor-auto: auto), steps of a greedy "
        "search, or the most members that exhaustive tries",
        metavar="N|auto",
        type=_size,
    )
    top_k: int | None = option("choose among the K best by dev score (default: 30, greedy 50)", metavar="K", type=int)
    similarity: Similarity | None = option(
        "between members (dicor: cosine, or pearson for regression; dicor-auto: error)", choices=get_args(Similarity)
    )
    strategy: Strategy | None = option(
        "how members decide together (dicor: majority, or mean for regression; others: mean-probability)",
        choices=get_args(Strategy),
    )
    trade_off: float | None = option(
        "dicor-auto: 0 for the score alone to 1 for similarity alone (0.5)", metavar="X", type=float
    )
    temperature: bool = option("divide each classifier's logits by its own first", False)


def words(options: Options, names: Sequence[str] | None = None) -> list[str]:
    """The options, or those of ``names``, as they are given to a command."""
    given = {n: v for n, v in vars(options).items() if names is None or n in names}
    flags = {"--" + n.replace("_", "-"): v for n, v in given.items() if v is not None and v is not False}
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Make members of predictions that any model made. A file is a table with a header (CSV, TSV, JSON lines, Parquet)
    or an array (.npy, .npz); its rows are matched with the examples by id. A table needs a column of ids (id) and one
    column for each class, or label of several, named after it (p_0, p_1, ...), or one column: of the positive class, or
    of values. A table with a column "model" and an .npz of several arrays are several members. Pickles are never
    loaded."""

    files: Sequence[Path]
    pool: Path = option("the pool to add to; made where it is not there", required=True, type=Path, metavar="DIR")
    task: str = option("the task in the pool: one that is there, or a new one", required=True)
    task_kind: Kind | None = option("needed for a new task", choices=get_args(Kind))
    labels: Path | None = option(
        "ids and true labels of the split (test: ids suffice); not needed where the pool has them",
        type=Path,
        metavar="FILE",
    )
    split: str = option(
        "default: dev; oof: of the training examples, each by a model that was trained without it; test adds to a "
        "member that is there",
        "dev",
        choices=("dev", OOF, "test"),
    )
    name: Sequence[str] = option("a name for each model (default: the models', or the files' names)", (), nargs="+")
    from_: Form = option(
        "what the numbers are; auto (the default) asks where it could be mistaken; decisions: class labels only",
        "auto",
        choices=get_args(Form),
    )
    columns: Sequence[str] = option("of the outputs, in the order of the labels", (), nargs="+", metavar="COLUMN")
    member_columns: Sequence[str] = option("each is a member: a table in wide format", (), nargs="+", metavar="COLUMN")
    label_names: Sequence[str] = option("in the order of the outputs; positive last", (), nargs="+", metavar="LABEL")
    id: str | None = option("of the ids (default: id, ids, or a nameless first column)", metavar="COLUMN")
    label: Sequence[str] = option(
        "of the true labels in the labels file (default: label, or the preset's); multilabel: one that names them, or "
        "one of 0 and 1 for each",
        (),
        nargs="+",
        metavar="COLUMN",
    )
    label_separator: str = option("multilabel: between the names in one column (default: a comma)", ",", metavar="TEXT")
    group: str | None = option(
        "of the groups, in the labels file: examples of one are no independent evidence", metavar="COLUMN"
    )
    model_column: str | None = option("of the models' names, in a table of several (default: model)", metavar="COLUMN")
    by_row: bool = option("tables without ids: their rows are in the order of the labels", False)
    overwrite: bool = option("replace other predictions that were imported under the same name", False)

    @property
    def label_columns(self) -> list[str]:
        """Where the true labels are, in the labels file or beside the predictions."""
        return list(self.label) or (PRESETS[self.task].label_columns if self.task in PRESETS else ["label"])


def method_of(name: MethodName, kind: Kind, members: int, options: Options) -> tuple[Method, list[str]]:
    """The method of that name for a pool of M ``members``, and notices; ``check`` has seen that the options fit."""
    from lora_ensemble.dicor.choose.methods import Best, Dicor, Exhaustive, Greedy, Omni, Weighted

    given = {option: value for option in LISTENS[name] if (value := getattr(options, option)) is not None}
    if "top_k" in given:
        given["top_k"] = min(given["top_k"], members)
    if name == "dicor":
        given["size"], notices = _paper_size(kind, members, options)
        top_k = min(max(s.DEFAULT_TOP_K, 0 if given["size"] == "auto" else given["size"]), members)
        paper = Dicor(top_k=top_k, similarity=s.DEFAULT_SIMILARITY[kind], strategy=s.DEFAULT_STRATEGY[kind])
        return paper.set_params(**given), notices
    if name != "dicor-auto" and given.get("size") == "auto":
        del given["size"]
    if name.startswith("greedy") and "size" in given:
        given["steps"] = given.pop("size")
    if name == "omni" and given.get("strategy") == "weighted":
        del given["strategy"]
    methods: dict[str, Method] = {
        "best": Best(),
        "omni": Omni(),
        "dicor-auto": Dicor(similarity="error", strategy="mean-probability", trade_off=s.DEFAULT_TRADE_OFF),
        "greedy": Greedy(),
        "greedy-score": Greedy(criterion="score"),
        "greedy-bagged": Greedy(sorted_start=True, bags=s.GREEDY_BAGS, example_share=0.8),
        "weighted": Weighted(),
        "weighted-offset": Weighted(offset=True),
        "exhaustive": Exhaustive(),
    }
    return methods[name].set_params(**given), []


def _paper_size(kind: Kind, members: int, o: Options) -> tuple[int | Literal["auto"], list[str]]:
    """The size by the paper's rule. A default gives way to what is there, and a notice says so."""
    notices = []
    if o.top_k is not None and o.top_k > members:
        notices.append(f"--top-k {o.top_k}: the pool has {members} finished members, all of them are candidates")
    if o.size is not None:
        return o.size, notices
    size = min(s.DEFAULT_SIZE[kind], members, o.top_k or members)
    if size < s.DEFAULT_SIZE[kind]:
        limit = f"--top-k is {o.top_k}" if size == o.top_k else f"the pool has {members} finished members"
        notices.append(f"size is {size} instead of the default {s.DEFAULT_SIZE[kind]}: {limit}")
    return size, notices


def check(options: Options, kind: Kind, members: int) -> None:
    """``UserError`` where an option makes no sense for this task and this pool, whatever the method."""
    if options.strategy == "majority" and kind == "regression":
        raise UserError("--strategy majority: a regression has values, not classes to vote for; use --strategy mean")
    if isinstance(options.size, int):
        if options.size < 1:
            raise UserError(f"--size {options.size}: an ensemble needs at least one member")
        if options.size > members:
            raise UserError(f"--size {options.size}: the pool has {members} finished members; give at most {members}")
    if options.top_k is not None:
        least = options.size if isinstance(options.size, int) else 1
        if options.top_k < least:
            what = f"--size {least}" if least > 1 else "1"
            raise UserError(f"--top-k {options.top_k} is below {what}: there must be at least as many candidates")


def refuse_unheard(options: Options, methods: Sequence[MethodName]) -> None:
    """``UserError`` for an option that none of the methods listens to."""
    for name, value in vars(options).items():
        given = value is not None and value is not False  # a 0 was given
        if given and not any(name in LISTENS[m] for m in methods):
            heard = ", ".join(m for m in METHODS if name in LISTENS[m])
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} has no meaning for --method {methods[0]}; it is for {heard}")
