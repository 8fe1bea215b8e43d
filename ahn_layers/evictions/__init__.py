"""The eviction policies that come with the library, one file a policy."""

from .salient_slots import SalientSlots

__all__ = ["SalientSlots"]
