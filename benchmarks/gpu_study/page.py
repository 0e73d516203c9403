"""The results as one Markdown page."""

from pathlib import Path


def page(results: Path) -> str:
    """The page of a results folder."""
    raise NotImplementedError
