"""Phantom patients that several tests look at; none of them may be changed."""

from pathlib import Path

import pytest

from lungddpm.core.files import seed_from
from lungddpm.sources.phantom.cohort import write_cohort
from lungddpm.sources.phantom.patient import Thorax, thorax
from lungddpm.sources.phantom.settings import Phantom

_SEED = 3


@pytest.fixture(scope="session")
def small() -> Phantom:
    """Coarse scans with nodules that are large enough for them."""
    return Phantom(matrix=80, pixel_mm=4.4, slice_mm=6, nodules=(2, 3), nodule_diameter_mm=(16, 30))


@pytest.fixture(scope="session")
def clean() -> Thorax:
    """A patient of default size without noise."""
    return thorax(Phantom(noise_hu=0, nodules=(3, 3)), seed=8)


@pytest.fixture(scope="session")
def patients(small: Phantom) -> list[Thorax]:
    """Coarse patients without noise, of seeds 0 to 5, for what must hold in all of them."""
    return [thorax(small.model_copy(update={"noise_hu": 0.0}), seed) for seed in range(6)]


@pytest.fixture(scope="session")
def write_small(small: Phantom):
    """A function that writes a coarse cohort, with some settings changed, into a folder."""

    def write(output: Path, patients: int, threads: int = 1, **keys: object) -> None:
        write_cohort(Phantom(**small.model_dump() | {"patients": patients} | keys), _SEED, output, threads)

    return write


@pytest.fixture(scope="session")
def cohort(write_small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two coarse patients."""
    folder = tmp_path_factory.mktemp("cohort")
    write_small(folder, 2)
    return folder


@pytest.fixture(scope="session")
def cohort_seeds() -> list[int]:
    """Seeds of the cohort's patients."""
    return [seed_from(_SEED, "phantom", index) for index in (1, 2)]


@pytest.fixture(scope="session")
def cohort_truths(small: Phantom, cohort_seeds: list[int]) -> list[Thorax]:
    """The cohort's patients as they were before they were written."""
    return [thorax(small, seed) for seed in cohort_seeds]
