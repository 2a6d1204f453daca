"""From scan to case: the phantom's truth, the rules for nodules on coarse grids, and what a shard writes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Config, Grid
from lungddpm.core.cases import NODULE_COLUMNS, CaseFolder, read_cases
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import fingerprint, sha256_of
from lungddpm.core.labels import Label
from lungddpm.core.volume import AIR_HU, Volume, model_grid, occupancy, read_volume
from lungddpm.layouts import compose
from lungddpm.layouts.compose import build_case, nodules_on_grid, run_prepare
from lungddpm.layouts.nodules import centroid_mm
from lungddpm.sources import Annotation, Contour, Scan
from lungddpm.sources.index import INDEX_COLUMNS, read_index, write_index

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


def turned(scan, flips, degrees=0.0):
    """The same scan with some axes stored the other way round, after the patient has turned about z."""
    turn = np.diag([*np.where(flips, -1.0, 1.0), 1.0])
    turn[:3, 3] = np.where(flips, np.array(scan.ct.shape) - 1, 0)
    angle = np.radians(degrees)
    about_z = np.eye(4)
    about_z[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    backwards = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    return Scan(Volume(scan.ct.array[backwards], about_z @ scan.ct.affine @ turn), labels=scan.labels[backwards])


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


def test_qc_agrees_with_the_truth(patient, case):
    litres = case.qc["lung_litres_right"] + case.qc["lung_litres_left"]
    assert litres == pytest.approx(patient.lungs.sum() * patient.ct.voxel_mm3 / 1e6, rel=0.03)
    assert case.qc["n_nodules"] == len(case.qc["nodules"]) == 3
    assert all(abs(nodule["volume_error"]) < 0.1 for nodule in case.qc["nodules"])
    assert all(nodule["share_in_or_touching_lungs"] > 0.95 for nodule in case.qc["nodules"])
    assert 0.01 < case.qc["vessel_share_of_lungs"] < 0.1
    assert case.qc["smaller_lung_share"] == pytest.approx(case.qc["lung_litres_left"] / litres, abs=1e-3)
    assert case.qc["end_slice_share_bottom"] == case.qc["end_slice_share_top"] == 0
    assert case.qc["nodule_share_in_or_touching_lungs"] > 0.95
    json.dumps(case.qc, allow_nan=False)


def test_notes_on_how_the_scan_was_read_are_kept(patient):
    scan = replace(labelled(patient), notes=("read with tongs",))
    assert build_case(scan, Config()).qc["notes"] == ["read with tongs"]


def test_nodules_that_the_readers_do_not_agree_on_are_noted(patient):
    """Of two readers on adjacent slices, in a scan that the lungs are segmented in."""
    size, slices = 12, (30, 31)
    middle = np.argwhere(patient.lungs[:, :, 30]).mean(axis=0).astype(int)
    side = np.arange(size)
    ring = np.r_[np.c_[side, 0 * side], np.c_[0 * side + size, side], np.c_[size - side, 0 * side + size],
                 np.c_[0 * side, size - side]] + middle  # fmt: skip
    marks = tuple(Annotation(reader, (Contour(k, ring),)) for reader, k in enumerate(slices))
    qc = build_case(Scan(patient.ct, marks), Config(layouts={"consensus": 1.0})).qc
    assert (qc["n_nodules"], qc["nodules"]) == (0, [])
    assert qc["notes"] == ["1 nodule has no voxel at layouts.consensus 1 and was left out"]


def test_every_nodule_is_described(patient, case):
    ct, truth = patient.ct, sorted(patient.nodules, key=lambda mask: centroid_mm(patient.ct.like(mask))[2])
    for mask, figures in zip(truth, case.qc["nodules"], strict=True):
        assert list(figures) == NODULE_COLUMNS[3:]
        volume_mm3 = mask.sum() * ct.voxel_mm3
        assert figures["volume_mm3"] == pytest.approx(volume_mm3, abs=0.05)
        assert figures["equivalent_diameter_mm"] ** 3 * np.pi / 6 == pytest.approx(volume_mm3, rel=1e-2)
        centre = [figures[f"centroid_{axis}_mm"] for axis in "xyz"]
        np.testing.assert_allclose(centre, centroid_mm(ct.like(mask)), atol=0.01)
        assert (figures["readers"], figures["malignancy"], figures["notes"]) == (1, None, "")


def test_what_was_found_is_given_at_the_scans_own_resolution(patient, case):
    found = case.found
    np.testing.assert_array_equal(found.ct.array, np.maximum(patient.ct.array, AIR_HU))
    np.testing.assert_array_equal(found.nodules > 0, np.any(patient.nodules, axis=0))
    assert not (found.vessels & (found.nodules > 0)).any()
    labels = found.labels()
    counts = np.bincount(labels.ravel(), minlength=4)
    assert counts[Label.NODULE] == np.count_nonzero(found.nodules)
    assert counts[Label.VESSEL] == np.count_nonzero(found.vessels)
    assert ((labels > 0) == ((found.lungs_lr > 0) | (found.nodules > 0))).all()


def test_orientation_does_not_matter(patient):
    # As DICOM orders it: columns to the left, rows to the back.
    scan = labelled(patient)
    straight, other = (build_case(scan, Config()) for scan in (scan, turned(scan, (True, True, False))))
    assert straight.ct.same_grid(other.ct)
    assert np.abs(straight.ct.array - other.ct.array).max() <= 1
    assert (straight.layout.array != other.layout.array).sum() <= 3


@pytest.mark.parametrize("extent", ["full", "lungs"])
@pytest.mark.parametrize(
    ("flips", "degrees"), [((True, True, False), 0), ((False, True, True), 8), ((True, False, True), -5)]
)
def test_a_layout_overlays_its_scan(patient, extent, flips, degrees):
    scan = turned(labelled(patient), flips, degrees)
    made = build_case(scan, Config(grid=Grid(extent=extent, size=SIZE)))
    assert made.qc["n_nodules"] == 3
    nodule_cells = made.layout.like(made.layout.array == Label.NODULE)
    cell = np.linalg.inv(made.layout.affine)
    for number, figures in enumerate(made.qc["nodules"], start=1):
        before_mm = centroid_mm(made.found.ct.like(made.found.nodules == number))
        np.testing.assert_allclose(before_mm, [figures[f"centroid_{axis}_mm"] for axis in "xyz"], atol=0.01)
        # The scan that came in, in its own orientation, has a nodule there.
        at = np.rint(np.linalg.solve(scan.ct.affine, [*before_mm, 1])[:3]).astype(int)
        assert scan.labels[tuple(at)] == Label.NODULE
        own_cells = occupancy(made.found.ct.like(made.found.nodules == number), made.layout.affine, SIZE) > 0
        after_mm = centroid_mm(nodule_cells.like(nodule_cells.array & own_cells))
        assert np.abs(cell[:3, :3] @ (after_mm - before_mm)).max() <= 0.5
    lungs = [
        centroid_mm(volume.like(volume.array > 0)) for volume in (made.layout, made.found.ct.like(made.found.labels()))
    ]
    assert np.abs(cell[:3, :3] @ np.subtract(*lungs)).max() < 0.1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"lung_litres": (8, 12)}, r"is \d\.\d\d litres, outside 8 to 12 \(layouts.limits.lung_litres\)"),
        ({"smaller_lung_share": 0.5}, r"has 4\d\.\d% .* less than 50\.0% \(layouts.limits.smaller_lung_share\)"),
        (
            {"vessel_share": (0.2, 0.3)},
            r"fill \d\.\d\d% of the lungs; the limits are 20\.00% to 30\.00% \(layouts.limits.vessel_share\)",
        ),
        (
            {"vessel_share": (0, 0.001)},
            r"fill \d\.\d\d% of the lungs; the limits are 0\.00% to 0\.10% \(layouts.limits.vessel_share\)",
        ),
    ],
)
def test_a_case_outside_the_limits_is_excluded_with_the_figure(patient, limits, message):
    with pytest.raises(ExcludedCaseError, match=message):
        build_case(labelled(patient), Config(layouts={"limits": limits}))


def test_nodules_outside_the_lungs_exclude_the_case(patient):
    scan = labelled(patient)
    scan.labels[2:40, 2:12, 2:30] = Label.NODULE
    message = r"nodules: \d+\.\d% of their voxels .* less than 50\.0% \(layouts.limits.nodule_share\)"
    with pytest.raises(ExcludedCaseError, match=message):
        build_case(scan, Config())


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
        cells = nodules_on_grid([mask], affine, shape)
        assert cells.any()
        assert cells.astype(bool).sum() * cell_mm3 == pytest.approx(volume_mm3, rel=tolerance)
        centre = (np.argwhere(cells).mean(axis=0) + 0.5) * np.diag(affine)[:3]
        assert np.abs(centre - 20 - shift).max() < 1.7


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.tuples(*[st.floats(1.5, 9)] * 3),
    st.tuples(*[st.floats(-0.5, 0.5)] * 6),
    st.floats(0.6, 5),
    st.tuples(st.floats(1.5, 3.2), st.floats(1.5, 3.2), st.floats(1.5, 5)),
)
def test_a_nodules_centroid_stays_within_half_a_cell(radii_mm, shift, slice_mm, cell_mm):
    spacing = np.array([0.7, 0.8, slice_mm])
    axes = [np.arange(-20, 21) * step for step in spacing]
    x, y, z = (((axis + s) / r) ** 2 for axis, s, r in zip(axes, shift[:3] * spacing, radii_mm, strict=True))
    mask = Volume(x[:, None, None] + y[:, None] + z <= 1, np.diag([*spacing, 1.0]))
    assume(mask.array.any())
    affine = np.diag([*cell_mm, 1.0])
    affine[:3, 3] = 20 * spacing + np.array(cell_mm) * (np.array(shift[3:]) - 8)
    cells = nodules_on_grid([mask], affine, (17, 17, 17))
    moved_mm = centroid_mm(Volume(cells > 0, affine)) - centroid_mm(mask)
    assert np.abs(moved_mm / cell_mm).max() <= 0.5
    wanted = max(1, round(mask.array.sum() * mask.voxel_mm3 / np.prod(cell_mm)))
    assert np.count_nonzero(cells) == wanted


def test_two_nodules_never_share_a_cell():
    affine, shape = coarse_grid(spacing=(6.0, 6.0, 6.0), size=6)
    masks = [sphere(12, (20, 20, 20)), sphere(3, (20.5, 20, 20)), sphere(3, (20, 20.5, 20))]
    cells = nodules_on_grid(masks, affine, shape)
    counts = [int(np.count_nonzero(cells == number)) for number in (1, 2, 3)]
    assert counts == [max(1, round(m.array.sum() * m.voxel_mm3 / 216)) for m in masks]


# ---------------------------------------------------------------- what a shard writes


@pytest.fixture
def cohort(patient, tmp_path, monkeypatch):
    """An index of five rows; the second cannot be read, the fourth was excluded before, the fifth has no nodule."""
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
                "source": "lidc",
                "data_set": "internal",
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
        scan = labelled(patient)
        coarse = Volume(scan.ct.array[::2, ::2], scan.ct.affine @ np.diag([2.0, 2, 1, 1]))
        labels = scan.labels[::2, ::2]
        if row["case_id"] == "case4":
            labels = np.where(labels == Label.NODULE, np.uint8(Label.LUNG), labels)
        return Scan(coarse, labels=labels, files=(path / row["path"],))

    monkeypatch.setattr(compose, "source_of", lambda kind: SimpleNamespace(load_scan=load_scan))

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
    ct, layout = CaseFolder(cohort.cases / table.loc["case2", "path"]).read()
    assert ct.shape == SIZE
    record = json.loads((cohort.cases / "case2" / "case.json").read_text())
    assert record["inputs"] == ["case2.bin"]
    assert record["versions"]["lungddpm"]
    assert str(cohort.root) not in (cohort.cases / "case2" / "case.json").read_text()
    hashes = [sha256_of(cohort.cases / "case2" / name) for name in ("ct.nii.gz", "layout.nii.gz")]
    assert table.loc["case2", "sha256"] == record["sha256"] == fingerprint(hashes)
    assert table.loc["case2", "n_nodules"] == 3
    assert np.count_nonzero(layout.array == Label.NODULE) > 3


def test_the_nodules_are_written_at_the_scans_own_resolution(cohort, patient):
    cohort.prepare(shard=2, shards=5)
    nodules = read_volume(cohort.cases / "case2" / "nodules.nii.gz")
    figures = json.loads((cohort.cases / "case2" / "case.json").read_text())["qc"]["nodules"]
    assert nodules.array.dtype == np.uint8
    assert np.unique(nodules.array).tolist() == [0, 1, 2, 3]
    for number, nodule in enumerate(figures, start=1):
        mask = nodules.like(nodules.array == number)
        np.testing.assert_allclose(centroid_mm(mask), [nodule[f"centroid_{axis}_mm"] for axis in "xyz"], atol=0.01)
        assert np.count_nonzero(mask.array) * mask.voxel_mm3 == pytest.approx(nodule["volume_mm3"], abs=0.06)
    # Cropped to the nodules: each face of the volume meets one.
    assert all(face.any() for axis in range(3) for face in np.moveaxis(nodules.array, axis, 0)[[0, -1]])


def test_a_case_without_nodules_has_no_file_of_them(cohort):
    stale = cohort.cases / "case4" / "nodules.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    table = cohort.prepare(shard=4, shards=5)
    assert table.loc["case4", ["status", "n_nodules"]].tolist() == ["ok", 0]
    assert not stale.exists()
    qc = json.loads((cohort.cases / "case4" / "case.json").read_text())["qc"]
    assert (qc["nodules"], qc["nodule_share_in_or_touching_lungs"]) == ([], None)
    cohort.prepare(shard=4, shards=5)
    assert cohort.loads == []


def test_a_case_that_cannot_be_used_keeps_its_row(cohort):
    (cohort.cases / "case1").mkdir(parents=True)
    for name in ("ct.nii.gz", "nodules.nii.gz"):
        (cohort.cases / "case1" / name).write_text("stale")
    table = cohort.prepare(shard=1, shards=2)
    assert table["status"].tolist() == ["excluded", "excluded"]
    assert table.loc["case1", "reason"] == "case1.bin: misses slice 7. Download it again."
    assert table.loc["case3", "reason"] == "no XML"
    assert list((cohort.cases / "case1").iterdir()) == []


def test_only_what_has_changed_is_done_again(cohort):
    first = cohort.prepare(shard=0, shards=2)
    assert cohort.prepare(shard=0, shards=2).equals(first)
    assert cohort.loads == []

    (cohort.cases / "case0" / "nodules.nii.gz").unlink()
    (cohort.cases / "case2" / "layout.nii.gz").write_bytes(b"damaged")
    (cohort.source / "case4.bin").write_text("changed")
    again = cohort.prepare(shard=0, shards=2)
    assert cohort.loads == ["case0", "case2", "case4"]
    assert again.equals(first)

    (cohort.cases / "case2" / "nodules.nii.gz").write_bytes(b"damaged")
    (cohort.cases / "case4" / "case.json").write_text("{")
    cohort.prepare(shard=0, shards=2)
    assert cohort.loads == ["case2", "case4"]

    cohort.prepare(Config(grid=Grid(size=(32, 32, 32))), shard=4, shards=5)
    assert cohort.loads == ["case4"]


def test_a_series_that_has_got_more_slices_is_read_again(cohort):
    """Its row shows it, although the files that were read are unchanged."""
    cohort.prepare(shard=0, shards=5)
    index = read_index(cohort.root / "index.tsv")
    index.loc[index["case_id"] == "case0", "size_z"] = 2
    write_index(cohort.root / "index.tsv", index.to_dict("records"))
    assert cohort.prepare(shard=0, shards=5).loc["case0", "size_z"] == 2
    assert cohort.loads == ["case0"]
    cohort.prepare(shard=0, shards=5)
    assert cohort.loads == []


def test_a_shard_without_cases_writes_an_empty_table(cohort):
    assert cohort.prepare(shard=8, shards=9).empty


def test_scans_of_an_external_test_set_are_read_from_its_folder(cohort, tmp_path):
    index = read_index(tmp_path / "index.tsv").iloc[[0, 2]].assign(data_set=["internal", "ours"])
    write_index(tmp_path / "index.tsv", index.to_dict("records"))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/case2.bin").write_text("another scan")
    config = parse_config({"external_tests": {"ours": {"kind": "lidc", "path": "x"}}})
    paths = tmp_path / "index.tsv", cohort.source, cohort.cases, 0, 1, cohort.cases / "t.tsv"
    run_prepare(config, *paths, external={"ours": tmp_path / "ours"})
    own, other = (json.loads((cohort.cases / name / "case.json").read_text()) for name in ("case0", "case2"))
    assert read_cases(cohort.cases / "t.tsv")["data_set"].tolist() == ["internal", "ours"]
    assert (own["inputs"], other["inputs"]) == (["case0.bin"], ["case2.bin"])
    cohort.loads.clear()
    run_prepare(config, *paths, external={"ours": tmp_path / "ours"})
    assert cohort.loads == []
    (tmp_path / "ours/case2.bin").write_text("changed")
    run_prepare(config, *paths, external={"ours": tmp_path / "ours"})
    assert cohort.loads == ["case2"]
    with pytest.raises(InputError, match=r"'ours', whose folder is not known.*index' again"):
        run_prepare(config, *paths)
    with pytest.raises(InputError, match=r"is not a folder. Set external_tests\.ours\.path"):
        run_prepare(config, *paths, external={"ours": tmp_path / "gone"})


def test_a_missing_source_is_reported(cohort, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        run_prepare(Config(), tmp_path / "index.tsv", tmp_path / "gone", tmp_path, 0, 1, tmp_path / "t.tsv")
