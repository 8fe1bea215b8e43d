"""The slot arithmetic of the window, against a list that does what the words say."""

import pytest
import torch

from ahn_layers import Window


@pytest.mark.parametrize("sinks, size", [(0, 1), (0, 4), (1, 1), (2, 3), (4, 1)])
def test_slots_hold_sinks_and_the_latest_tokens(sinks, size):
    window = Window(size, num_sinks=sinks)
    slots = [-1] * window.capacity
    for rank in range(4 * window.capacity):
        slot = int(window.slot(torch.tensor(rank)))
        leaver = slots[slot]
        assert bool(window.leaves(torch.tensor(rank))) == (leaver >= 0)
        if leaver >= 0:
            assert leaver == rank - size and leaver >= sinks
        slots[slot] = rank
        expected = [r for r in range(rank + 1) if r < sinks or r > rank - size]
        assert sorted(r for r in slots if r >= 0) == expected
        resident = window.resident(torch.arange(window.capacity), torch.tensor([[rank + 1], [0]]))
        assert resident[0].tolist() == slots
        assert resident[1].tolist() == [-1] * window.capacity


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"window_size": 0}, "window_size=0: expected a whole number of at least 1"),
        ({"window_size": -3}, "window_size=-3"),
        ({"window_size": 2.5}, "window_size=2.5"),
        ({"window_size": True}, "window_size=True"),
        ({"window_size": 4, "num_sinks": -1}, "num_sinks=-1: expected a whole number of at least 0"),
        ({"window_size": 4, "sink_positions": "rolling"}, "sink_positions='rolling': expected one of"),
    ],
)
def test_impossible_windows_are_refused(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Window(**arguments)


@pytest.mark.parametrize("name, limit", [("absolute", None), ("streaming", 9), ("trained", 99)])
def test_farthest_sink(name, limit):
    assert Window(8, num_sinks=2, sink_positions=name).farthest_sink(trained_length=100) == limit
    assert Window(8, num_sinks=0, sink_positions=name).farthest_sink(trained_length=100) is None


def test_the_trained_limit_never_cuts_into_the_capacity():
    assert Window(8, num_sinks=2).farthest_sink(trained_length=5) == 9
