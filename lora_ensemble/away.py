"""A bank that is trained where the driver's files are not: what is sent with it, and what becomes of what comes home.

Away, a folder of its own stands for the driver's ``checkpoints``: ``runs/<run>/`` and ``pool/``. No torch, no ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ensemble import pool
from lora_ensemble.errors import UserError
from lora_ensemble.plan import FILE, Plan, PlannedBank, read_plan

Files = dict[str, bytes]
"""Path below a folder, with slashes, to content."""

POOL, BROUGHT = "pool", "brought"
_CHECKPOINT = "last.ckpt"
_CURVES = ("csv", "wandb")
_SCRATCH = "lora-ensemble-away-"


def _packed(folder: Path, files: Iterable[Path]) -> Files:
    """Those of the files below ``folder`` that are there."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(files) if p.is_file() and not p.is_symlink()
    }


def unpack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write packed files below ``folder``."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def pack_named(names: Iterable[str]) -> dict[str, Files]:
    """Files and folders that settings name: name to content, below the last part of its path."""
    found = {}
    for name in dict.fromkeys(names):
        path = Path(os.path.abspath(Path(name).expanduser()))  # links stay: what they point to may have another suffix
        within = path.rglob("*") if path.is_dir() else [path]
        # Without .git and the like.
        files = [p for p in within if p.is_file() and not any(part[0] == "." for part in p.relative_to(path).parts)]
        found[name] = {p.relative_to(path.parent).as_posix(): p.read_bytes() for p in files}
    return found


def unpack_named(folder: Path, named: Mapping[str, Files]) -> dict[str, str]:
    """The inverse of ``pack_named``, below ``folder``: name to the path where it now is."""
    places = {}
    for number, (name, files) in enumerate(named.items()):
        unpack(folder / str(number), files)
        places[name] = str(folder / str(number) / next(iter(files)).split("/")[0])
    return places


@dataclass(frozen=True, kw_only=True)
class Home:
    """The driver's side."""

    run_dir: Path
    pool: Path
    tasks: Sequence[str]
    named: Sequence[str]
    """Files and folders that the settings name, and that a worker has not."""
    compares: bool = False
    """Whether a bank's members are compared with all others: early exit."""

    def pack(self, plan: Plan, bank: PlannedBank, folder: Callable[[PlannedBank], Path]) -> Files:
        """What a bank goes on from: the plan, its checkpoints, its members, and the records that it is compared with.

        ``folder``: from a bank to its own.
        """
        own = read_plan(folder(bank), bank.members)
        folders = [folder(b) for b in (bank, *(own.banks if own else []))]
        run = [self.run_dir / FILE, *(f / name for f in folders for name in (_CHECKPOINT, FILE))]
        members = []
        for task in self.tasks:
            for name in plan.members if self.compares else bank.members:
                record = pool.read_record(self.pool, task, name)
                if record is None:
                    continue
                at = pool.member_folder(self.pool, task, name)
                members.append(at / pool.RECORD)
                if name in bank.members:
                    members += [at / file for file in record.files]
                    members += [pool.examples_file(self.pool, task, *of) for of in record.examples.items()]
        runs = _packed(self.run_dir, run)
        return {
            **{f"runs/{self.run_dir.name}/{name}": content for name, content in runs.items()},
            **{f"{POOL}/{name}": content for name, content in _packed(self.pool, set(members)).items()},
        }

    def bring(self, folder: Path, files: Files) -> None:
        """Take in what ``pack_trained`` packed for the bank of ``folder``."""
        brought = folder / BROUGHT
        shutil.rmtree(brought, ignore_errors=True)
        own = f"runs/{self.run_dir.name}/{folder.relative_to(self.run_dir).as_posix()}/{FILE}"
        unpack(brought, {name: content for name, content in files.items() if name != own})
        # Whole from here on, whatever happens: the plan is there in one move.
        unpack(brought, {f".{FILE}": files[own]})
        os.replace(brought / f".{FILE}", brought / FILE)
        take_in(brought, self.run_dir, self.pool)


def take_in(brought: Path, run_dir: Path, home: Path) -> None:
    """Put a bank that came home in its place: its members into the pool at ``home``, the rest below ``run_dir``.

    ``brought``: the folder that ``Home.bring`` made, inside the bank's. The bank's plan is written to it last and
    leaves it last: without it, the folder is not whole, or all of it is in its place. So after a kill at any moment the
    next start has only to do the same again. ``UserError`` where a file is damaged.
    """
    if (brought / FILE).is_file():
        tasks = sorted(p.name for p in (brought / POOL).glob("*"))
        records = [record for task in tasks for record in pool.read_records(brought / POOL, task)]
        for record in records:
            _check(brought, record)
        for record in records:
            for split, print_ in record.examples.items():
                examples = pool.read_examples(brought / POOL, record.task, split, print_)
                pool.write_examples(home, record.task, split, examples.ids, examples.labels)
        pool.write_members(home, [pool.NewMember(record=r, files=_files(brought, r)) for r in records])
        run = brought / "runs" / run_dir.name
        for file in [p for p in run.rglob("*") if p.is_file()]:
            target = run_dir / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        os.replace(brought / FILE, brought.parent / FILE)
    shutil.rmtree(brought, ignore_errors=True)


def _files(brought: Path, record: pool.MemberRecord) -> dict[str, Path]:
    return {name: pool.member_folder(brought / POOL, record.task, record.name) / name for name in record.files}


def _check(brought: Path, record: pool.MemberRecord) -> None:
    for name, path in _files(brought, record).items():
        if not path.is_file() or pool.checksum(path) != record.files[name]:
            raise UserError(f"{path}: damaged on its way home; delete {brought}, and its bank is trained again")


# Away


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder to train in, below TMPDIR, freed in the end; what a killed worker left, the next one frees."""
    # A lock goes with the process that has it; Windows has none. Another user's folder cannot be opened.
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*") if os.name == "posix" else ():
        with contextlib.suppress(UserError, OSError), pool.sole_process(left, "trains here"):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        # Named so that it is looked at only once it is locked.
        new = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}"))
        stack.enter_context(pool.sole_process(new, "trains here"))
        folder = new.rename(new.with_name(new.name[1:]))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def pack_trained(folder: Path, bank: PlannedBank, at: str) -> Files:
    """What is brought home of a bank that was trained in ``folder``: members, plan, checkpoints and curves.

    ``at``: the bank's folder below the run's.
    """
    (run,) = (folder / "runs").iterdir()
    files = [p for name in (_CHECKPOINT, FILE) for p in (run / "checkpoint").rglob(name)]
    for task in (folder / POOL).glob("*"):
        for name in (*bank.members, pool.EXAMPLES):
            files += (task / name).rglob("*")
    curves = _packed(run, (p for name in _CURVES for p in (run / name).rglob("*")))
    # Each bank's in its own folder: beside another's they would have the same names.
    return _packed(folder, files) | {f"runs/{run.name}/{at}/{name}": c for name, c in curves.items()}
