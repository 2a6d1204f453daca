"""The record of a sample: `sample.json`."""

from __future__ import annotations

from lungddpm.core.cases import CaseFolder
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json


def is_complete(folder: CaseFolder, wanted_fingerprint: str) -> bool:
    """Whether a sample's files exist, are unchanged, and match the fingerprint of its inputs."""
    try:
        record = read_json(folder.sample_record)
        return record["fingerprint"] == wanted_fingerprint and record["sha256"] == folder.hash()
    except (KeyError, InputError):
        return False
