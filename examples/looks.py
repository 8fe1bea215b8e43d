"""How an arm is drawn: the same colour in every picture."""

from typing import Any

COLORS = {
    "full": "tab:gray",
    "window": "tab:orange",
    "memory": "tab:blue",
    "slots": "tab:green",
    "compressor": "tab:purple",
}
"""By arm; the figures of the documentation have them too."""
NAMES = {"full attention": "full", "window only": "window", "sinks + window": "window"}
"""Other names of an arm."""


def color(arm: str) -> str | None:
    """The colour of an arm, None for one that has none of its own: the next one of the picture.

    Args:
        arm: its name; what stands behind a comma says how it was run.

    Examples:
        >>> color("full attention"), color("memory, compiled, 4,096")
        ('tab:gray', 'tab:blue')
    """
    name = arm.partition(",")[0]
    return COLORS.get(NAMES.get(name, name))


def look(arm: str) -> dict[str, Any]:
    """Arguments of ``plot`` and ``bar`` for an arm."""
    return {"label": arm, "color": color(arm)}
