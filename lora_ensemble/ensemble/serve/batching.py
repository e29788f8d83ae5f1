"""Questions of many clients in one call: what waits while the ensemble works is asked together next.

All of it but the call itself runs in the event loop, so there is nothing to lock. Axes: M members, N texts, C outputs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_ensemble.ensemble.options import Limits

if TYPE_CHECKING:
    from lora_ensemble.ensemble.restored import Text


class BusyError(Exception):
    """Too much waits already, or the service is stopping: the client may come again."""


@dataclass(frozen=True, eq=False)
class _Question:
    texts: Sequence[Text]
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """One call at a time, in a thread of its own; ``async with`` starts it, and at the end answers what still waits.

    ``logits``: N texts to (M, N, C), each text's answer its own. ``limits``: of a call, unless one question has more,
    and of what may wait; one question may always, however long. ``taken``: told the texts of each call. No call is put
    off to let more come together: with many clients, the last call was wait enough.
    """

    def __init__(self, logits: Callable[[Sequence[Text]], np.ndarray], limits: Limits, taken: Callable[[int], object]):
        self._logits, self._limits, self._taken = logits, limits, taken
        self._queue: deque[_Question] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Texts that wait for a call."""
        return sum(len(question.texts) for question in self._queue)

    @property
    def ready(self) -> bool:
        """Whether a question would be taken now."""
        return self._task is not None and not self._stopping and self.waiting < self._limits.waiting

    async def ask(self, texts: Sequence[Text]) -> np.ndarray:
        """(M, N, C) for these texts; whoever is cancelled meanwhile no longer waits. ``BusyError`` at once or never."""
        if not self.ready or (self._queue and self.waiting + len(texts) > self._limits.waiting):
            raise BusyError
        question = _Question(texts, asyncio.get_running_loop().create_future())
        self._queue.append(question)
        self._wake.set()
        try:
            return await question.answer
        finally:
            if question in self._queue:  # cancelled
                self._queue.remove(question)

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self._wake.set()
        assert self._task is not None
        await self._task

    async def _work(self) -> None:
        with ThreadPoolExecutor(1, "ensemble") as thread:
            while self._queue or not self._stopping:
                if self._queue:
                    await self._answer(self._take(), thread)
                else:
                    self._wake.clear()
                    await self._wake.wait()

    def _take(self) -> list[_Question]:
        """The questions of the next call."""
        taken = [self._queue.popleft()]
        n = len(taken[0].texts)
        while self._queue and (n := n + len(self._queue[0].texts)) <= self._limits.batch:
            taken.append(self._queue.popleft())
        return taken

    async def _answer(self, questions: list[_Question], thread: ThreadPoolExecutor) -> None:
        texts = [text for question in questions for text in question.texts]
        self._taken(len(texts))
        try:
            logits = await asyncio.get_running_loop().run_in_executor(thread, self._logits, texts)
        except Exception as e:
            if len(questions) > 1:  # one question's fault, or that of so many at once: nobody else has to pay for it
                for question in questions:
                    await self._answer([question], thread)
            elif not questions[0].answer.done():
                questions[0].answer.set_exception(e)
            return
        ends = np.cumsum([len(question.texts) for question in questions])
        for question, own in zip(questions, np.split(logits, ends[:-1], axis=1), strict=True):
            if not question.answer.done():  # else its client has gone
                question.answer.set_result(own)
