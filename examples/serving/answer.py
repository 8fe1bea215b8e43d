"""A request on its way from the HTTP side to the engine, and its reply back."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool

from .conversations import Conversation, Conversations, InUseError
from .engine import Engine
from .prompts import Prompts
from .protocol import ApiError, ChatRequest
from .request import BusyError, Done, Event, Failed, Piece, Request
from .sampling import Sampling
from .text import TextStream


@dataclass(frozen=True, eq=False)
class Service:
    """What the app serves.

    Attributes:
        name: of the model.
        engine: runs it.
        prompts: writes its prompts.
        conversations: keeps them.
        ends: tokens that end a reply.
        max_tokens: of a reply, at most and by default.
        max_prompt: tokens of a prompt at most.
        grace: seconds that replies have to finish when the server closes.
    """

    name: str
    engine: Engine
    prompts: Prompts
    conversations: Conversations
    ends: frozenset[int]
    max_tokens: int = 1024
    max_prompt: int = 1_000_000
    grace: float = 20.0


class Answer:
    """One request on its way: what the engine emits arrives here.

    Args:
        service: what answers.
        asked: the body of the request.
    """

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.request: Request | None = None
        self._after: Conversation | None = None
        self._holds = False

    def _emit(self, event: Event) -> None:
        """In the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def submit(self) -> None:
        """Hand the request to the engine.

        Raises:
            ApiError: if it cannot be served.
        """
        asked, service = self.asked, self.service
        if asked.model != service.name:
            raise ApiError(404, f"The model `{asked.model}` does not exist, `{service.name}` does.", "model_not_found")
        before = None
        if asked.conversation is not None:
            with refused():
                before = await run_in_threadpool(service.conversations.begin, asked.conversation)
            self._holds = True
        try:
            self.request = await run_in_threadpool(self._make, before)
            with refused():
                service.engine.submit(self.request)
        except BaseException:
            await self.close()
            raise

    def _make(self, before: Conversation | None) -> Request:
        asked, service, shared = self.asked, self.service, 0
        messages = [message.plain() for message in asked.messages]
        try:
            if before is None:
                ids, shared = service.prompts.beginning(messages)
            else:
                ids = service.prompts.continuation(messages, before.pending)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        if len(ids) > service.max_prompt:
            message = f"The messages have {len(ids)} tokens, this server takes at most {service.max_prompt}."
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return Request(
            ids,
            TextStream(service.prompts.tokenizer, asked.stop or ()),
            Sampling(_or(asked.temperature, 1.0), _or(asked.top_p, 1.0), asked.seed),
            self._emit,
            min(asked.most or service.max_tokens, service.max_tokens),
            service.ends,
            None if before is None else before.cache,
            shared,
            asked.conversation is not None,
        )

    async def pieces(self) -> AsyncIterator[str | Done]:
        """The text as it comes, then the end.

        Raises:
            ApiError: if the engine failed.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                status = 409 if isinstance(event.error, ValueError) and self.asked.conversation else 500
                raise ApiError(status, f"The reply failed: {event.error}", "engine_error")
            if isinstance(event, Done):
                if event.reason == "cancelled":
                    raise ApiError(503, "The server is closing.", "closing", headers={"Retry-After": "5"})
                if event.cache is not None:
                    self._after = Conversation(event.cache, event.pending)
                yield event
                return
            assert isinstance(event, Piece)
            yield event.text

    async def close(self) -> None:
        """The request is over, or nobody waits for it any more: a conversation that has no reply is as before."""
        if self.request is not None:
            self.service.engine.cancel(self.request)
        if self._holds:
            self._holds = False
            end = self.service.conversations.end
            await asyncio.shield(run_in_threadpool(end, self.asked.conversation, self._after))

    def body(self, kind: str, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The JSON of a reply, or of a piece of it."""
        made = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}
        return made | {"choices": [{"index": 0, "logprobs": None, **choice}] if choice else []} | more


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@contextmanager
def refused() -> Iterator[None]:
    """Errors of engine and conversations, in the words of the API."""
    try:
        yield
    except BusyError as error:
        closing = {"Retry-After": f"{error.retry_after:.0f}"}
        raise ApiError(503 if error.closing else 429, str(error), "busy", headers=closing) from None
    except InUseError as error:
        raise ApiError(409, f"The conversation `{error}` is being answered: wait for its reply.", "in_use") from None
    except ValueError as error:
        raise ApiError(409, f"The conversation cannot be resumed: {error}", "damaged") from None
