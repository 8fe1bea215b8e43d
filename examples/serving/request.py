"""What the engine is asked for, and what it answers with."""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ahn_layers import HippocampalCache

from .sampling import Sampling
from .text import TextStream

Reason = Literal["stop", "length", "cancelled"]


class BusyError(Exception):
    """There is no room for a request now.

    Args:
        retry_after: seconds after which to try again.
        closing: whether that is because the server is closing.
    """

    def __init__(self, retry_after: float, *, closing: bool = False) -> None:
        reason = "closing" if closing else "busy"
        super().__init__(f"The server is {reason}: try again in {retry_after:.0f} s.")
        self.retry_after, self.closing = retry_after, closing


@dataclass(frozen=True)
class Piece:
    """A piece of the reply."""

    text: str


@dataclass(frozen=True, eq=False)
class Done:
    """The end of a request.

    Attributes:
        reason: the reply ended by itself or at a stop sequence, at its length, or the request was cancelled.
        cache: everything that was read, if the request asked to keep it.
        pending: tokens of the reply that the cache does not hold yet.
    """

    reason: Reason
    cache: HippocampalCache | None = None
    pending: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The request failed inside the engine."""

    error: Exception


Event = Piece | Done | Failed


@dataclass(eq=False)
class Request:
    """One reply.

    Args:
        ids: tokens to read before the reply, at least one.
        stream: makes text of the reply.
        sampling: chooses its tokens.
        emit: is called with each event, in the engine's thread.
        max_tokens: tokens of the reply at most.
        ends: tokens that end it.
        cache: what was read before, None for nothing; the engine goes on in it.
        shared: how many of the first ids other requests may begin with too, so that they are read once; 0 for none.
        keep: whether the end of the request brings the cache.
        cancelled: set it, and the request ends.
    """

    ids: list[int]
    stream: TextStream
    sampling: Sampling
    emit: Callable[[Event], None]
    max_tokens: int
    ends: Collection[int] = ()
    cache: HippocampalCache | None = None
    shared: int = 0
    keep: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    read: int = 0
    reused: int = 0
    submitted: float = 0.0
    started: float = 0.0

    def take(self, token: int) -> Done | None:
        """Add a token to the reply; returns its end, if this is it."""
        if token in self.ends:
            self._say(self.stream.finish())
            return Done("stop")
        self._say(self.stream.push(token))
        if self.stream.stopped:
            return Done("stop", pending=(token,))
        if len(self.stream.ids) >= self.max_tokens:
            self._say(self.stream.finish())
            return Done("length", pending=(token,))
        return None

    def _say(self, text: str) -> None:
        if text:
            self.emit(Piece(text))

    def hand_over(self) -> HippocampalCache:
        """What was read, which is not the request's own any more."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is read, or will be by the next step."""
        return self.read == len(self.ids)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as the API counts them."""
        prompt, reply = len(self.ids), len(self.stream.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }
