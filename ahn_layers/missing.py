"""Packages that only some of the library needs."""


def needs_transformers(what: str) -> ImportError:
    """The error of something that cannot be imported, or not with the transformers that is installed."""
    return ImportError(f"{what} needs transformers, version 5.17 to 5.24: pip install 'transformers>=5.17,<6'.")
