"""A phantom patient that the tests of lungs, vessels and composition share."""

from dataclasses import dataclass

import numpy as np
import pytest

from lungddpm.core.volume import Volume
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom


@dataclass(frozen=True)
class Patient:
    """A phantom in RAS+: the CT and what is true of it."""

    ct: Volume
    lungs: np.ndarray
    vessels: np.ndarray
    vessel_radius_mm: np.ndarray
    nodules: list[np.ndarray]


@pytest.fixture(scope="session")
def patient() -> Patient:
    """Default size; three nodules of 22 to 30 mm, two of them on the pleura."""
    truth = thorax(Phantom(nodules=(3, 3), nodule_diameter_mm=(22, 30)), seed=11)

    def canonical(array):
        return truth.ct.like(array).canonical().array

    return Patient(
        truth.ct.canonical(),
        canonical(truth.lungs),
        canonical(truth.vessels),
        canonical(truth.vessel_radius_mm),
        [canonical(nodule.mask) for nodule in truth.nodules],
    )
