"""Everything that knows transformers: the attention and mask functions, the cache, the probe.

Outside this package only the trainer imports transformers.
"""
