"""The contracts as assertions, for classes of your own."""

from .compressors import check_compressor
from .evictions import check_eviction

__all__ = ["check_compressor", "check_eviction"]
