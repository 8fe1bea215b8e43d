"""The scheduler: prompts are read in pieces between the steps of a batch, whose rows requests join and leave."""

import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from ahn_layers import HippocampalCache

from .batch import Batch
from .metrics import Metrics
from .prefixes import Prefixes
from .request import BusyError, Done, Failed, Request
from .sampling import choose

log = logging.getLogger("serving")
NO_NUMBERS = "the logits of the model are not finite numbers"


class Engine:
    """Runs requests on a retrofitted model, many at a time, in a thread of its own.

    In turn: one step of all rows that decode, then one piece of a prompt. So nobody who is being answered waits for
    longer than a piece takes, however long the prompts of others are.

    Args:
        model: a retrofitted model.
        rows: requests that are read or decoded at the same time.
        waiting: further requests that may wait for a row; beyond that, ``submit`` raises ``BusyError``.
        piece: tokens of a prompt that are read between two steps.
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
        fixed: bool = False,
        prefixes: int = 8,
        metrics: Metrics | None = None,
    ) -> None:
        self.model, self.rows, self.most_waiting, self.piece = model, rows, waiting, piece
        self.metrics = metrics or Metrics()
        self.prefixes = Prefixes(prefixes)
        self.batch = Batch(model, rows, fixed=fixed)
        self.waiting: deque[Request] = deque()
        self.reading: deque[Request] = deque()
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
            free = self.rows - len(self.reading) - len(self.batch.active)
            if self._closing or len(self.waiting) >= self.most_waiting + max(0, free):
                self.metrics.add("rejected_total")
                raise BusyError(5 if self._closing else 1 + len(self.waiting) // self.rows, closing=self._closing)
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
            return [*self.waiting, *self.reading, *(user for user in self.batch.users if user is not None)]

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
                self.metrics.set("rows_reading", len(self.reading))
                self.metrics.set("requests_waiting", len(self.waiting))
                self.metrics.set("prefixes", len(self.prefixes))

    def _drop_cancelled(self) -> None:
        for request in [u for u in self._everybody() if u.cancelled.is_set()]:
            self._end(request, Done("cancelled"))

    def _admit(self) -> None:
        with self._changed:
            while self.waiting and len(self.reading) + len(self.batch.active) < self.rows:
                self.reading.append(self.waiting.popleft())

    def _read(self) -> None:
        """Read a piece of the next prompt in turn; one whose beginning another one is reading waits for that."""
        begun = {tuple(u.ids[: u.shared]) for u in self.reading if u.shared and 0 < u.read < u.shared}
        for request in list(self.reading):
            if request.read or not request.shared or tuple(request.ids[: request.shared]) not in begun:
                break
        else:
            return
        try:
            logits = self._read_piece(request)
            if logits is not None:
                self.reading.remove(request)
                self._answer(request, logits)
            else:
                self.reading.rotate(-1)
        except Exception as error:
            log.exception("a prompt could not be read")
            self._end(request, Failed(error))

    def _read_piece(self, request: Request) -> torch.Tensor | None:
        """Read a piece; returns the logits ``(1, V)`` of the reply's first token if it was the last one."""
        if request.read == 0 and request.cache is None:
            if request.shared:
                request.cache = self.prefixes.get(request.ids[: request.shared])
                request.read = request.reused = 0 if request.cache is None else request.shared
                self.metrics.add("prefix_tokens_reused_total", request.reused)
            request.cache = request.cache or HippocampalCache()
        begin = request.read
        end = min(len(request.ids), begin + self.piece)
        if begin < request.shared:
            end = min(end, request.shared)
        piece = torch.tensor([request.ids[begin:end]], device=self.model.device)
        out = self.model(input_ids=piece, cache=request.cache, use_cache=True, logits_to_keep=1)
        request.read = end
        self.metrics.add("prompt_tokens_total", end - begin)
        if end == request.shared and request.reused == 0:
            assert request.cache is not None
            self.prefixes.put(request.ids[:end], request.cache)
        return out.logits[:, -1] if end == len(request.ids) else None

    def _answer(self, request: Request, logits: torch.Tensor) -> None:
        """The first token of the reply, and a row to go on in."""
        (token,) = choose(logits, [request.sampling])
        if token is None:
            raise ArithmeticError(NO_NUMBERS)
        request.started = time.monotonic()
        self.metrics.observe("time_to_first_token_seconds", request.started - request.submitted)
        self.metrics.add("generated_tokens_total")
        end = request.take(token)
        cache, request.cache = request.cache, None
        assert cache is not None
        if end is None:
            self.batch.join(request, cache, token)
        else:
            self._finish(request, end, cache)

    def _decode(self) -> None:
        if not self.batch.active:
            return
        begin = time.monotonic()
        try:
            logits = self.batch.step()
            tokens = choose(logits, [None if user is None else user.sampling for user in self.batch.users])
        except Exception as error:
            log.exception("a step failed")
            self._fail_all(error)
            return
        for request, token in [pair for pair in zip(self.batch.users, tokens, strict=True) if pair[0] is not None]:
            if token is None:
                self._end(request, Failed(ArithmeticError(NO_NUMBERS)))
                continue
            self.metrics.add("generated_tokens_total")
            end = request.take(token)
            if end is None:
                self.batch.tokens[self.batch.users.index(request)] = token
            else:
                self._finish(request, end, self.batch.leave(request, keep=request.keep))
        self.metrics.observe("step_seconds", time.monotonic() - begin)

    def _finish(self, request: Request, end: Done, cache: HippocampalCache | None) -> None:
        request.emit(Done(end.reason, cache if request.keep else None, end.pending))
        self.metrics.add("requests_total", reason=end.reason)

    def _end(self, request: Request, event: Done | Failed) -> None:
        """Take a request out, wherever it is."""
        with self._changed:
            for queue in (self.waiting, self.reading):
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
