"""The compressors that come with the library, one file a paper."""

from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet
from .gated_delta_product import GatedDeltaProduct
from .gla import GLA
from .kda import KDA
from .linear_attention import LinearAttention
from .mamba2 import Mamba2
from .pooling import AveragePooling, MaxPooling
from .ret_net import RetNet
from .rwkv7 import RWKV7
from .titans import Titans

__all__ = [
    "AveragePooling",
    "DeltaNet",
    "GLA",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "KDA",
    "LinearAttention",
    "Mamba2",
    "MaxPooling",
    "RWKV7",
    "RetNet",
    "Titans",
]
