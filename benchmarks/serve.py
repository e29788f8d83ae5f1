"""``lora-ensemble serve`` under many clients at once, with requests answered together and one by one, in one run.

    python benchmarks/serve.py --ensemble dicor.json --root DIR

Both services are processes of their own on loopback and stand ready; one is asked at a time, in turns. A client is a
thread that keeps its connection and asks about one text of the dev split after another, waiting for each answer, until
the time is over; the rate is all answers over the time to the last of them. An error is any status but 200, and any
connection that fails. Decisions about the same text are held against those of the other service. The service's
processor time for each request (Linux) hardly depends on what else the machine does.

Exit code 1 where there was an error.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workload
from lora_ensemble.errors import UserError
from lora_ensemble.tasks import PRESETS
from lora_ensemble.text.readers import read_split
from machine import describe

_SEED = 11711


@dataclass
class Load:
    """What a service was asked in one repeat, and what became of it."""

    seconds: list[float] = field(default_factory=list)
    """Latency of each request that was answered."""
    lasted: float = math.nan
    """Seconds to the last answer."""
    processor: float = math.nan
    """Seconds that the service took of it."""
    errors: list[str] = field(default_factory=list)
    decisions: dict[int, Any] = field(default_factory=dict)
    """Number of a text to what was decided about it."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.lasted


class Service:
    """A running ``lora-ensemble serve``; ``with`` ends it."""

    def __init__(self, name: str, ensemble: Path, *options: str) -> None:
        self.name = name
        self.loads: list[Load] = []
        command = [sys.executable, "-m", "lora_ensemble", "serve", "--ensemble", str(ensemble), "--port", "0", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def wait(self) -> None:
        """Until it is ready."""
        assert self._process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self._process.stdout.readline())
        if found is None:
            raise RuntimeError(f"{self.name}: the service ended with code {self._process.wait()}")
        self._port = int(found[1])

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is kept, and opened anew where it has failed."""
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)

    def get(self, path: str) -> str:
        """What a GET is answered."""
        connection = self.connect()
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def processor(self) -> float:
        """Seconds of the processor, so far."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime

    def texts_a_call(self) -> float:
        """Mean, so far."""
        total, count = (
            float(line.split()[1])
            for end in ("sum", "count")
            for line in self.get("/metrics").splitlines()
            if line.startswith(f"lora_ensemble_batch_texts_{end} ")
        )
        return total / count


def ask(service: Service, texts: Sequence[Any], *, clients: int, seconds: float) -> Load:
    """``clients`` at once, for so long."""
    load, lock = Load(), threading.Lock()
    begin = time.perf_counter()
    end = begin + seconds

    def client(number: int) -> None:
        connection = service.connect()
        for i in np.random.default_rng([_SEED, number]).permutation(len(texts)).tolist() * 1000:
            start = time.perf_counter()
            if start >= end:
                return
            try:
                body = json.dumps({"texts": [texts[i]]})
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                wrong = "" if answer.status == 200 else f"status {answer.status}"
            except (OSError, http.client.HTTPException) as e:
                wrong = repr(e)
                connection.close()
            done = time.perf_counter()
            with lock:
                if wrong:
                    load.errors.append(wrong)
                else:
                    load.seconds.append(done - start)
                    load.decisions[i] = json.loads(content)["answers"][0]["decision"]

    before = service.processor()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.lasted = time.perf_counter() - begin
    load.processor = service.processor() - before
    return load


def processor_s(service: Service) -> float:
    """Seconds of the processor for each answer."""
    return sum(load.processor for load in service.loads) / sum(len(load.seconds) for load in service.loads)


def row(service: Service) -> str:
    """The service's row of the table, over all repeats."""
    latencies = np.concatenate([load.seconds for load in service.loads])
    p50, p90, p99 = np.percentile(latencies, [50, 90, 99])
    rate = statistics.median(load.rate for load in service.loads)
    errors = sum(len(load.errors) for load in service.loads)
    return (
        f"| {service.name} | {len(latencies) + errors} | {errors} | {rate:.1f} | {p50:.2f} | {p90:.2f} | {p99:.2f} | "
        f"{service.texts_a_call():.1f} | {1000 * processor_s(service):.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", type=Path, required=True, help="what dicor select wrote, of a preset's task")
    parser.add_argument("--root", type=Path, help="folder of the task's dev file (default: as the other benchmarks)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--seconds", type=float, default=60, help="that a service is asked for, each repeat (default: 60)"
    )
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args(arguments)
    task = PRESETS.get(json.loads(args.ensemble.read_text())["task"])
    if task is None:
        raise UserError(f"{args.ensemble}: its task is none of {', '.join(PRESETS)}")
    split = read_split(task, "dev", workload.data_root(args.root), need_labels=False)
    columns = [list(column) for column in split.texts]
    texts = columns[0] if len(columns) == 1 else [list(pair) for pair in zip(*columns, strict=True)]
    print(describe("cpu", torch.get_num_threads()))
    with ExitStack() as stack:
        together = stack.enter_context(Service("together", args.ensemble))
        alone = stack.enter_context(Service("one by one", args.ensemble, "--max-batch", "1"))
        for service in (together, alone):
            service.wait()
        members = len(json.loads(together.get("/ensemble"))["members"])
        print(
            f"{task.name}, {members} members; {args.clients} clients, {len(texts)} texts, {args.seconds:g} s each time"
        )
        for repeat in range(args.repeats):
            for service in (together, alone)[:: 1 if repeat % 2 == 0 else -1]:
                load = ask(service, texts, clients=args.clients, seconds=args.seconds)
                service.loads.append(load)
                print(
                    f"  {service.name}: {load.rate:.1f} requests/s, {len(load.errors)} errors "
                    f"{sorted(set(load.errors))[:3] or ''}(load average {os.getloadavg()[0]:.0f})",
                    flush=True,
                )
        print("\n| requests | asked | errors | requests/s | p50, s | p90, s | p99, s | texts a call | processor, ms |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        print(row(together), row(alone), sep="\n")
    ratios = [a.rate / b.rate for a, b in zip(together.loads, alone.loads, strict=True)]
    print(f"\ntogether over one by one: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
    print(f"processor time, one by one over together: {processor_s(alone) / processor_s(together):.2f}")
    said, other = ({i: d for load in s.loads for i, d in load.decisions.items()} for s in (together, alone))
    both = said.keys() & other.keys()
    differ = sum(abs(said[i] - other[i]) > 1e-4 if task.kind == "regression" else said[i] != other[i] for i in both)
    print(f"{len(both)} texts were answered by both; {differ} decisions differ")
    return int(any(load.errors for service in (together, alone) for load in service.loads))


if __name__ == "__main__":
    sys.exit(main())
