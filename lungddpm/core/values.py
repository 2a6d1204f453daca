"""Nested mappings of JSON-like values."""

from __future__ import annotations

from typing import Any


def merge_values(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Nested values of both, those of the overlay where both have one; lists are replaced, as Snakemake does."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_values(merged[key], value) if both else value
    return merged
