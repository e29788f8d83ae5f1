"""A small data set for the three presets, made from templates: it stands in where the course's files are not at hand.

The files have the names and the layout of the course's, so that ``--data.root`` takes the folder as it is. Every
sentence was written for this project. The labels carry noise, so that no system reaches 100 %, and scores on this
data say nothing about the real tasks. ``python demo/make_data.py FOLDER`` writes them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import questions
import sentiment
import similarity
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS, SPLITS, Task

SIZES = {"train": 600, "dev": 300, "test": 200}
"""Examples of each split, for each task."""
SEED = 11711

Texts = tuple[str, ...]
Example = tuple[Texts, str]
_MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "sst": sentiment.example,
    "quora": questions.example,
    "sts": similarity.example,
}


def write_demo_data(folder: Path, *, seed: int = SEED, sizes: Mapping[str, int] = SIZES) -> None:
    """Write train, dev and test files of the three presets into ``folder``, which is made if needed.

    The same ``seed`` and ``sizes`` give the same bytes. No text is in two splits, nor twice in one; the test files
    have no labels. ``UserError`` where the folder cannot be written or the templates do not give that many examples.
    """
    if any(sizes[split] < 1 for split in SPLITS):
        raise UserError(f"demo data: sizes are {dict(sizes)}; expected at least 1 example for each split")
    folder = Path(folder)
    for task in PRESETS.values():
        rng = random.Random(f"{seed}/{task.name}")
        examples = _different(task.name, _MAKERS[task.name], rng, sum(sizes[split] for split in SPLITS))
        for split in SPLITS:
            part, examples = examples[: sizes[split]], examples[sizes[split] :]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder, task, split, part, seed, rng)
            except OSError as e:
                raise UserError(f"{folder}: cannot be written ({e.strerror or e}); give another folder") from e


def _different(name: str, make: Callable[[random.Random], Example], rng: random.Random, count: int) -> list[Example]:
    """``count`` examples of which no two have the same texts, in whatever order."""
    found: dict[Texts, Example] = {}
    for _ in range(20 * count):  # far more than needed, unless the templates run dry
        texts, label = make(rng)
        found.setdefault(tuple(sorted(texts)), (texts, label))
        if len(found) == count:
            return list(found.values())
    raise UserError(f"demo data: the templates of {name} give only about {len(found)} examples; {count} were asked for")


def _write(folder: Path, task: Task, split: str, examples: list[Example], seed: int, rng: random.Random) -> None:
    labelled = split != "test"
    index = list(range(len(examples)))
    header = ["", "id", *task.text, *([task.label] if labelled else [])]
    if task.name != "sst":
        index = rng.sample(range(10 * len(examples)), len(examples))  # a sample of something larger, as in the course
    elif not labelled:
        header = ["0", *header]  # the course's test file has a second index column, and its first has a name
    with open(folder / str(getattr(task, split)), "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        for i, (texts, label) in enumerate(examples):
            front = [i + 1, float(i)] if header[0] else [index[i]]
            writer.writerow([*front, _id(seed, task.name, split, i), *texts, *([label] if labelled else [])])


def _id(seed: int, task: str, split: str, i: int) -> str:
    """25 hex digits, as the course's ids have."""
    return hashlib.sha256(f"{seed}/{task}/{split}/{i}".encode()).hexdigest()[:25]


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python demo/make_data.py", description="Write the demo data.")
    parser.add_argument("folder", type=Path, help="where the files go; give it as --data.root afterwards")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="another seed gives other examples (default: %(default)s)"
    )
    given = parser.parse_args(args)
    try:
        write_demo_data(given.folder, seed=given.seed)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    sizes = ", ".join(f"{count} {split}" for split, count in SIZES.items())
    print(f"{given.folder}: sst, quora and sts, each with {sizes} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
