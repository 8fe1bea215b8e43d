"""A server for retrofitted models: an engine that batches conversations row by row, and an OpenAI-compatible app."""
