"""What the layers below the members' lowest adapters make of each example: computed once, and kept in a file.

The file is shared by all members, banks and epochs, and by later runs on the same tokens and base model. It is filled
as examples are first asked for.

Axes: N examples of a split, B examples in a batch, T tokens of all of them, H hidden width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lora_ensemble.bank.encode import product_dtype
from lora_ensemble.bank.model import Bank
from lora_ensemble.files import gib, locked
from lora_ensemble.text.packing import MULTIPLE, places
from lora_ensemble.train.batches import TokenisedSplit
from lora_ensemble.train.notices import say

_FORMAT = 1  # of a file, and of how its content is computed
_BLOCK = 8
"""Examples that are computed together: those of about one length, whoever is asked for first, so that their bits depend
on nobody. Of more, a short run would compute many that it never sees; of fewer, all would take longer."""


class FrozenStates:
    """What :meth:`Bank.frozen_states` gives of batches of a split, without computing an example twice.

    ``base``: the base model's fingerprint. ``folder``: where the files are; None: in one that goes with this object.
    ``most``: bytes that the files of the folder may hold together.
    """

    def __init__(self, bank: Bank, base: Mapping[str, Any], folder: Path | None, most: float) -> None:
        self._bank, self._base, self._most = bank, dict(base), most
        self._shared, self._folder = folder is not None, folder or Path(tempfile.mkdtemp(prefix="frozen-"))
        if not self._shared:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files: dict[tuple[TokenisedSplit, int, torch.dtype], _StateFile | None] = {}
        self._sizes: dict[str, int] = {}  # bytes of each file that is in use, by name

    def __call__(self, split: TokenisedSplit, rows: np.ndarray) -> dict[int, Tensor] | None:
        """Of the examples ``rows`` (B,), as a packed row; None where they cannot be kept, which is said once."""
        bank, device, files = self._bank, self._bank.weights.device, {}
        for layer in bank.frozen_layers:
            if (file := self._file(split, layer)) is None:
                return None
            files[layer] = file
        try:
            missing = sorted({block for file in files.values() for block in file.missing(rows)})
            with torch.inference_mode(False):  # an evaluation's tensors would be of no use to training
                for block in missing:
                    batch = split.batch(next(iter(files.values())).examples(block))
                    for reached, state in bank.frozen_states(move_data_to_device(batch, device)).items():
                        files[reached].write(block, state[0])
                return {n: file.read(rows).to(device, non_blocking=True) for n, file in files.items()}
        except OSError as e:
            say(f"{self._folder}: {e.strerror}: what is frozen cannot be kept there, and is computed in each step")
            self._files = dict.fromkeys(self._files)
            return None

    def _file(self, split: TokenisedSplit, layer: int) -> _StateFile | None:
        """The split's file for a layer; None where there is no room for it."""
        bank = self._bank
        by_token = layer < bank.depth
        dtype = product_dtype(bank.weights) if by_token else bank.encoder.dtype
        key = split, layer, dtype
        if key not in self._files:
            what = [_FORMAT, split.tokens.digest, self._base, layer, str(dtype), bank.weights.device.type]
            name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
            width = bank.config.hidden_size * dtype.itemsize
            size = width * int(split.lengths.sum() if by_token else len(split))
            self._files[key], why = None, "no room"
            try:
                if _has_room(self._folder, name, size, self._most, self._sizes):
                    folder, self._sizes[name] = self._folder / name, size
                    self._files[key] = _StateFile(split, folder, width=width, dtype=dtype, by_token=by_token)
            except OSError as e:
                why = e.strerror or str(e)
            below = f"below layer {layer}: {gib(size)} of {len(split)} examples"
            if self._files[key] is None:
                say(f"{below} cannot be kept in {self._folder} ({why}; model.frozen_cache): computed in each step")
            elif self._shared and size > _MENTIONED:
                say(f"{below} are kept in {self._folder}, for later runs too")
        return self._files[key]


_STATES, _CHECKSUMS = "states", "checksums"
_MENTIONED = 2**26  # bytes: of less, nobody needs to know


