"""What clients send, and errors as OpenAI's API words them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .conversations import NAME


class ApiError(Exception):
    """An error that the client is told of.

    Args:
        status: of HTTP.
        message: what is wrong, and the remedy.
        code: a word for programs.
        param: the argument that it is about.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kinds = {404: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text alone."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream contains beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request for a reply. An argument that would be ignored is an error."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    conversation: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @field_validator("conversation")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError("expected at most 64 letters, digits, - and _, a letter or digit first")
        return value

    @field_validator("stop")
    @classmethod
    def _are_few(cls, value: str | list[str] | None) -> list[str]:
        stop = [value] if isinstance(value, str) else value or []
        if len(stop) > 4:
            raise ValueError("expected at most 4 stop sequences")
        return stop

    @field_validator("messages")
    @classmethod
    def _are_text(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        for i, message in enumerate(value):
            try:
                message.plain()["content"].encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"message {i}: expected text, found half a character ({error.reason})") from None
        return value

    @model_validator(mode="after")
    def _is_a_stream(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def most(self) -> int | None:
        """Tokens of the reply at most, None if the client does not say."""
        asked = [u for u in (self.max_tokens, self.max_completion_tokens) if u is not None]
        return min(asked) if asked else None
