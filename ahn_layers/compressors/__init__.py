"""The compressors that come with the library, one file a paper."""

from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet
from .linear_attention import LinearAttention
from .mamba2 import Mamba2

__all__ = ["DeltaNet", "GatedDeltaNet", "LinearAttention", "Mamba2"]
