"""From scan to case: the phantom's truth, the rules for nodules on coarse grids, and what a shard writes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lungddpm.cases import read_case, read_cases, run_collect, write_cases
from lungddpm.config import Config, Grid
from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.files import fingerprint, sha256_of
from lungddpm.layouts import Label, compose
from lungddpm.layouts.compose import build_case, place_nodules, run_prepare
from lungddpm.sources import INDEX_COLUMNS, Scan, write_index
from lungddpm.volume import AIR_HU, Volume, model_grid, occupancy

SIZE = (64, 64, 64)


def scan_of(patient):
    """Only the nodules are given: lungs and vessels have to be segmented."""
    nodules = np.any(patient.nodules, axis=0)
    return Scan(patient.ct, labels=np.where(nodules, np.uint8(Label.NODULE), np.uint8(0)))


def labelled(patient):
    """Ready labels of all classes, so that nothing has to be segmented."""
    labels = np.where(patient.lungs, np.uint8(Label.LUNG), np.uint8(Label.BACKGROUND))
    labels[patient.vessels] = Label.VESSEL
    labels[np.any(patient.nodules, axis=0)] = Label.NODULE
    return Scan(patient.ct, labels=labels)


def flipped(scan):
    """The same scan as DICOM orders it: columns to the left, rows to the back."""
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = np.array(scan.ct.shape[:2]) - 1
    return Scan(Volume(scan.ct.array[::-1, ::-1], scan.ct.affine @ turn), labels=scan.labels[::-1, ::-1])


@pytest.fixture(scope="module")
def case(patient):
    return build_case(scan_of(patient), Config())


def test_ct_and_layout_share_the_model_grid(patient, case):
    assert case.ct.shape == case.layout.shape == SIZE
    assert case.ct.same_grid(case.layout)
    assert (case.ct.array.dtype, case.layout.array.dtype) == (np.int16, np.uint8)
    np.testing.assert_allclose(case.ct.affine, model_grid(patient.ct, SIZE))
    assert case.ct.array.mean() == pytest.approx(np.maximum(patient.ct.array, AIR_HU).mean(), abs=1)


def test_the_layout_is_the_truth_on_a_coarse_grid(patient, case):
    truth = occupancy(patient.ct.like(patient.lungs), case.ct.affine, SIZE) >= 0.5
    found = case.layout.array > 0
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.98
    assert set(np.unique(case.layout.array)) == {0, 1, 2, 3}


def test_vessels_survive_the_coarse_grid(patient, case):
    wide = patient.ct.like(patient.vessels & (patient.vessel_radius_mm >= 2))
    cells = occupancy(wide, case.ct.affine, SIZE) > 0.4
    assert np.isin(case.layout.array, (Label.VESSEL, Label.NODULE))[cells].mean() > 0.95


def test_every_nodule_keeps_its_place_and_volume(patient, case):
    for nodule in patient.nodules:
        share = occupancy(patient.ct.like(nodule), case.ct.affine, SIZE)
        assert (case.layout.array == Label.NODULE)[share > 0.6].all()
    volume_mm3 = sum(np.count_nonzero(nodule) for nodule in patient.nodules) * patient.ct.voxel_mm3
    layout_mm3 = np.count_nonzero(case.layout.array == Label.NODULE) * case.layout.voxel_mm3
    assert layout_mm3 == pytest.approx(volume_mm3, rel=0.05)


def test_qc_tells_the_truth(patient, case):
    litres = case.qc["lung_litres_right"] + case.qc["lung_litres_left"]
    assert litres == pytest.approx(patient.lungs.sum() * patient.ct.voxel_mm3 / 1e6, rel=0.03)
    assert case.qc["n_nodules"] == len(case.qc["nodules"]) == 3
    assert all(abs(nodule["volume_error"]) < 0.1 for nodule in case.qc["nodules"])
    assert all(nodule["share_in_or_touching_lungs"] > 0.95 for nodule in case.qc["nodules"])
    assert 0.01 < case.qc["vessel_share_of_lungs"] < 0.1
    json.dumps(case.qc, allow_nan=False)


def test_orientation_does_not_matter(patient):
    straight, turned = (build_case(scan, Config()) for scan in (labelled(patient), flipped(labelled(patient))))
    assert straight.ct.same_grid(turned.ct)
    assert np.abs(straight.ct.array - turned.ct.array).max() <= 1
    assert (straight.layout.array != turned.layout.array).sum() <= 3


def test_ready_labels_are_used(patient):
    layout = build_case(labelled(patient), Config()).layout
    truth = occupancy(patient.ct.like(patient.lungs), layout.affine, SIZE) >= 0.5
    assert ((layout.array > 0) == (truth | (layout.array == Label.NODULE))).all()


def test_the_lungs_extent_fits_the_lungs(patient):
    config = Config(grid=Grid(extent="lungs", margin_mm=10, size=(64, 64, 64)))
    layout = build_case(labelled(patient), config).layout
    low = np.array([edge[0] for edge in map(np.flatnonzero, axes_of(layout.array > 0))]) * layout.spacing_mm
    assert (low > 4).all()
    assert (low < 16).all()
    assert layout.voxel_mm3 < 0.5 * build_case(labelled(patient), Config()).layout.voxel_mm3


def axes_of(mask):
    return mask.any((1, 2)), mask.any((0, 2)), mask.any((0, 1))


def sphere(diameter_mm, centre=(20.0, 20.0, 20.0), spacing=0.5, size=80):
    axes = [((np.arange(size) + 0.5) * spacing - c) ** 2 for c in centre]
    mask = axes[0][:, None, None] + axes[1][:, None] + axes[2] <= (diameter_mm / 2) ** 2
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = spacing / 2
    return Volume(mask, affine)


def coarse_grid(spacing=(2.7, 2.7, 3.2), size=14):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.array(spacing) / 2
    return affine, (size,) * 3


@pytest.mark.parametrize(("diameter_mm", "tolerance"), [(3, 1.1), (4, 0.5), (5, 0.2), (8, 0.06), (15, 0.01)])
def test_no_nodule_is_lost_on_a_coarse_grid(diameter_mm, tolerance):
    affine, shape = coarse_grid()
    cell_mm3 = abs(np.linalg.det(affine))
    for shift in np.random.default_rng(0).uniform(-1.5, 1.5, (12, 3)):
        mask = sphere(diameter_mm, 20 + shift)
        volume_mm3 = mask.array.sum() * mask.voxel_mm3
        cells = place_nodules([mask], affine, shape)
        assert cells.any()
        assert cells.astype(bool).sum() * cell_mm3 == pytest.approx(volume_mm3, rel=tolerance)
        centre = (np.argwhere(cells).mean(axis=0) + 0.5) * np.diag(affine)[:3]
        assert np.abs(centre - 20 - shift).max() < 1.7


def test_two_nodules_never_share_a_cell():
    affine, shape = coarse_grid(spacing=(6.0, 6.0, 6.0), size=6)
    masks = [sphere(12, (20, 20, 20)), sphere(3, (20.5, 20, 20)), sphere(3, (20, 20.5, 20))]
    cells = place_nodules(masks, affine, shape)
    counts = [int(np.count_nonzero(cells == number)) for number in (1, 2, 3)]
    assert counts == [max(1, round(m.array.sum() * m.voxel_mm3 / 216)) for m in masks]


# ---------------------------------------------------------------- what a shard writes


@pytest.fixture
def cohort(patient, tmp_path, monkeypatch):
    """An index of five rows; the second cannot be read, the fourth was excluded before."""
    source = tmp_path / "data"
    source.mkdir()
    rows = []
    for number in range(5):
        name = f"case{number}"
        (source / f"{name}.bin").write_text(name)
        numbers = {column: 1 for column in INDEX_COLUMNS if column.startswith(("size", "spacing"))}
        excluded = number == 3
        rows.append(
            {
                **numbers,
                "case_id": name,
                "patient_id": name,
                "source": "fake",
                "role": "test",
                "series_uid": name,
                "n_nodules": 7,
                "status": "excluded" if excluded else "ok",
                "reason": "no XML" if excluded else "",
                "path": f"{name}.bin",
                "sha256": "",
                "annotations": "[]",
            }
        )
    write_index(tmp_path / "index.tsv", rows)
    loads = []

    def load_scan(path, row):
        loads.append(row["case_id"])
        if row["case_id"] == "case1":
            raise ExcludedCaseError(path / row["path"], "misses\nslice 7", "Download it again.")
        labels = labelled(patient)
        return Scan(labels.ct, labels=labels.labels, files=(path / row["path"],))

    monkeypatch.setattr(compose, "module_of", lambda kind: SimpleNamespace(load_scan=load_scan))

    def prepare(config=None, shard=0, shards=1):
        loads.clear()
        config = config or Config()
        run_prepare(config, tmp_path / "index.tsv", source, tmp_path / "cases", shard, shards, tmp_path / "cases/t.tsv")
        return read_cases(tmp_path / "cases/t.tsv").set_index("case_id")

    return SimpleNamespace(prepare=prepare, loads=loads, cases=tmp_path / "cases", source=source, root=tmp_path)


def test_a_shard_writes_its_own_cases(cohort):
    table = cohort.prepare(shard=1, shards=2)
    assert table.index.tolist() == ["case1", "case3"]
    table = cohort.prepare(shard=0, shards=2)
    assert table.index.tolist() == cohort.loads == ["case0", "case2", "case4"]
    ct, layout = read_case(cohort.cases / table.loc["case2", "path"])
    assert ct.shape == SIZE
    record = json.loads((cohort.cases / "case2" / "case.json").read_text())
    assert record["inputs"] == ["case2.bin"]
    assert record["versions"]["lungddpm"]
    assert str(cohort.root) not in (cohort.cases / "case2" / "case.json").read_text()
    hashes = [sha256_of(cohort.cases / "case2" / name) for name in ("ct.nii.gz", "layout.nii.gz")]
    assert table.loc["case2", "sha256"] == record["sha256"] == fingerprint(hashes)
    assert table.loc["case2", "n_nodules"] == 3
    assert np.count_nonzero(layout.array == Label.NODULE) > 3


def test_a_case_that_cannot_be_used_keeps_its_row(cohort):
    (cohort.cases / "case1").mkdir(parents=True)
    (cohort.cases / "case1" / "ct.nii.gz").write_text("stale")
    table = cohort.prepare(shard=1, shards=2)
    assert table["status"].tolist() == ["excluded", "excluded"]
    assert table.loc["case1", "reason"] == "case1.bin: misses slice 7. Download it again."
    assert table.loc["case3", "reason"] == "no XML"
    assert not (cohort.cases / "case1" / "ct.nii.gz").exists()


def test_only_what_has_changed_is_done_again(cohort):
    first = cohort.prepare(shard=0, shards=2)
    assert cohort.prepare(shard=0, shards=2).equals(first)
    assert cohort.loads == []

    (cohort.source / "case0.bin").write_text("changed")
    (cohort.cases / "case2" / "layout.nii.gz").write_bytes(b"damaged")
    (cohort.cases / "case4" / "case.json").write_text("{")
    again = cohort.prepare(shard=0, shards=2)
    assert cohort.loads == ["case0", "case2", "case4"]
    assert again.equals(first)

    cohort.prepare(Config(grid=Grid(size=(32, 32, 32))), shard=0, shards=2)
    assert cohort.loads == ["case0", "case2", "case4"]


def test_a_shard_without_cases_writes_an_empty_table(cohort):
    assert cohort.prepare(shard=8, shards=9).empty


def test_a_missing_source_is_told(cohort, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        run_prepare(Config(), tmp_path / "index.tsv", tmp_path / "gone", tmp_path, 0, 1, tmp_path / "t.tsv")


def shard_table(path, **rows):
    """A case table of (role, nodules, reason) by case id."""
    numbers = {f"{what}_{axis}{unit}": 1 for axis in "xyz" for what, unit in (("size", ""), ("spacing", "_mm"))}
    write_cases(
        path,
        [
            {
                **numbers, "case_id": name, "patient_id": name, "source": "fake", "role": role, "series_uid": name,
                "n_nodules": nodules, "status": "excluded" if reason else "ok", "reason": reason,
                "path": name, "sha256": "",
            }
            for name, (role, nodules, reason) in rows.items()
        ],
    )  # fmt: skip
    return path


def test_shards_are_merged_by_case_id(tmp_path):
    tables = [
        shard_table(tmp_path / "0.tsv", a=("discovery", 1, ""), c=("test", 1, "")),
        shard_table(tmp_path / "1.tsv", b=("reference", 2, ""), d=("test", 0, "bad")),
        shard_table(tmp_path / "2.tsv"),
    ]
    run_collect(Config(), tables, tmp_path / "cases.tsv")
    assert read_cases(tmp_path / "cases.tsv")["case_id"].tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"t": ("test", 1, "only one lung")}, r"roles.test.*no usable case is left.*only one lung \(1 x\)"),
        ({"t": ("test", 0, "")}, r"roles.test.*no usable case with a nodule is left"),
        ({}, r"roles.test.*excluded: none"),
    ],
)
def test_a_role_without_usable_cases_is_told(tmp_path, rows, message):
    others = {"a": ("discovery", 1, ""), "b": ("reference", 1, "")}
    table = shard_table(tmp_path / "0.tsv", **others, **rows)
    with pytest.raises(InputError, match=message):
        run_collect(Config(), [table], tmp_path / "cases.tsv")
    assert not (tmp_path / "cases.tsv").exists()
