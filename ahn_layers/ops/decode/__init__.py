"""One decode step of a layer, and the choice of its form."""
