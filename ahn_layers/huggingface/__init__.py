"""Everything that knows transformers: the attention and mask functions, the cache, the probe.

Nothing outside this package imports transformers.
"""
