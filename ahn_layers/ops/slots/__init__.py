"""The running choice of kept tokens, and its soft form for training."""
