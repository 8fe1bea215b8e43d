"""The steps of a model that ``generate`` decodes with, recorded, with their layers compiled once for all of them."""

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from ..cache_name import renamed
from ..decoder import CACHE
from .region import compiled_region, decoding_backend
from .step_graph import Step, can_record


class Recorder:
    """Makes the steps of a model, and finds the one that is decoding on a cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._region: Callable[..., Any] | None = None
        self._steps: WeakKeyDictionary[Any, ReferenceType[Step]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__(**state)  # type: ignore[misc]

    def step(self, usual: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The call of one token: recorded on a cache of fixed addresses, otherwise the model itself."""
        if self._region is None:
            self._region = compiled_region(dynamic=False, backend=decoding_backend)
        step = Step(self.model, self._region)

        def run(**inputs: Any) -> Any:
            inputs = renamed(inputs)
            cache = inputs.get(CACHE)
            if not can_record(cache):
                call = usual() if cache is None or cache.is_compileable else self.model
                return call(**inputs)
            self._steps[cache] = ref(step)  # which lives as long as this function: until generate returns
            return step(**inputs)

        return run

    def known_inputs(self, cache: Any) -> dict[str, Any] | None:
        """What the step that is decoding on this cache is called with, see ``Step``; None without one."""
        step = None if cache is None else self._steps.get(cache)
        known = None if step is None else step()
        return None if known is None else known.known_inputs

    def forget(self, cache: Any) -> None:
        """Know nothing of a cache any longer: a step may outlive its ``generate`` in a traceback."""
        self._steps.pop(cache, None)
