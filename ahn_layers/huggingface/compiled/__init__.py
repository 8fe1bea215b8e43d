"""What speeds up the base model on a GPU: compiled layers, prompts, one graph for a decode step.

Nothing depends on it: without this folder everything works, only slower.
"""
