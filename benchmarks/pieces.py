"""What the pieces cost that the bank does otherwise than torch: dropout's masks and attention while training on a CPU.

    python benchmarks/pieces.py --members 8 --threads 1

Each piece on the numbers of one layer of all-MiniLM-L6-v2, for a batch with SST's lengths: median milliseconds, the
two sides in turns. Dropout is forward only, beside a matrix product of the same numbers for comparison; attention is
forward and backward. Also how much of padded batches is padding.

Axes: M members, B examples in a batch, T tokens of all of them, H hidden width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

import workload
from lora_ensemble.bank.attention import attend, attend_padded
from lora_ensemble.bank.dropout import dropped
from lora_ensemble.text.packing import layout
from machine import describe

_HEADS = 12
_P = 0.1  # BERT's dropout
_BATCHES = 1000


def milliseconds(pieces: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Medians over ``repeats``, the pieces in turns, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in pieces]
    for _ in range(repeats + 1):
        for times, piece in zip(taken, pieces, strict=True):
            start = time.perf_counter()
            piece()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times[1:]) for times in taken]


def dropouts(members: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[float]:
    """torch's dropout, ours, and a product with a feed-forward layer's weight, on (M, T, H) numbers."""
    h, inner = (workload.SHAPES["random:minilm"][name] for name in ("hidden_size", "intermediate_size"))
    x, weight = torch.randn(members, tokens, h, dtype=dtype), torch.randn(inner, h, dtype=dtype)
    return milliseconds([lambda: F.dropout(x, _P), lambda: dropped(x, _P), lambda: F.linear(x, weight)], repeats)


def attentions(members: int, lengths: np.ndarray, p: float, repeats: int) -> list[float]:
    """torch's fused attention on padded rows, and ours example by example, with their gradients."""
    h, batch = workload.SHAPES["random:minilm"]["hidden_size"], layout(lengths)
    tokens = len(batch["position_ids"])
    q, k, v = (torch.randn(members, tokens, h, requires_grad=True) for _ in range(3))
    grad = torch.randn(members, tokens, h)

    def step(out: torch.Tensor) -> None:
        torch.autograd.grad(out, (q, k, v), grad)

    return milliseconds(
        [
            lambda: step(attend_padded(q, k, v, batch, _HEADS, p, None)),
            lambda: step(attend(q, k, v, batch, heads=_HEADS, dropout=p)),
        ],
        repeats,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8, help="default: 8")
    parser.add_argument("--batch_size", type=int, default=8, help="default: 8")
    parser.add_argument("--repeats", type=int, default=50, help="default: 50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    batches = workload.sst_lengths(_BATCHES * args.batch_size).reshape(_BATCHES, args.batch_size)
    padding = 1 - batches.sum() / (batches.max(1).sum() * args.batch_size)
    lengths = batches[np.argsort(batches.sum(1), kind="stable")[_BATCHES // 2]]  # the median batch
    tokens = len(layout(lengths)["position_ids"])
    print(f"{describe('cpu', args.threads)}\n")
    print(f"padding in batches of {args.batch_size}: {padding:.0%} of their tokens\n")
    print(f"{args.members} members, {tokens} tokens (examples of {', '.join(map(str, lengths))}):\n")
    print("| piece | torch, ms | ours, ms |\n| --- | --- | --- |")
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        theirs, ours, product = dropouts(args.members, tokens, dtype, args.repeats)
        print(f"| dropout, {name}; the product takes {product:.2f} ms | {theirs:.2f} | {ours:.2f} |")
    for p in (0.0, _P):
        theirs, ours = attentions(args.members, lengths, p, args.repeats)
        print(f"| attention, float32, dropout {p:g} | {theirs:.2f} | {ours:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
