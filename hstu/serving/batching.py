"""Questions of many clients, answered together: a queue, and the one thread in which the model runs."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hstu.serving.model import Answer, ServedModel
from hstu.serving.questions import Question

logger = logging.getLogger(__name__)


class OverloadedError(Exception):
    """More questions wait than are let in."""


class AnswerError(Exception):
    """A question that was let in has no answer; the log has the reason."""


class StoppingError(Exception):
    """The server is about to end."""


@dataclass(frozen=True)
class _Waiting:
    model: ServedModel
    question: Question
    answer: Future[Answer]


class Batches:
    """Answers questions in batches of those that came within some milliseconds.

    A question is answered by the model that read it, so that none is lost when another one takes its place.

    Args:
        size: Questions of a batch at most.
        wait: Seconds that the first question of a batch waits for others.
        most: Questions that may wait.
        told: Called with the number of questions of each batch.
    """

    def __init__(self, *, size: int, wait: float, most: int, told: Callable[[int], None] = lambda size: None) -> None:
        self.size, self.wait, self.most, self.told = size, wait, most, told
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(most)
        self._stopping, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that wait now, roughly."""
        return self._queue.qsize()

    def ask(self, model: ServedModel, question: Question) -> Future[Answer]:
        """Return what becomes the answer; any thread may ask.

        Raises:
            OverloadedError: if too many questions wait.
            StoppingError: after ``close``.
        """
        waiting = _Waiting(model, question, Future())
        with self._lock:  # nothing comes after the None that ends the thread
            if self._stopping:
                raise StoppingError
            try:
                self._queue.put_nowait(waiting)
            except queue.Full:
                raise OverloadedError from None
        return waiting.answer

    def close(self, timeout: float | None = None) -> None:
        """Answer what waits, and end the thread."""
        with self._lock:
            ended, self._stopping = self._stopping, True
        if not ended:
            self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, stop = self._more(first)
            batch = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
            for model in dict.fromkeys(waiting.model for waiting in batch):
                mine = [waiting for waiting in batch if waiting.model is model]
                self.told(len(mine))
                self._answer(model, mine)
            if stop:
                return

    def _more(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """Return ``first`` and those that come soon after it, and whether no more will come."""
        batch, deadline = [first], time.monotonic() + self.wait
        while len(batch) < self.size:
            try:
                waiting = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if waiting is None:
                return batch, True
            batch.append(waiting)
        return batch, False

    def _answer(self, model: ServedModel, batch: Sequence[_Waiting]) -> None:
        try:
            answers = model.answer([waiting.question for waiting in batch])
        except Exception:
            if len(batch) == 1:
                logger.exception("a question was not answered: %s", batch[0].question)
                batch[0].answer.set_exception(
                    AnswerError("the question was not answered; the log of the server says why")
                )
                return
            answers = None
        if answers is None:  # whoever asked what cannot be answered is not to take the others along
            for waiting in batch:
                self._answer(model, [waiting])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.answer.set_result(answer)
