"""What is tried on a model of every type: the same on the base model, where the retrofitted one fails.

A check raises an ``AssertionError`` (or anything else) if it fails. One that the base model fails too says nothing
about the memory.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ahn_layers import GatedDeltaNet, full_attention, restore, retrofit, window_only
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.record import find_retrofitted

from ..models import train_memory
from .shrink import FIRST_SPECIAL, VOCABULARY

WINDOW, SINKS = 12, 3
CAPACITY = WINDOW + SINKS
LONG, COUNT = 40, 8

LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@dataclass
class Case:
    """A model, and what it reads.

    Attributes:
        model: the base model.
        prompt: token ids of the prompt, ``(1, p)``, with the places of images and the like.
        media: further arguments of the first call.
        token_types: arguments that tell places of media from text: by name, which value each token has.
        vocabulary: how many tokens the model knows.
    """

    model: Any
    prompt: Tensor
    media: dict[str, Any] = field(default_factory=dict)
    token_types: dict[str, dict[int, int]] = field(default_factory=dict)
    vocabulary: int = VOCABULARY

    @property
    def forbidden(self) -> list[int]:
        """Tokens that are not generated: they begin or end something, or stand for an image."""
        return [0, 1, 2, *range(FIRST_SPECIAL, self.vocabulary)]

    def given(self, text: Tensor) -> dict[str, Any]:
        """The media of every row, and what tells their places."""
        media = {name: torch.cat([u] * len(text)) for name, u in self.media.items()}
        for name, values in self.token_types.items():
            media[name] = sum((value * (text == token).long() for token, value in values.items()))
        return media

    def text(self, length: int, seed: int = 0) -> Tensor:
        """The prompt, and random tokens behind it."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(
            (self.prompt, torch.randint(3, min(FIRST_SPECIAL, self.vocabulary), (1, length), generator=generator)),
            dim=1,
        )


@dataclass
class Verdict:
    """What became of a type.

    Attributes:
        word: ``passes``, ``refused``, ``fails`` or ``not built``.
        cause: why it does not pass.
        layers: how many attention layers got a memory, of how many layers.
        base: checks that the base model fails too.
    """

    word: str
    cause: str = ""
    layers: str = ""
    base: list[str] = field(default_factory=list)


def judge(case: Case) -> Verdict:
    """Retrofit the model of a case and try everything."""
    plain, model = copy.deepcopy(case.model), case.model
    text, keys = case.text(LONG), list(model.state_dict())
    before = one_pass(plain, case, text)
    try:
        retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    except (ValueError, TypeError) as error:
        assert list(model.state_dict()) == keys, "a refused retrofit has changed the model"
        assert torch.equal(one_pass(model, case, text), before), "a refused retrofit has changed the model"
        return Verdict("refused", str(error))
    train_memory(model)
    verdict = Verdict("passes", layers=_layers(model))
    for name, check in CHECKS.items():
        try:
            check(model, plain, case)
        except Exception as error:
            if name in BASE_MAY_FAIL and (isinstance(error, BaseFailsError) or _fails(check, plain, case)):
                verdict.base.append(name)
                continue
            return Verdict("fails", f"{name}: {type(error).__name__}: {error}", verdict.layers, verdict.base)
    return verdict


def _fails(check: Callable[..., None], plain: Any, case: Case) -> bool:
    try:
        check(plain, plain, case)
    except Exception:
        return True
    return False


def _layers(model: Any) -> str:
    record = find_retrofitted(model)[1]
    return f"{len(record.layers)} of {len(record.layers) + len(record.skipped)}"


