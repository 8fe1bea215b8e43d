"""Norms, rotations and the loss: plain forms, and one kernel each where it pays."""
