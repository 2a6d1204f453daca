"""What a patient does in a run: the names of the roles, and how a case table writes them."""

from __future__ import annotations

from collections.abc import Iterable

DISCOVERY, REFERENCE, TEST = ROLES = ("discovery", "reference", "test")
"""Roles of patients: training, lending their CT to synthetic cases, and comparing the segmenters."""
INTERNAL = "internal"
"""What the column `data_set` holds for the cases of `source`, and for samples, which are made from these. Those of an
external test set have its name there, and the role test."""
SYNTHETIC = "synthetic"
"""What the column `role` holds for a synthetic case."""
_JOINT = "+"


def join_roles(roles: Iterable[str]) -> str:
    """The cell of the column `role`: several only under `roles.allow_shared_patients`, none for a patient without."""
    return _JOINT.join(roles)


def roles_of(cell: str) -> list[str]:
    """The roles in a cell of the column `role`."""
    return cell.split(_JOINT) if cell else []
