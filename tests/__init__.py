"""The tests: contracts, parity, files, errors, documentation."""
