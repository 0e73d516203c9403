"""Helpers that several test files share.

pytest finds this package, and the modules of ``benchmarks/``, by its ``pythonpath`` setting in pyproject.toml.
"""
