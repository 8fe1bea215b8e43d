"""Every compressor and eviction that the tests run over: a new one in these tables is tested by all contracts."""

from ahn_layers import (
    GLA,
    KDA,
    RWKV7,
    AveragePooling,
    DeltaNet,
    Eviction,
    FoldAll,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    Mamba2,
    MaxPooling,
    RetNet,
    SalientSlots,
    Titans,
    empty_slots,
    keep_best,
)

COMPRESSORS = [
    *(LinearAttention, DeltaNet, GatedDeltaNet, Mamba2, RetNet, GLA, KDA, GatedDeltaProduct, RWKV7, Titans),
    *(AveragePooling, MaxPooling),
]
"""All of them: for contracts of fold, read and scan, and for what takes little time."""
OPTIONS = {AveragePooling: {"num_slots": 2, "rate": 3}, MaxPooling: {"num_slots": 2, "rate": 3}}
"""What some are made with where texts are short."""
KINDS = [Mamba2, GatedDeltaNet, KDA, GatedDeltaProduct, Titans, AveragePooling]
"""One of each kind, for what the rest of the library does with a compressor.

Its own output and rate; scalar gates; a gate per channel; several writes a token; several tensors; no recurrence.
"""
NAMES = [compressor.__name__ for compressor in KINDS]
RELEASED = [DeltaNet, GatedDeltaNet, Mamba2]
"""Those of the paper, of which there are released weights and golden files."""


class BiggestKeys(Eviction):
    """Every key/value head keeps the tokens with its largest keys."""

    def __init__(self, num_slots):
        super().__init__()
        self.num_slots = num_slots

    def init_kept(self, like):
        return empty_slots(like, self.num_slots)

    def push(self, kept, leaving):
        return keep_best(kept, leaving, lambda tokens: tokens.k.norm(dim=-1))


EVICTIONS = {
    "FoldAll": (FoldAll, {}),
    "no slots": (BiggestKeys, {"num_slots": 0}),
    "one slot": (BiggestKeys, {"num_slots": 1}),
    "a few slots": (BiggestKeys, {"num_slots": 5}),
    "salient, learned": (SalientSlots, {"num_slots": 5}),
    "salient, by values, ageing": (SalientSlots, {"num_slots": 4, "score": "value_norm", "rate": 0.1}),
    "salient, unlike keys": (SalientSlots, {"num_slots": 4, "score": "key_difference"}),
    "slots for all": (BiggestKeys, {"num_slots": 50}),
}
"""Classes and what they are made with."""
