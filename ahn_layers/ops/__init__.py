"""Pure functions on tensors: window attention, rotary positions, chunked scans. No module state, no parameters."""
