"""What the tests of errors share: an error says what was given, what was expected and what to do."""

from contextlib import contextmanager

import pytest

from ahn_layers import Window

from .docs.test_docs import rows, shows
from .models import CAPACITY

LONG = 3 * CAPACITY


@contextmanager
def refused(kind, *parts):
    """The error, all parts in its message, in this order, and a row of the page that shows it."""
    with pytest.raises(kind) as error:
        yield
    assert type(error.value) is kind
    message = str(error.value)
    start = 0
    for part in parts:
        assert part in message[start:], f"{part!r} is not in its place in: {message}"
        start = message.index(part, start) + len(part)
    assert any(shows(row, message) for row in rows()), f"not in troubleshooting.md: {message}"


def size(**options):
    return lambda: Window(**{"window_size": 4} | options)
