"""The scheduler: prompts are read in pieces between the steps of a batch, whose rows requests join and leave."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ahn_layers import HippocampalCache

from .batch import Batch
from .metrics import Metrics
from .prefixes import Prefixes
from .reading import Reading
from .request import BusyError, Done, Failed, Request
from .sampling import NO_TOKEN, choose

log = logging.getLogger("serving")


def _learned_positions(model: Any) -> int | None:
    """How many positions a model has a vector for, None if it has none and rotates, say."""
    most, words = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = [u.num_embeddings for u in model.modules() if isinstance(u, torch.nn.Embedding) and u is not words]
    return most if most is not None and any(0 <= size - most <= 2 for size in tables) else None


class Engine:
    """Runs requests on a retrofitted model, many at a time, in a thread of its own.

    In turn: one step of all rows that decode, then one piece of a prompt. So nobody who is being answered waits for
    longer than a piece takes, however long the prompts of others are.

    Args:
        model: a retrofitted model.
        rows: requests that are read or decoded at the same time.
        waiting: further requests that may wait for a row; beyond that, ``submit`` raises ``BusyError``.
        piece: tokens of a prompt that are read between two steps.
        stepwise: a prompt of which no more tokens are left goes on in the steps, a token in each, and keeps nobody
            waiting. Only a prompt that goes on from something: a conversation, a shared beginning, pieces of its own.
        fixed: see ``Batch``.
        prefixes: shared beginnings that are kept.
        metrics: what is counted.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 16,
        waiting: int = 64,
        piece: int = 256,
        stepwise: int = 0,
        fixed: bool = False,
        prefixes: int = 8,
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.rows, self.most_waiting, self.stepwise = model, rows, waiting, stepwise
        self.metrics, self.positions = metrics or Metrics(), _learned_positions(model)
        self.prefixes = Prefixes(prefixes)
        self.batch = Batch(model, rows, fixed=fixed)
        self.waiting: deque[Request] = deque()
        self.reading = Reading(model, piece, self.prefixes, self.metrics)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Take no more requests, let those that run finish for some seconds, then cancel them."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            for request in self._everybody():
                request.cancelled.set()
            self._changed.notify_all()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            BusyError: if too many are waiting, or the engine is closing.
        """
        with self._changed:
            free = self.rows - len(self.reading.requests) - len(self.batch.active)
            if self._closing or len(self.waiting) >= self.most_waiting + max(0, free):
                self.metrics.add("rejected_total")
                raise BusyError(5 if self._closing else 1 + len(self.waiting) // self.rows, closing=self._closing)
            if self.positions is not None:  # the model fails beyond the last one, for all rows
                past = 0 if request.cache is None else int(request.cache.get_seq_length())
                room = self.positions - past - len(request.ids) + 1
                request.max_tokens = max(1, min(request.max_tokens, room))
            request.submitted = time.monotonic()
            self.waiting.append(request)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """End a request as soon as possible."""
        request.cancelled.set()
        with self._changed:
            self._changed.notify_all()

    def _everybody(self) -> list[Request]:
        with self._changed:
            return [*self.waiting, *self.reading.requests, *(user for user in self.batch.users if user is not None)]

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    while not self._everybody() and not self._closing:
                        self._changed.wait()
                    if self._closing and not self._everybody():
                        return
                self._drop_cancelled()
                self._admit()
                self._decode()
                self._read()
                self.metrics.set("rows_decoding", len(self.batch.active))
                self.metrics.set("rows_reading", len(self.reading.requests))
                self.metrics.set("requests_waiting", len(self.waiting))
                self.metrics.set("prefixes", len(self.prefixes))

    def _drop_cancelled(self) -> None:
        for request in [u for u in self._everybody() if u.cancelled.is_set()]:
            self._end(request, Done("cancelled"))

    def _admit(self) -> None:
        with self._changed:
            while self.waiting and len(self.reading.requests) + len(self.batch.active) < self.rows:
                self.reading.requests.append(self.waiting.popleft())

    def _read(self) -> None:
        """Let prompts that are nearly read join the steps, and read a piece of another one."""
        for request in list(self.reading.requests):
            with self._alone(request):
                self.reading.reuse(request)
                if self.reading.goes_on_by_steps(request, self.stepwise):
                    self.reading.requests.remove(request)
                    self.batch.join(request, request.hand_over(), self.reading.by_a_step(request))
        request = self.reading.next()
        if request is not None:
            with self._alone(request):
                logits = self.reading.read(request)
                if logits is None:
                    self.reading.requests.rotate(-1)
                else:
                    self.reading.requests.remove(request)
                    self._answer(request, logits)

    def _answer(self, request: Request, logits: torch.Tensor) -> None:
        """The first token of the reply, and a row to go on in."""
        (token,) = choose(logits, [request.sampling])
        end = self._take(request, token)
        if end is None:
            self.batch.join(request, request.hand_over(), token)
        else:
            self._finish(request, end, request.cache)

    def _take(self, request: Request, token: int) -> Done | None:
        """Add a token to a reply; returns its end, if this is it."""
        if token == NO_TOKEN:
            raise ArithmeticError("the logits of the model are not finite numbers")
        if not request.started:
            request.started = time.monotonic()
            self.metrics.observe("time_to_first_token_seconds", request.started - request.submitted)
        self.metrics.add("generated_tokens_total")
        return request.take(token)

    def _decode(self) -> None:
        if not self.batch.active:
            return
        begin = time.monotonic()
        users = list(self.batch.users)
        try:
            logits = self.batch.step()
            tokens = choose(logits, [u.sampling if u is not None and u.is_read else None for u in users])
        except Exception as error:
            log.exception("a step failed")
            self._fail_all(error)
            return
        for request, token in zip(users, tokens, strict=True):
            if request is not None:
                with self._alone(request):
                    self._go_on(request, token)
        self.metrics.observe("step_seconds", time.monotonic() - begin)

    def _go_on(self, request: Request, token: int) -> None:
        """After a step: the next token of its prompt, or the one that was chosen."""
        if not request.is_read:
            self.batch.tokens[self.batch.users.index(request)] = self.reading.by_a_step(request)
            return
        end = self._take(request, token)
        if end is None:
            self.batch.tokens[self.batch.users.index(request)] = token
        else:
            self._finish(request, end, self.batch.leave(request, keep=request.keep))

    @contextmanager
    def _alone(self, request: Request) -> Iterator[None]:
        """What goes wrong here ends this request, and no other one."""
        try:
            yield
        except Exception as error:
            log.exception("a request failed")
            self._end(request, Failed(error))

    def _finish(self, request: Request, end: Done, cache: HippocampalCache | None) -> None:
        request.emit(Done(end.reason, cache if request.keep else None, end.pending))
        self.metrics.add("requests_total", reason=end.reason)

    def _end(self, request: Request, event: Done | Failed) -> None:
        """Take a request out, wherever it is."""
        with self._changed:
            for queue in (self.waiting, self.reading.requests):
                if request in queue:
                    queue.remove(request)
        if request in self.batch.users:
            self.batch.leave(request, keep=False)
        request.cache = None
        self.metrics.add("requests_total", reason=event.reason if isinstance(event, Done) else "failed")
        request.emit(event)

    def _fail_all(self, error: Exception) -> None:
        users, old = [self.batch.users[row] for row in self.batch.active], self.batch
        self.batch = Batch(self.model, old.size, fixed=old.fixed)
        for request in users:
            self._end(request, Failed(error))
