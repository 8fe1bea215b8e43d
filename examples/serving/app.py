"""The HTTP side: OpenAI's chat completions, health and metrics, over an engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from .answer import Answer, Service, refused
from .conversations import NAME
from .protocol import ApiError, ChatRequest
from .request import Done


def create_app(service: Service) -> FastAPI:
    """The app.

    Args:
        service: what it serves; the app starts and closes the engine, and saves the conversations at the end.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.close, service.grace)
        await run_in_threadpool(service.conversations.close)

    app = FastAPI(title="ahn_layers", lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, http: HttpRequest) -> Any:
        answer = Answer(service, asked)
        await answer.submit()
        if asked.stream:
            return StreamingResponse(_stream(answer), media_type="text/event-stream")
        return await _while_connected(http, _whole(answer))

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != service.name:
            raise ApiError(404, f"The model `{name}` does not exist, `{service.name}` does.", "model_not_found")
        return _model(service)

    @app.delete("/v1/conversations/{name}")
    async def forget(name: str) -> Any:
        with refused():
            known = NAME.fullmatch(name) is not None and await run_in_threadpool(service.conversations.forget, name)
        if not known:
            raise ApiError(404, f"There is no conversation `{name}`.", "not_found")
        return {"id": name, "object": "conversation.deleted", "deleted": True}

    @app.get("/health")
    async def health() -> Any:
        healthy = service.engine.is_healthy
        return JSONResponse({"status": "ok" if healthy else "closing"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(service.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: HttpRequest, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(ApiError(400, f"{where}: {first['msg']}", "invalid_value", where or None).body, 400)


async def _whole(answer: Answer) -> Any:
    """The reply in one piece."""
    text, end = "", None
    try:
        async for piece in answer.pieces():
            if isinstance(piece, Done):
                end = piece
            else:
                text += piece
    finally:
        await answer.close()
    assert end is not None and answer.request is not None
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end.reason}
    return answer.body("chat.completion", choice, usage=answer.request.usage)


async def _stream(answer: Answer) -> AsyncIterator[str]:
    """The reply as server-sent events. The client that goes away ends this generator."""
    asked, kind = answer.asked, "chat.completion.chunk"
    wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
    nothing = {"usage": None} if wants_usage else {}
    try:
        yield _event(
            answer.body(kind, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, **nothing)
        )
        async for piece in answer.pieces():
            if isinstance(piece, Done):
                await answer.close()  # before the client knows that it may go on with the conversation
                yield _event(answer.body(kind, {"delta": {}, "finish_reason": piece.reason}, **nothing))
            else:
                yield _event(answer.body(kind, {"delta": {"content": piece}, "finish_reason": None}, **nothing))
        if wants_usage and answer.request is not None:
            yield _event(answer.body(kind, {}, usage=answer.request.usage))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        await answer.close()


async def _while_connected(http: HttpRequest, reply: Any) -> Any:
    """A reply, cancelled if the client goes away."""
    task = asyncio.ensure_future(reply)
    while not task.done():
        await asyncio.wait({task}, timeout=0.5)
        if not task.done() and await http.is_disconnected():
            task.cancel()
            await asyncio.wait({task})
            return JSONResponse(None, 499)
    return task.result()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "ahn_layers"}
