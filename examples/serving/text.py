"""Tokens become text as they come, up to a stop sequence."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer makes of half a character."""


class TextStream:
    """The text of a reply that grows token by token.

    Args:
        tokenizer: of the model.
        stop: sequences that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [u for u in stop if u]
        self.ids: list[int] = []
        self.stopped = False
        self._begin = self._read = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain to be part of the reply by now and was not before."""
        self.ids.append(token)
        before, now = (self._decode(self.ids[self._begin : end]) for end in (self._read, len(self.ids)))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._begin, self._read = self._read, len(self.ids)
        return self._take(now[len(before) :])

    def finish(self) -> str:
        """The rest of the text, once there are no more tokens."""
        if self.stopped:
            return ""
        before, now = (self._decode(self.ids[self._begin : end]) for end in (self._read, len(self.ids)))
        rest = self._take(now[len(before) :])
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _take(self, new: str) -> str:
        """Text that is certain, out of new text and what was held back before."""
        text = self._held + new
        found = [at for at in (text.find(u) for u in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((n for u in self.stop for n in range(1, len(u)) if text.endswith(u[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