@torch.no_grad()
def one_pass(model: Any, case: Case, text: Tensor, media: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """Logits of a text without a cache."""
    given = case.given(text) | (media or {})
    return model(input_ids=text, **given, use_cache=False, **options).logits.clone()


@torch.no_grad()
def in_pieces(model: Any, case: Case, text: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a text that is read piece by piece, the prompt with the first."""
    outs, cache = [], None
    cuts = [cuts[0] + case.prompt.shape[1], *cuts[1:]]
    for piece in text.split(cuts, dim=1):
        given = {CACHE: cache} if cache is not None else {}
        out = model(input_ids=piece, use_cache=True, **given, **({} if outs else case.given(piece)))
        cache = out[CACHE]
        outs.append(out.logits)
    return torch.cat(outs, dim=1)


def generate(model: Any, text: Tensor, case: Case, **options: Any) -> Any:
    """Greedy ``generate``, unless options say otherwise."""
    options = {"max_new_tokens": COUNT, "do_sample": False, "suppress_tokens": case.forbidden} | options
    options = {"attention_mask": torch.ones_like(text), "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(text, **case.given(text), **options)


def tolerance(logits: Tensor) -> float:
    """How much logits may differ that are computed in two ways; many models compute in float32 inside."""
    return 3e-4 * max(1.0, float(logits.abs().max()))


def close(actual: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    """Raise if logits differ by more than rounding."""
    difference = float((actual - expected).abs().max())
    assert difference <= max(tolerance(expected), rounding), f"logits differ by {difference:.1e}"


class BaseFailsError(AssertionError):
    """The base model does not do what a check expects of it."""


def follows(model: Any, plain: Any, case: Case, found: Any, row: int, begins: int, start: int) -> None:
    """Raise unless a generated row is what one pass over it says, at every step.

    Args:
        model: the model.
        plain: the base model, which may not be causal on this text itself.
        case: its media are those of the row.
        found: what ``generate`` returned, with logits.
        row: number of the row.
        begins: column of its first token.
        start: column of the first generated token.
    """
    written = found.sequences[row : row + 1, begins:]
    expected = one_pass(model, case, written)[0, start - begins - 1 : -1]
    try:
        close(torch.stack([step[row] for step in found.logits]).to(expected.dtype), expected)
    except AssertionError:
        whole = one_pass(plain, case, written)[0]
        parts = [one_pass(plain, case, written[:, :end])[0, -1] for end in range(start - begins, written.shape[1])]
        if float((torch.stack(parts) - whole[start - begins - 1 : -1]).abs().max()) > tolerance(whole):
            raise BaseFailsError("the base model is not causal on this text") from None
        raise
    allowed = expected.clone()
    allowed[:, case.forbidden] = float("-inf")
    worse = float((allowed.amax(dim=-1) - allowed.gather(1, written[0, start - begins :, None])[:, 0]).max())
    assert worse <= tolerance(expected), f"a token is worse than the best by {worse:.1e}"


def check_inside(model: Any, plain: Any, case: Case) -> None:
    """As long as everything fits the window, every bit is the base model's."""
    short = case.text(LONG)[:, : max(CAPACITY, case.prompt.shape[1] + 1)]
    if short.shape[1] > CAPACITY:
        return  # an image that does not fit
    assert torch.equal(one_pass(model, case, short), one_pass(plain, case, short)), "other bits inside the window"


def check_pieces(model: Any, plain: Any, case: Case) -> None:
    """Pieces, and token by token: as near as the base model's are, where its own recurrences round."""
    text = case.text(LONG)
    expected, base = one_pass(model, case, text), one_pass(plain, case, text)
    for cuts in ([13, 1, 17, 9], [20, *[1] * 20]):
        rounding = min(float((in_pieces(plain, case, text, cuts) - base).abs().max()), tolerance(base))
        close(in_pieces(model, case, text, cuts), expected, 10 * rounding)


def check_memory(model: Any, plain: Any, case: Case) -> None:
    """The memory says something."""
    text = case.text(LONG)
    with window_only(model):
        without = one_pass(model, case, text)
    difference = (one_pass(model, case, text) - without).abs()
    assert float(difference[:, -1].max()) > 1e-6, "the memory says nothing"


def check_greedy(model: Any, plain: Any, case: Case) -> None:
    """``generate``."""
    text = case.text(18)
    follows(model, plain, case, generate(model, text, case, **LOGITS), 0, 0, text.shape[1])


def check_beams(model: Any, plain: Any, case: Case) -> None:
    """Three beams: each text is as likely as one pass over it says."""
    count, options = 6, {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    for seed in range(2):  # beams that keep their order say nothing
        text = case.text(18, seed)
        found = generate(model, text, case, **options, max_new_tokens=count)
        chances = one_pass(model, case, found.sequences)[:, text.shape[1] - 1 : -1].double().log_softmax(dim=-1)
        expected = chances.gather(2, found.sequences[:, text.shape[1] :, None])[..., 0].sum(dim=1) / count
        difference = float((found.sequences_scores - expected).abs().max())
        assert difference < 1e-3, f"scores of beams differ by {difference:.1e}"


def check_padding(model: Any, plain: Any, case: Case) -> None:
    """Rows of a left-padded batch are rows alone."""
    rows = [case.text(22), case.text(17, seed=1), case.text(2, seed=2)]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - row.shape[1] for row in rows]).long()
    found = generate(model, ids, case, attention_mask=mask, **LOGITS)
    for i, row in enumerate(rows):
        follows(model, plain, case, found, i, longest - row.shape[1], longest)


def check_static(model: Any, plain: Any, case: Case) -> None:
    """A static cache, not compiled."""
    text = case.text(18)
    options = {"cache_implementation": "static", "disable_compile": True}
    follows(model, plain, case, generate(model, text, case, **options, **LOGITS), 0, 0, text.shape[1])


def check_full_attention(model: Any, plain: Any, case: Case) -> None:
    """The base model, bit for bit."""
    text = case.text(LONG)
    with full_attention(model):
        same_as_base(model, plain, case, text)


def check_restore(model: Any, plain: Any, case: Case) -> None:
    """The base model again, bit for bit."""
    restore(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    same_as_base(model, plain, case, case.text(LONG))


def same_as_base(model: Any, plain: Any, case: Case, text: Tensor) -> None:
    """Raise unless logits and generated tokens are the base model's."""
    assert torch.equal(one_pass(model, case, text), one_pass(plain, case, text)), "other bits than the base model's"
    try:
        expected = generate(plain, text, case)
    except Exception:
        return
    assert torch.equal(generate(model, text, case), expected), "generates another text than the base model"


CHECKS: dict[str, Callable[[Any, Any, Case], None]] = {
    "inside the window": check_inside,
    "memory": check_memory,
    "pieces": check_pieces,
    "greedy": check_greedy,
    "beams": check_beams,
    "left padding": check_padding,
    "static": check_static,
    "full attention": check_full_attention,
    "restore": check_restore,
}
BASE_MAY_FAIL = ("pieces", "greedy", "beams", "left padding", "static")
