"""Fixtures shared by the tests of several rooms."""

import os
from pathlib import Path

# Before numpy: the threads of its BLAS would spin on small matrices, in each of pytest's processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

from lungddpm.core.cases import COLUMNS, CaseFolder, write_cases
from lungddpm.core.files import seed_from, write_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.volume import Volume, bounding_box, read_volume, write_volume

pytest_plugins = ["made_up_results", "made_up_trainings", "stand_in_gpu"]

ROOT = Path(__file__).resolve().parent.parent

# No result depends on how busy the machine is.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    """The longest tests first, the one that waits for Slurm before all, so that several processes end together."""
    items.sort(key=lambda item: ("slurm" not in item.fixturenames, item.get_closest_marker("workflow") is None))


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread: faster for small networks, and sums are reproducible."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A test of the command line sets up logging; the next one must not inherit that."""
    level, handlers = LOG.level, LOG.handlers[:]
    yield
    LOG.setLevel(level)
    LOG.handlers[:] = handlers


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans and oracles; skips the test where it is absent."""
    folder = Path(os.environ.get("LUNGDDPM_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder}; set LUNGDDPM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def write_blob_case():
    """A function that writes a case folder (bright balls in noise) and returns its row of a case table."""

    def write(folder: Path, patient_id: str, role: str = "", source: str = "phantom", size: int = 32, **provenance):
        generator = np.random.default_rng(seed_from(folder.name))
        hu, layout = generator.normal(-800, 30, (size,) * 3), np.full((size,) * 3, Label.LUNG, np.uint8)
        voxels = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
        for centre in generator.uniform(size * 0.2, size * 0.8, (2, 3)):
            ball = ((voxels - centre) ** 2).sum(-1) < (size * 0.12) ** 2
            hu[ball] += 820
            layout[ball] = Label.NODULE
        affine = np.diag([5.0, 3.0, 4.0, 1.0])
        write_volume(folder / "ct.nii.gz", Volume(hu.astype(np.int16), affine))
        write_volume(folder / "layout.nii.gz", Volume(layout, affine))
        write_json(folder / ("sample.json" if provenance else "case.json"), provenance or {"case_id": folder.name})
        row = dict.fromkeys(COLUMNS, "") | dict.fromkeys([c for c in COLUMNS if c.startswith(("size", "spacing"))], 1)
        return row | {
            "case_id": folder.name,
            "patient_id": patient_id,
            "source": source,
            "data_set": "internal",
            "role": role,
            "n_nodules": 2,
            "status": "ok",
            "path": folder.name,
            "sha256": CaseFolder(folder).hash(),
        }

    return write


@pytest.fixture(scope="session")
def write_nodules():
    """A function that gives a case folder what `prepare` keeps of its layout's nodules: nodules.nii.gz, case.json."""
    from scipy import ndimage

    from lungddpm.layouts.prior import measure_places

    def write(folder: Path) -> None:
        layout = read_volume(folder / "layout.nii.gz")
        numbers, count = ndimage.label(layout.array == Label.NODULE, np.ones((3, 3, 3)))
        nodules = []
        for number in range(1, count + 1):
            at = np.argwhere(numbers == number)
            centroid = (layout.affine @ [*at.mean(axis=0), 1])[:3]
            figures = {"volume_mm3": len(at) * layout.voxel_mm3, "share_in_or_touching_lungs": 1.0}
            nodules.append(figures | {f"centroid_{axis}_mm": float(x) for axis, x in zip("xyz", centroid, strict=True)})
        if count:
            box = bounding_box(numbers > 0)
            write_volume(folder / "nodules.nii.gz", layout.like(numbers.astype(np.uint8)).crop(box))
        else:
            (folder / "nodules.nii.gz").unlink(missing_ok=True)
        record = {"case_id": folder.name, "fingerprint": CaseFolder(folder).hash(), "qc": {"nodules": nodules}}
        write_json(folder / "case.json", record | {"placement": measure_places(layout, nodules)})

    return write


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory, write_nodules) -> Path:
    """Table of three discovery, two reference and one test case of 16^3 voxels: soft tissue around one lung with a
    vessel and a nodule. Do not write there."""
    folder = tmp_path_factory.mktemp("cohort")
    random = np.random.default_rng(7)
    x, y, z = np.indices((16, 16, 16)) - 7.5
    affine = np.diag([4.0, 4.0, 5.0, 1.0])
    rows = []
    for number, role in enumerate(["discovery"] * 3 + ["reference"] * 2 + ["test"]):
        layout = np.zeros((16, 16, 16), np.uint8)
        layout[(x / 6.5) ** 2 + (y / 5) ** 2 + (z / 7) ** 2 < 1] = Label.LUNG
        layout[(abs(x) < 1) & (abs(y) < 1) & (layout == Label.LUNG)] = Label.VESSEL
        layout[(x - 3) ** 2 + y**2 + (z - number) ** 2 < 4] = Label.NODULE
        hu = np.choose(layout, [40 + 700 * (y > 6), -850, 20, -50]) + random.normal(0, 10, layout.shape)
        case_id = f"case{number:02d}"
        write_volume(folder / case_id / "ct.nii.gz", Volume(hu.astype(np.int16), affine))
        write_volume(folder / case_id / "layout.nii.gz", Volume(layout, affine))
        write_nodules(folder / case_id)
        sizes = {"size_x": 16, "size_y": 16, "size_z": 16}
        spacings = {"spacing_x_mm": 4.0, "spacing_y_mm": 4.0, "spacing_z_mm": 5.0}
        names = {"case_id": case_id, "patient_id": f"patient{number:02d}", "source": "test", "role": role}
        state = {"series_uid": f"1.2.{number}", "n_nodules": 1, "status": "ok", "reason": "", "path": case_id}
        rows.append(names | sizes | spacings | state | {"sha256": CaseFolder(folder / case_id).hash()})
    write_cases(folder / "cases.tsv", rows)
    return folder / "cases.tsv"
