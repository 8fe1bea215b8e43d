"""What PEFT sees of a memory, and what it puts in a memory's place.

PEFT chooses its targets by the names and types of the modules that it meets in ``model.named_modules()``. The memory
has names that every decoder has (``o_proj``) on modules of its own kind, and linear layers without which no token is
folded. PEFT has no attribute by which a module can decline, so the memory hides its modules from that one walk.
"""

import sys
from types import FrameType
from typing import Any

from torch import nn

_CHOOSING = "peft.tuners."
"""The part of PEFT that chooses targets. The rest (``modules_to_save``, saving, loading) sees every module."""
_BETWEEN = (nn.Module.__module__, "jaxtyping.", "beartype.", __name__)
"""Where a walk over modules passes through: parents, and what runtime type checkers put around functions."""


def is_choosing() -> bool:
    """Whether PEFT started the walk over modules that is under way, to find its targets.

    To be asked in ``named_modules``. A walk over parameters is another: PEFT freezes the memory as it freezes
    everything else.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name, function = f"{frame.f_globals.get('__name__')}", frame.f_code.co_name
        if function == "_named_members":  # of parameters() and buffers()
            return False
        if function != "named_modules" and not name.startswith(_BETWEEN):
            return f"{name}.".startswith(_CHOOSING)
        frame = frame.f_back
    return False


def is_of_peft(module: nn.Module) -> bool:
    """Whether PEFT made this module: it has to find its own modules again, to switch and to remove them."""
    return type(module).__module__.partition(".")[0] == "peft"


def in_use(module: nn.Module) -> nn.Module:
    """The module itself, or the copy that PEFT's ``modules_to_save`` runs in its place now."""
    if not (is_of_peft(module) and hasattr(module, "modules_to_save")):
        return module
    wrapper: Any = module
    active = wrapper.active_adapter
    names = [active] if isinstance(active, str) else list(active or [])
    if wrapper.disable_adapters or not names or names[0] not in wrapper.modules_to_save:
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def state_in_use(module: nn.Module) -> dict[str, Any]:
    """The state dict of a module as if there were no copies below it: with the values that run, under plain names."""
    found: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, child in module.named_modules():
        copied = in_use(child)
        if copied is not child:
            found = {key: u for key, u in found.items() if not key.startswith(f"{name}.")}
            found |= copied.state_dict(prefix=f"{name}.", keep_vars=True)
    return found


def running(module: nn.Module) -> nn.Module:
    """``in_use``, for a forward pass.

    Raises:
        ValueError: if PEFT was asked to choose a copy for each row.
    """
    for hook in module._forward_pre_hooks.values():
        if f"{getattr(getattr(hook, 'func', hook), '__module__', '')}".startswith("peft."):
            raise ValueError(
                "adapter_names was given to a model whose memory is among modules_to_save: the rows of a batch share "
                "one memory. Call the model with the rows of each adapter on their own, after set_adapter(name)."
            )
    return in_use(module)


def out_of_use(module: nn.Module) -> set[nn.Parameter]:
    """Parameters below a module that PEFT keeps beside the ones in use: originals, copies of other adapters."""
    found: set[nn.Parameter] = set()
    for child in module.modules():
        found |= set(child.parameters()) - set(in_use(child).parameters())
    return found
