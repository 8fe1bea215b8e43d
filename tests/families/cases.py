"""The model of a type, and a prompt for it, with an image, a video or a sound if the case says so."""

import contextlib
import copy
import inspect
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from . import media
from .checks import Case, one_pass
from .shrink import initialise, tiny_config
from .special import ALL_ALIKE


def all_names(kind: str | None = None) -> list[str]:
    """Every case: a type of causal language model, or a modality and a multimodal type, ``image/llava``."""
    causal = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    several = sorted({*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    multimodal = [f"{modality}/{name}" for name in several for modality in media.MODALITIES]
    return {"causal": causal, "multimodal": multimodal}.get(kind or "", [*causal, *multimodal])


def build(name: str) -> Case | None:
    """The model of a case with its prompt, in float64 if the model can do that; None if it takes no such prompt."""
    modality, _, model_type = name.rpartition("/")
    torch.manual_seed(0)
    model = _make(model_type, multimodal=bool(modality)).eval()
    initialise(model)
    if not modality:
        case: Case | None = Case(model, torch.tensor([[5, 6]]))
        one_pass(model, case, case.text(3))
    elif not media.takes(model, modality) or model.config.is_encoder_decoder:
        return None
    else:
        case = _with_media(model, modality)
    exact = copy.deepcopy(model).double()
    with contextlib.suppress(Exception):
        in_float64 = Case(exact, case.prompt, _converted(case.media, torch.float64), case.token_types)
        one_pass(exact, in_float64, in_float64.text(3))
        case = in_float64
    return case


def _make(model_type: str, multimodal: bool) -> Any:
    config = tiny_config(model_type)
    if not multimodal:
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        parts = (u for u in vars(config).values() if cls.config_class is not None and isinstance(u, cls.config_class))
        config = next(parts, config)
        return cls._from_config(config, experts_implementation="eager")
    return multimodal_auto(model_type).from_config(config, experts_implementation="eager")


def multimodal_auto(model_type: str) -> Any:
    """The Auto class that makes it."""
    return (
        AutoModelForMultimodalLM if model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    )


def _converted(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: u.to(dtype) if u.is_floating_point() else u for name, u in given.items()}


def _with_media(model: Any, modality: str) -> Case:
    """A prompt with a feature that the model takes.

    Raises:
        ValueError: if it takes none of those that are known here.
    """
    reasons: list[str] = []
    for token in media.place_tokens(model.config, modality)[:2]:
        case = _with_places(model, modality, token, reasons)
        if case is not None:
            return case
    raise ValueError(f"no {modality} that it takes: {'; '.join(dict.fromkeys(reasons))[:900]}")


def _with_places(model: Any, modality: str, token: int | None, reasons: list[str]) -> Case | None:
    """The same with this token at the places of the feature; None if there is none, and ``reasons`` says why."""
    known = set(inspect.signature(model.forward).parameters)
    types = {name: {token: value} for name, value in (("mm_token_type_ids", media.MODALITIES[modality]),
             ("token_type_ids", 1)) if name in known and token is not None}  # fmt: skip
    if "image_embeds_position_mask" in known and modality == "image":
        token, types = 105, {"image_embeds_position_mask": {105: 1}}
    if model.config.model_type in ALL_ALIKE:
        types.pop("token_type_ids", None)
    for given in media.candidates(model, modality):
        counts, tried = [4], set()
        while counts:
            count = counts.pop(0)
            if count in tried:
                continue
            tried.add(count)
            marks = [] if token is None else [token] * count
            case = Case(model, torch.tensor([[5, *marks, 6]]), given, types)
            try:
                text = case.text(3)
                logits = one_pass(model, case, text)
                other = {n: u + 1 if u.is_floating_point() else u for n, u in given.items()}
                if torch.equal(one_pass(model, case, text, other), logits):
                    raise ValueError("the feature makes no difference")
                return case
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
                if token is not None:
                    counts += media.places(error, count) if len(tried) < 12 else []
    return None
