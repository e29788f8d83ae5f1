"""What all parts share: the device, the sizes, where things lie."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # heavy: the parent process does without
    from workload import Workload

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Of one run of ``gpu.sh``."""

    device: str
    """cpu or cuda."""
    threads: int
    tiny: bool
    folder: Path
    """For files that nobody keeps; all rows of a run share it."""
    minilm: Path | None = None
    """A folder that ``--carry`` wrote."""
    root: Path | None = None
    """The folder of SST's files."""
    left: float = 0.0
    """Seconds that a row has."""

    def size(self, full: T, tiny: T) -> T:
        """One of two, by whether this run tries the script or measures."""
        return tiny if self.tiny else full

    def model(self, shape: str) -> str:
        """A random encoder of this shape, of two layers where tiny; made once, and whole if it is there."""
        import workload

        name = self.size(shape, "random:tiny")
        folder = self.folder / name.removeprefix("random:")
        if not folder.exists():
            made = workload.random_model(name, Path(tempfile.mkdtemp(dir=self.folder)) / folder.name)
            Path(made).rename(folder)
        return str(folder)

    def workload(self, shape: str, *, steps: int, warmup: int = 1, precision: str = "bf16", **changes: Any) -> Workload:
        """Made-up sentences with SST's lengths for a :meth:`model`."""
        import workload

        parser = argparse.ArgumentParser()
        workload.add_arguments(parser)
        args = parser.parse_args([])
        args.base_model, args.device, args.threads = self.model(shape), self.device, self.threads
        args.steps, args.warmup_steps, args.precision = steps, warmup, precision
        # A folder of its own: the examples depend on the number of steps.
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return dataclasses.replace(workload.workload(args, workload.MADE_UP, folder), **changes)


def call(function: str, setting: Setting, *arguments: Any) -> dict[str, Any]:
    """A row of a part, in a process that has imported what it needs: ``module.function`` of this package."""
    module, _, name = function.partition(".")
    found = getattr(importlib.import_module(f"gpu.{module}"), name)(setting, *arguments)
    return found if isinstance(found, dict) else {"checks": found}
