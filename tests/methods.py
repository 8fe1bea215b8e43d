"""Every compressor that comes with the library: a new one in this table is tested by all contracts."""

from ahn_layers import DeltaNet, GatedDeltaNet, LinearAttention, Mamba2

COMPRESSORS = [LinearAttention, DeltaNet, GatedDeltaNet, Mamba2]
NAMES = [compressor.__name__ for compressor in COMPRESSORS]
RELEASED = [DeltaNet, GatedDeltaNet, Mamba2]
"""Those of the paper, of which there are released weights and golden files."""
