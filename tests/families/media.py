"""Random images, videos and sounds for any multimodal model, found by trying the shapes that models take.

A model says how many places its features take in the prompt, in the error that it raises for another number.
"""

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .shrink import HIDDEN

MODALITIES = {"image": 1, "video": 2, "audio": 3}
"""What can be in a prompt, and how ``mm_token_type_ids`` calls it."""
_TOKENS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id", "im_patch_id"),
    "video": ("video_token_id", "video_token_index", "image_token_id"),
    "audio": ("audio_token_id", "audio_token_index"),
}


def takes(model: Any, modality: str) -> bool:
    """Whether a model's forward has arguments for this modality."""
    names = " ".join(inspect.signature(model.forward).parameters)
    patterns = {
        "image": r"\bpixel_values\b|image_pixel_values|flattened_patches|image_patches",
        "video": "pixel_values_videos",
        "audio": "input_features|audio_input_features|input_values|audio_input_ids",
    }
    return bool(re.search(patterns[modality], names))


def candidates(model: Any, modality: str) -> Iterator[dict[str, Tensor]]:
    """Arguments that the model might take."""
    names = set(inspect.signature(model.forward).parameters)
    config = model.config
    makers = {"image": _images, "video": _videos, "audio": _sounds}
    for made in makers[modality](config, names):
        yield {name: u for name, u in made.items() if name in names}


def place_tokens(config: Any, modality: str) -> list[int | None]:
    """The tokens that may stand for a feature in the prompt; None if nothing does."""
    parts = [config, *(u for u in vars(config).values() if hasattr(u, "model_type"))]
    found = (getattr(part, name, None) for name in _TOKENS[modality] for part in parts)
    return list(dict.fromkeys(u for u in found if isinstance(u, int))) or [None]


def places(error: Exception, given: int) -> list[int]:
    """Numbers of places that an error may ask for."""
    numbers = [int(u) for u in re.findall(r"\d+", str(error))]
    wanted = (*(n // HIDDEN for n in numbers if n % HIDDEN == 0), *numbers, *(n // given for n in numbers))
    return [n for n in dict.fromkeys(wanted) if 0 < n <= 400]


def _part(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _images(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    vision = _part(config, "vision_config", "visual_config", "vision_tower_config")
    size, patch = _first(vision, ("image_size",), 32), _first(vision, ("patch_size", "spatial_patch_size"), 8)
    channels = _first(vision, ("num_channels", "in_channels", "in_chans"), 3)
    depth, merge = _first(vision, ("temporal_patch_size",), 1), _first(vision, ("spatial_merge_size", "merge_size"), 2)
    side = 2 * max(merge, 2)
    grid = torch.tensor([[1, side, side]])
    sizes = torch.tensor([[size, size]])
    extras = {
        "qformer_input_ids": torch.tensor([[5, 6, 7]]), "qformer_attention_mask": torch.ones(1, 3, dtype=torch.long),
        "image_grid_thw": grid, "image_grid_hw": grid[:, 1:], "image_sizes": sizes, "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:], "image_merge_sizes": torch.tensor([merge]), "num_local_patches": torch.tensor([0]),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }  # fmt: skip
    patches = side * side
    flat = [torch.randn(patches, channels * d * patch * patch) for d in dict.fromkeys((depth, 1, 2))]
    flat += [torch.randn(patches, channels, patch, patch), torch.randn(1, patches, channels * patch * patch)]
    flat += [torch.randn(1, channels, patch, patches * patch)]
    square = [torch.randn(1, channels, size, size), torch.randn(1, 1, channels, size, size)]
    square += [torch.randn(1, 2, channels, size, size)]
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1)
    extras["image_position_ids"] = positions.reshape(1, -1, 2)
    first = flat if {"image_grid_thw", "spatial_shapes", "target_sizes", "image_position_ids"} & names else square
    masks = [{}, {"pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool)}]
    masks += [{"pixel_attention_mask": torch.ones(1, patches, dtype=torch.long)}]
    for pixels, mask in itertools.product([*first, *(square if first is flat else flat)], masks):
        if mask and "pixel_attention_mask" not in names:
            continue
        if "image_sizes" in names:
            yield {"pixel_values": pixels} | mask
        both = {"pixel_values": pixels, "high_res_pixel_values": pixels, "image_pixel_values": pixels}
        yield both | {"pixel_values_images": pixels} | extras | mask


def _videos(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    for made in _images(config, (names - {"image_sizes"}) | {"video"}):
        pixels = made["pixel_values"]
        extras = {
            "pixel_values_videos": pixels, "video_grid_thw": made["image_grid_thw"],
            "image_sizes_videos": made["image_sizes"], "target_sizes_videos": made["target_sizes"],
            "video_merge_sizes": made["image_merge_sizes"], "video_position_ids": made["image_position_ids"],
            "num_frames_per_video": torch.tensor([1]),
        }  # fmt: skip
        yield extras
        frames = pixels.reshape(1, 1, *pixels.shape[-3:]) if pixels.ndim == 4 and len(pixels) == 1 else None
        if frames is not None:
            yield extras | {"pixel_values_videos": frames.expand(1, 2, -1, -1, -1).clone()}


def _sounds(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    audio = _part(config, "audio_config", "encoder_config", "audio_encoder_config")
    mels = [_first(audio, (name,), 0) for name in ("num_mel_bins", "n_mel_bins", "feature_size", "input_feat_size",
                                                   "input_dim", "input_size", "mel_bins")]  # fmt: skip
    longest = 2 * _first(audio, ("max_source_positions",), 32)
    for bins, frames in itertools.product([u for u in dict.fromkeys(mels) if u] or [16], (64, 32, longest, 160, 200)):
        for features in (torch.randn(1, bins, frames), torch.randn(1, frames, bins)):
            for kind in (torch.long, torch.bool):
                mask = torch.ones(1, frames, dtype=kind)
                yield {
                    "input_features": features, "audio_input_features": features, "input_features_mask": mask,
                    "feature_attention_mask": mask, "audio_embed_sizes": torch.tensor([frames // 8]),
                    "audio_attention_mask": mask,
                }  # fmt: skip
    yield {"input_values": torch.randn(1, 6400)}
    yield {"input_values": torch.randn(1, 1, 6400)}
