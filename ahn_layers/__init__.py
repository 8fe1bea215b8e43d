"""Bounded memory for decoder language models: a lossless window and an Artificial Hippocampus Network.

arXiv 2510.07318.
"""

from typing import TYPE_CHECKING, Any

from .adapter import load_adapter, save_adapter
from .attention import HippocampalAttention
from .card import adapter_card
from .compressor import Compressor
from .compressors import (
    GLA,
    KDA,
    RWKV7,
    AveragePooling,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    Mamba2,
    MaxPooling,
    RetNet,
    Titans,
)
from .eviction import Eviction, FoldAll, empty_slots, keep_best
from .evictions import SalientSlots
from .layers import outer
from .memory import MemoryStore
from .missing import needs_transformers
from .ops.attention.attend import SoftmaxAttention
from .positions import Rotary
from .publishing import push_adapter
from .rank_one import DiagonalPlusRankOne, Transition
from .recurrent import Recurrence, Recurrent
from .registration import register_saved_models
from .retrofit import adapter_parameters, full_attention, memory_report, restore, retrofit, window_only
from .state import MemoryState
from .testing import check_compressor, check_eviction
from .version import __version__
from .window import Window

if TYPE_CHECKING:
    from .huggingface.cache import HippocampalCache

__all__ = [
    "__version__",
    "Window",
    "Compressor",
    "Recurrent",
    "Recurrence",
    "DiagonalPlusRankOne",
    "Transition",
    "Eviction",
    "FoldAll",
    "SalientSlots",
    "keep_best",
    "empty_slots",
    "MemoryStore",
    "MemoryState",
    "SoftmaxAttention",
    "HippocampalAttention",
    "Rotary",
    "LinearAttention",
    "DeltaNet",
    "GatedDeltaNet",
    "Mamba2",
    "RetNet",
    "GLA",
    "KDA",
    "GatedDeltaProduct",
    "RWKV7",
    "Titans",
    "AveragePooling",
    "MaxPooling",
    "retrofit",
    "restore",
    "full_attention",
    "window_only",
    "memory_report",
    "adapter_parameters",
    "save_adapter",
    "load_adapter",
    "push_adapter",
    "adapter_card",
    "HippocampalCache",
    "check_compressor",
    "check_eviction",
    "outer",
]


def __getattr__(name: str) -> Any:
    if name == "HippocampalCache":  # needs transformers, which the rest does not
        try:
            from .huggingface.cache import HippocampalCache
        except ImportError as error:
            raise needs_transformers(name) from error
        return HippocampalCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_saved_models()
