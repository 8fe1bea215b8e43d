"""Beginnings that many requests share, such as a system prompt: read once, then copied."""

from collections import OrderedDict

from ahn_layers import HippocampalCache


class Prefixes:
    """The latest beginnings, up to a number of them.

    Args:
        most: how many are kept; 0 for none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._caches: OrderedDict[tuple[int, ...], HippocampalCache] = OrderedDict()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._caches)

    def get(self, ids: list[int]) -> HippocampalCache | None:
        """A copy of what was read of this beginning, None if it was not read."""
        cache = self._caches.get(tuple(ids))
        if cache is None:
            return None
        self._caches.move_to_end(tuple(ids))
        return cache.clone()

    def put(self, ids: list[int], cache: HippocampalCache) -> None:
        """Keep a copy of what was read of this beginning; the one that was not used for longest goes."""
        if self.most:
            self._caches[tuple(ids)] = cache.clone()
            while len(self._caches) > self.most:
                self._caches.popitem(last=False)
