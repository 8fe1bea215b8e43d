"""Every compressor keeps the contract, and ``check_compressor`` explains the ways to break it."""

from dataclasses import replace

import pytest
import torch

from ahn_layers import RWKV7, AveragePooling, Compressor, GatedDeltaNet, Recurrence, check_compressor, outer

from ..methods import COMPRESSORS


@pytest.mark.parametrize("shared_state", [False, True])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_contract(compressor, shared_state):
    check_compressor(compressor, shared_state=shared_state)


class Mean(Compressor):
    """The shortest one."""

    def fold(self, state, k, v):
        return 0.99 * state + outer(k, v)


class WritesInPlace(Mean):
    def fold(self, state, k, v):
        return state.add_(outer(k, v))


class Growing(Mean):
    def fold(self, state, k, v):
        return torch.cat((state, outer(k, v)), dim=1)


class Loud(Mean):
    def output(self, r, x):
        return r


class UnknownGate(Mean):
    def gates(self, x):
        return {"beta": x.mean(-1)[:, None].expand(-1, self.num_states, -1)}


class WrongGateShape(Mean):
    def gates(self, x):
        return {"beta": x.mean(-1)}

    def fold(self, state, k, v, beta):
        return super().fold(state, k, v)


class WrongScan(Mean):
    def scan(self, state, q, k, v, gates, mask=None):
        r, end = super().scan(state, q, k, v, gates, mask)
        return 1.001 * r, end


class IgnoresMask(Mean):
    def scan(self, state, q, k, v, gates, mask=None):
        return super().scan(state, q, k, v, gates)


class MixesRows(Mean):
    def fold(self, state, k, v):
        return super().fold(state, k, v).mean(0, keepdim=True).expand_as(state)


class UnusedParameter(Mean):
    def build(self):
        self.forgotten = torch.nn.Parameter(torch.ones(3))


class WithoutSizes(Mean):
    def __init__(self, hidden_size, num_heads, head_dim):
        super().__init__(hidden_size, num_heads, head_dim)


class StateInATuple(Mean):
    def init_state(self, batch_size, like):
        return (super().init_state(batch_size, like),)


class GateInATensor(Mean):
    def gates(self, x):
        return x.mean(-1)[:, None].expand(-1, self.num_states, -1)


BROKEN = {
    WithoutSizes: "got an unexpected keyword argument 'num_kv_heads'.*hand them on",
    StateInATuple: "init_state is of type tuple, expected a tensor, or several by name",
    GateInATensor: r"gates\(x\) is of type Tensor, expected tensors by name",
    WritesInPlace: "fold changed the state",
    Growing: "a memory has a fixed size",
    Loud: "a fresh memory changes the output",
    UnknownGate: r"gates\(x\) returns \['beta'\], fold takes \[\]",
    WrongGateShape: r"expected \(batch, num_states, tokens\)",
    WrongScan: "readings differ from fold and read",
    IgnoresMask: "with a mask",
    MixesRows: "rows must not mix",
    UnusedParameter: "no gradient reaches the parameter 'forgotten'",
}


@pytest.mark.parametrize("compressor", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_contract_is_explained(compressor, unchecked):
    with pytest.raises(AssertionError, match=BROKEN[compressor]):
        check_compressor(compressor)


def test_the_shortest_compressor_is_sound():
    check_compressor(Mean)


def test_a_rule_that_says_something_else_is_explained(unchecked):
    class WrongRule(GatedDeltaNet):
        def rule(self, x):
            return replace(super().rule(x), read_scale=1.0)

    with pytest.raises(AssertionError, match=r"rule\(\): the output of a step differs"):
        check_compressor(WrongRule)


def test_a_rule_does_not_hold_for_what_a_subclass_changes():
    class Slower(GatedDeltaNet):
        def fold(self, state, k, v, g, beta):
            return super().fold(state, k, v, 0.5 * g, beta)

    class Renamed(GatedDeltaNet):
        pass

    class Louder(GatedDeltaNet):
        def output(self, r, x):
            return 2 * super().output(r, x)

    check_compressor(Slower)  # its scan is no longer that of the recurrence either
    check_compressor(Louder)
    assert Louder.rule_holds and Louder(8, 2, 4).rule(torch.zeros(1, 1, 8)).matrix is None
    assert GatedDeltaNet.rule_holds and Renamed.rule_holds and not Slower.rule_holds and not Mean.rule_holds


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"hidden_size": 0}, "hidden_size=0: expected a positive whole number"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"value_dim": -1}, "value_dim=-1"),
        ({"hidden_size": 8.0}, "hidden_size=8.0: expected a positive whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(**{"hidden_size": 8, "num_heads": 4, "head_dim": 2, **sizes})


def test_fold_has_to_be_written():
    with pytest.raises(TypeError, match="fold"):
        Compressor(8, 2, 4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"momentum": "m"}, "momentum with delta=False: expected delta=True"),
        ({"more_keys": torch.ones(2, 1, 4, 4)}, "expected both or neither"),
        ({"more_keys": 1, "more_values": 1, "delta": True}, "expected a strength with one number per write"),
    ],
)
def test_recurrences_that_are_not_computed_are_refused(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Recurrence(**fields)


@pytest.mark.parametrize("options", [{"rate": 0}, {"num_slots": 0}, {"rate": 1.5}], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_pools_have_a_size(options):
    with pytest.raises(ValueError, match=r"=(0|1\.5): expected a positive whole number"):
        AveragePooling(8, 2, 4, **options)


def test_gates_of_a_transition_have_its_names(unchecked):
    class Misnamed(RWKV7):
        def gates(self, x):
            return {"decay": super().gates(x)["w"]}

    with pytest.raises(AssertionError, match=r"gates\(x\) returns \['decay'\], transition takes \['a', 'w'\]"):
        check_compressor(Misnamed)
