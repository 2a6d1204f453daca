"""What stands beside a sample: `sample.json`."""

from __future__ import annotations

import json
from pathlib import Path

from lungddpm.core import cases
from lungddpm.core.errors import InputError


def is_complete(folder: Path, wanted_fingerprint: str) -> bool:
    """Whether a sample's files are there, unchanged, and were made from what the fingerprint stands for."""
    try:
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
        return record["fingerprint"] == wanted_fingerprint and record["sha256"] == cases.hash_case(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError, InputError):
        return False