def _has_room(folder: Path, name: str, size: int, most: float, in_use: Mapping[str, int]) -> bool:
    """Whether a file of ``size`` bytes can be made in the folder, where that needs it by deleting the oldest others.

    ``in_use``: files that stay, by name, and how large they may get.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [p for p in folder.iterdir() if p.name not in in_use and p.name != name and p.is_dir()]
    sizes = {p: _on_disk(p) for p in sorted(others, key=lambda p: p.stat().st_mtime)}
    room = most - sum(of for other, of in in_use.items() if other != name)
    # The pool's members come first: half of what is free stays free.
    if size > room or size - _on_disk(folder / name) > shutil.disk_usage(folder).free / 2:
        return False
    while sum(sizes.values()) + size > room:
        oldest = next(iter(sizes))
        shutil.rmtree(oldest, ignore_errors=True)
        del sizes[oldest]
    return True


def _on_disk(folder: Path) -> int:
    """Bytes that a folder's files take; those that were never written to take none."""
    return sum(f.stat().st_blocks * 512 for f in folder.iterdir()) if folder.is_dir() else 0


class _StateFile:
    """States of a split's examples in a file of bytes, in blocks that are there or not.

    Any number of processes may fill it. A block counts only where its checksum, which is written after it, is right:
    one that was cut off is computed again. ``width``: bytes of a state. ``by_token``: whether an example has one for
    each token, or one alone.
    """

    def __init__(self, split: TokenisedSplit, folder: Path, *, width: int, dtype: torch.dtype, by_token: bool) -> None:
        self._dtype, self._by_token, self._folder = dtype, by_token, folder
        self._order = np.argsort(split.lengths, kind="stable")
        self._lengths = split.lengths if by_token else np.ones_like(split.lengths)  # states of each example
        ends = np.cumsum(self._lengths[self._order])
        self._at = np.empty_like(ends)  # where each example's states begin
        self._at[self._order] = ends - self._lengths[self._order]
        self._block = np.empty_like(ends)  # of each example
        self._block[self._order] = np.arange(len(split)) // _BLOCK
        blocks = -(-len(split) // _BLOCK)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # the last to be used is the last to be deleted
        self._states = _mapped(folder / _STATES, int(ends[-1]) * width).reshape(-1, width)
        self._checksums = _mapped(folder / _CHECKSUMS, blocks * 8).reshape(-1, 8)
        self._known = np.zeros(blocks, bool)  # whether this process has seen that a block is right

    def examples(self, block: int) -> np.ndarray:
        """Numbers of a block's examples."""
        return self._order[block * _BLOCK : (block + 1) * _BLOCK]

    def missing(self, rows: np.ndarray) -> list[int]:
        """Blocks that the examples ``rows`` lie in and that are not there."""
        return [b for b in np.unique(self._block[rows]).tolist() if not self._known[b] and not self._is_whole(b)]

    def _place(self, block: int) -> tuple[int, int]:
        examples = self.examples(block)
        return int(self._at[examples[0]]), int(self._lengths[examples].sum())

    def _is_whole(self, block: int) -> bool:
        start, count = self._place(block)
        there = self._checksums[block].tobytes()
        self._known[block] = any(there) and there == _checksum(self._states[start : start + count])
        return bool(self._known[block])

    def write(self, block: int, states: Tensor) -> None:
        """Add a block: its examples' states one after another, and what may have filled up their row. ``OSError``."""
        start, count = self._place(block)
        content = states[:count].contiguous().view(torch.uint8).cpu().numpy()
        with locked(self._folder / "lock"):
            if not self._is_whole(block):  # else another process was faster, whose last bits may be others
                _write_at(self._folder / _STATES, start * self._states.shape[1], content.tobytes())
                _write_at(self._folder / _CHECKSUMS, block * 8, _checksum(content))
                self._known[block] = True

    def read(self, rows: np.ndarray) -> Tensor:
        """States of the examples ``rows`` (B,), all of them there: a packed row (1, T, H), or (1, B, H)."""
        states = torch.from_numpy(self._states[places(self._at[rows], self._lengths[rows])]).view(self._dtype)
        if self._by_token:
            states = torch.nn.functional.pad(states, (0, 0, 0, -len(states) % MULTIPLE))
        return states[None]


def _mapped(path: Path, size: int) -> np.ndarray:
    """A file of ``size`` bytes, holes at first, as an array that sees what is written to it."""
    with open(path, "ab") as f:
        if f.tell() < size:
            f.truncate(size)
    return np.memmap(path, np.uint8, "r", shape=(size,))


def _write_at(path: Path, place: int, content: bytes) -> None:
    """Write to a file; not through its mapping, where a full disk would kill the process."""
    with open(path, "r+b") as f:
        f.seek(place)
        f.write(content)


def _checksum(content: np.ndarray) -> bytes:
    """Eight bytes that are never all zero, as a hole's are."""
    return b"\1" + zlib.crc32(content.tobytes()).to_bytes(7, "big")
