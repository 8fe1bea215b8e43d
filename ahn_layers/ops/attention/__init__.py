"""Softmax attention of a window: over what keepers of tokens show, by one dispatch."""
