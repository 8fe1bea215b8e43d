"""The prompts that are being read: whose turn it is, and a piece of it."""

from collections import deque
from typing import Any

import torch

from ahn_layers import HippocampalCache

from .metrics import Metrics
from .prefixes import Prefixes
from .request import Request


class Reading:
    """Requests whose prompts are being read, a piece of one after a piece of another.

    Args:
        model: a retrofitted model.
        piece: tokens that are read at a time.
        prefixes: the shared beginnings that are kept.
        metrics: what is counted.
    """

    def __init__(self, model: Any, piece: int, prefixes: Prefixes, metrics: Metrics) -> None:
        self.model, self.piece, self.prefixes, self.metrics = model, piece, prefixes, metrics
        self.requests: deque[Request] = deque()

    def next(self) -> Request | None:
        """Whose turn it is. A request whose beginning another one is reading waits for that."""
        begun = {tuple(u.ids[: u.shared]) for u in self.requests if u.shared and 0 < u.read < u.shared}
        for request in self.requests:
            if request.read or not request.shared or tuple(request.ids[: request.shared]) not in begun:
                return request
        return None

    def reuse(self, request: Request) -> None:
        """Go on from a shared beginning that was read before, if there is one."""
        if request.shared and request.read == 0:
            request.cache = self.prefixes.get(request.ids[: request.shared])
            if request.cache is not None:
                request.read = request.reused = request.shared
                self.metrics.add("prefix_tokens_reused_total", request.reused)

    def read(self, request: Request) -> torch.Tensor | None:
        """Read a piece; returns the logits ``(1, V)`` of the reply's first token if it was the last one."""
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
            self.prefixes.put(request.ids[:end], request.cache)
        return out.logits[:, -1] if end == len(request.ids) else None

    def goes_on_by_steps(self, request: Request, most: int) -> bool:
        """Whether at most so many tokens are left, of a prompt that goes on from something."""
        left = len(request.ids) - request.read
        return request.cache is not None and request.read >= request.shared and left <= most

    def by_a_step(self, request: Request) -> int:
        """The next token of a prompt, which a step will read."""
        token = request.ids[request.read]
        request.read += 1
        self.metrics.add("prompt_tokens_total")
        return token
