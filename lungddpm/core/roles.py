"""The roles of patients: their names, and their form in case tables."""

from __future__ import annotations

from collections.abc import Iterable

DISCOVERY, REFERENCE, TEST = ROLES = ("discovery", "reference", "test")
"""Roles of patients: training, lending their CT to synthetic cases, and testing the segmenters."""
INTERNAL = "internal"
"""Value of the column `data_set` for the cases of `source`, and for samples, which are made from these. Cases of an
external test set have its name there, and the role test."""
PATIENT_COLUMNS = ("patient_id", "patient", "participant_id")
"""Names of the column of patients in a user's table; the last is that of BIDS."""
SYNTHETIC = "synthetic"
"""Value of the column `role` for a synthetic case."""
_JOINT = "+"


def join_roles(roles: Iterable[str]) -> str:
    """The cell of the column `role`: several only with `roles.allow_shared_patients`, empty for a patient without."""
    return _JOINT.join(roles)


def roles_of(cell: str) -> list[str]:
    """The roles in a cell of the column `role`."""
    return cell.split(_JOINT) if cell else []
