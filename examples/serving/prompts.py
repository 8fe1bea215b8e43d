"""Messages become tokens, by the chat template of the model."""

from collections.abc import Sequence
from typing import Any

_MARK = "@mark@"
Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""


class Prompts:
    """Writes prompts of conversations that begin, and of conversations that go on.

    Args:
        tokenizer: of the model, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def beginning(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The tokens of a conversation up to the reply, and how many of the first ones do not depend on the user.

        Those come from the template and from the system messages at the beginning.

        Raises:
            ValueError: if the template does not take such messages.
        """
        ids = self._tokens(self._render([*messages]))
        system = [
            u for i, u in enumerate(messages) if all(v["role"] in ("system", "developer") for v in messages[: i + 1])
        ]
        if len(system) == len(messages):
            return ids, 0
        common = self._render([*system, {"role": messages[len(system)]["role"], "content": _MARK}]).partition(_MARK)[0]
        shared = 0
        for mine, other in zip(ids[:-1], self._tokens(common), strict=False):
            if mine != other:
                break
            shared += 1
        return ids, shared

    def continuation(self, messages: Sequence[Message], pending: Sequence[int]) -> list[int]:
        """The tokens that follow a reply: what closes it, new messages, and what opens the next reply.

        Args:
            messages: the new messages alone.
            pending: tokens of the reply that the cache does not hold.

        Raises:
            ValueError: if the template does not take such messages.
        """
        before = [{"role": "user", "content": ""}, {"role": "assistant", "content": _MARK}]
        return [*pending, *self._tokens(self._render([*before, *messages]).rpartition(_MARK)[2])]

    def _render(self, messages: list[Message]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise errors of their own
            raise ValueError(f"the chat template of this model does not take these messages: {error}") from None

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
