"""``check_eviction`` on policies that break the contract, each in one way."""

from dataclasses import replace

import pytest
import torch

from ahn_layers import Eviction, SalientSlots, check_eviction, keep_best
from ahn_layers.ops.decode.kept import Contest
from ahn_layers.tokens import Later

from ..methods import BiggestKeys


class SeenAndFolded(BiggestKeys):
    """Passes on what it also keeps."""

    def push(self, kept, leaving):
        seen, _, after = super().push(kept, leaving)
        return seen, leaving, after


class Forgets(BiggestKeys):
    def push(self, kept, leaving):
        return None, super().push(kept, leaving)[1], super().push(kept, leaving)[2]


class InPlace(BiggestKeys):
    def push(self, kept, leaving):
        seen, gone, after = super().push(kept, leaving)
        kept["filled"].copy_(after["filled"])
        return seen, gone, after


class Growing(Eviction):
    def init_kept(self, like):
        return {"count": like.k.new_zeros(len(like.k), 0)}

    def push(self, kept, leaving):
        return None, leaving, {"count": torch.cat((kept["count"], leaving.tokens.k[:, 0, :, 0]), dim=1)}


class HoldsAView(BiggestKeys):
    def init_kept(self, like):
        return {"last": like.k.new_zeros(like.k.shape[:2])}

    def push(self, kept, leaving):
        return None, leaving, {"last": leaving.tokens.k.norm(dim=-1)[:, :, -1]}


class MixesHeads(BiggestKeys):
    def push(self, kept, leaving):
        mean = lambda t: t.k.norm(dim=-1).mean(dim=1, keepdim=True).expand(t.k.shape[:3])
        return keep_best(kept, leaving, mean)


class MixesRows(BiggestKeys):
    def push(self, kept, leaving):
        return keep_best(kept, leaving, lambda t: t.k.norm(dim=-1).mean(dim=0, keepdim=True).expand(t.k.shape[:3]))


class CountsInCalls(BiggestKeys):
    """A priority that depends on where in its call a token stands."""

    def push(self, kept, leaving):
        return keep_best(kept, leaving, lambda t: t.k.norm(dim=-1) + torch.arange(len(t)))


class MixesHeadsByValues(BiggestKeys):
    def push(self, kept, leaving):
        return keep_best(kept, leaving, lambda t: t.v.norm(dim=-1).mean(dim=1, keepdim=True).expand(t.k.shape[:3]))


class ShowsOtherValues(BiggestKeys):
    def push(self, kept, leaving):
        seen, gone, after = super().push(kept, leaving)
        return replace(seen, v=seen.v * 1.001), gone, after


class FoldsOtherKeys(BiggestKeys):
    def push(self, kept, leaving):
        seen, gone, after = super().push(kept, leaving)
        tokens = replace(gone.tokens, k=-gone.tokens.k)
        return seen, replace(gone, made=Later(lambda: tokens)), after


class ContestsOtherwise(SalientSlots):
    def __init__(self, num_slots):
        super().__init__(num_slots, score="key_norm")

    def contest(self, leaving):
        return replace(super().contest(leaving), rate=0.5)


class ContestsWithoutPriorities(BiggestKeys):
    def contest(self, leaving):
        return Contest(given=leaving().k.norm(dim=-1).float())


class FoldsNone(BiggestKeys):
    def push(self, kept, leaving):
        return super().push(kept, leaving)[0], None, kept


BROKEN = {
    FoldsNone: "push returned Between, NoneType, dict: expected what queries see",
    MixesHeadsByValues: "heads must not mix",
    ShowsOtherValues: "v of tokens that are seen differ",
    FoldsOtherKeys: "k of tokens that are folded differ",
    ContestsOtherwise: "decides otherwise than push",
    ContestsWithoutPriorities: "no 'eviction.priority' beside the kept tokens",
    SeenAndFolded: "each exactly once",
    Forgets: "each exactly once",
    InPlace: "push changed what it was given",
    Growing: "what is carried has a fixed size",
    HoldsAView: "push returned 'last' as a view of a tensor of",
    MixesHeads: "heads must not mix",
    MixesRows: "rows must not mix",
    CountsInCalls: "differ by .* from one pass: a priority must depend on its token alone",
}


@pytest.mark.parametrize("eviction", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_contract_is_explained(eviction, unchecked):
    with pytest.raises(AssertionError, match=BROKEN[eviction]):
        check_eviction(eviction, **({} if eviction is Growing else {"num_slots": 3}))
