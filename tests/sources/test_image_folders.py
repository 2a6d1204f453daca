"""Folders of nnU-Net and of the Medical Segmentation Decathlon, as they are: pairs, channels, names of labels."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK
from pydantic import ValidationError

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Config
from lungddpm.core.errors import ConfigError, ExcludedCaseError, InputError
from lungddpm.core.labels import Label
from lungddpm.layouts.compose import build_case
from lungddpm.sources import images
from lungddpm.sources.images import Settings
from lungddpm.sources.index import index_source
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom

SHAPE = (8, 7, 6)
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
CT = np.random.default_rng(2).integers(-1000, 2000, SHAPE).astype(np.int16)
TUMOUR = (np.indices(SHAPE)[0] > 5).astype(np.uint8)
V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "cancer"}, "numTraining": 1}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)


def write(top, *names, images="imagesTr", labels=True, stored=TUMOUR):
    """Images of these names, and labels under the name of the case."""
    for name in names:
        save(top / images / f"{name}.nii.gz", CT)
        if labels:
            case = name[:-5] if name[-5:-1] == "_000" else name
            save(top / images.replace("images", "labels") / f"{case}.nii.gz", stored)
    return top


def describe(top, dataset):
    top.mkdir(parents=True, exist_ok=True)
    (top / "dataset.json").write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    return top


def rows_of(top, **settings):
    return index_source("images", top, reading=(Settings(**settings),))


def load(top, **settings):
    return images.load_scan(top, rows_of(top, **settings)[0], Settings(**settings))


@pytest.mark.parametrize("dataset", [V2, V1], ids=["nnU-Net 2", "Decathlon and nnU-Net 1"])
@pytest.mark.parametrize("name", ["lung_001", "lung_001_0000"])
def test_a_folder_is_read_as_it_is(tmp_path, dataset, name):
    describe(write(tmp_path, name), dataset)
    (row,) = rows_of(tmp_path)
    assert (row["case_id"], row["patient_id"], row["status"]) == ("lung_001", "lung_001", "ok")
    scan = load(tmp_path)
    np.testing.assert_array_equal(scan.ct.array, CT)
    np.testing.assert_array_equal(scan.labels, np.where(TUMOUR, 2, 0))
    assert [file.name for file in scan.files] == [f"{name}.nii.gz", "lung_001.nii.gz", "dataset.json"]


NAMES = {
    "understood": (
        {"background": 0, "Left_Lung": 1, "right-lung": 2, "Tumor": 3, "lesion": 4, "cancer": 5, "nodule": 6}, {},
        [0, 1, 1, 2, 2, 2, 2],
    ),
    "nodules of the lung": (
        {"background": 0, "Lung_Tumor": 1, "pulmonary nodules": 2, "lung-lesion": 3, "lung vessels": 4}, {},
        [0, 2, 2, 2, 3],
    ),
    "the lungs' vessels": ({"0": "background", "1": "lungs", "2": "tumours", "3": "vessels"}, {}, [0, 1, 2, 3]),
    "by number": ({"background": 0, "heart": 1, "tumour": 2}, {1: "background"}, [0, 0, 2]),
    "by name": ({"background": 0, "heart": 1, "GTV-1": 2}, {"heart": "background", "gtv 1": "nodule"}, [0, 0, 2]),
    "against its name": ({"background": 0, "lung": 1, "lesion": 2}, {"lesion": "lung"}, [0, 1, 1]),
    "regions, by number": (
        {"background": 0, "all": [1, 2], "core": [2]}, {1: "lung", 2: "nodule"}, [0, 1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_what_labels_mean(tmp_path, case):
    named, labels, expected = NAMES[case]
    stored = (np.arange(np.prod(SHAPE)) % len(expected)).astype(np.uint8).reshape(SHAPE)
    describe(write(tmp_path, "a", stored=stored), {"labels": named})
    np.testing.assert_array_equal(load(tmp_path, labels=labels).labels, np.array(expected)[stored])


@pytest.mark.parametrize("layout", ["images", "imagesTr"])
def test_numbers_without_a_dataset_json(tmp_path, layout):
    write(tmp_path, "a", images=layout, stored=TUMOUR * 117)
    scan = load(tmp_path, labels={"117": "nodule"})
    np.testing.assert_array_equal(scan.labels, np.where(TUMOUR, 2, 0))
    with pytest.raises(ExcludedCaseError, match="labels contain 117, allowed are 0 background, 1 nodule"):
        load(tmp_path, labels={1: "nodule"})


# dataset.json (None: there is none), the setting, and the reason.
BROKEN = {
    "no JSON": ("{labels: ", {}, "dataset.json: cannot be read as JSON"),
    "a list": ([1], {}, "dataset.json: is not a JSON object"),
    "no labels": ({"name": "Lung"}, {}, "dataset.json: has no labels"),
    "empty labels": ({"labels": {}}, {}, "dataset.json: has no labels"),
    "labels as a list": ({"labels": ["background", "tumour"]}, {}, "dataset.json: has no labels"),
    "no numbers": ({"labels": {"background": "tumour"}}, {}, "one number and one name ('background': 'tumour')"),
    "yes and no": ({"labels": {"background": False, "tumour": True}}, {}, "one number and one name"),
    "regions": ({"labels": {"background": 0, "lesion": [1, 2]}}, {}, "one number and one name ('lesion': [1, 2])"),
    "a number twice": ({"labels": {"background": 0, "lesion": 1, "lung": 1}}, {}, "one number and one name ('lung'"),
    "a key twice": ('{"labels": {"lung": 1, "lung": 2}}', {}, "has the key 'lung' twice"),
    "larger than a byte": ({"labels": {"tumour": 256}}, {}, "one number and one name"),
    "unknown labels": (
        {"labels": {"background": 0, "heart": 1, "tumour": 2}}, {},
        "names unknown labels (1 'heart'). Define them in source.images.labels, e.g. {1: background}",
    ),
    "perhaps a nodule": (
        {"labels": {"background": 0, "nodule_solid": 1}}, {},
        "names unknown labels (1 'nodule_solid'). Define them in source.images.labels, e.g. {1: nodule}",
    ),
    "ignored voxels": ({"labels": {"background": 0, "tumour": 1, "ignore": 2}}, {}, "unknown labels (2 'ignore')"),
    "missing": (None, {}, "has no dataset.json to define the labels"),
    "wrong name": (V2, {"tumr": "nodule"}, "labels: has the name 'tumr', which is not in dataset.json. It has "
                   "0 background, 1 tumour"),
    "the name of a region": (
        {"labels": {"background": 0, "all": [1, 2]}}, {"all": "nodule"}, "has the name 'all', which is not in",
    ),
    "wrong number": (V2, {2: "nodule"}, "source.images.labels: has the number 2, which is not in dataset.json. It has "
                     "0 background, 1 tumour"),
    "wrong number beside regions": (
        {"labels": {"background": 0, "all": [1, 2], "core": [2]}}, {1: "lung", 2: "nodule", 3: "vessel"},
        "has the number 3, which is not in dataset.json. It has 0 background, 1 all, 2 all, 2 core",
    ),
    "0 as a nodule": (V2, {0: "nodule"}, "source.images.labels: makes 0 nodule, but 0 is background"),
    "background as a nodule": (V1, {"background": "nodule"}, "source.images.labels: makes 0 nodule"),
    "0 without dataset.json": (None, {0: "lung", 1: "nodule"}, "source.images.labels: makes 0 lung"),
    "a name without dataset.json": (None, {"tumour": "nodule"}, "has the name 'tumour', but there is no dataset.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_dataset_json_that_says_too_little_ends_the_run(tmp_path, case):
    dataset, labels, reason = BROKEN[case]
    write(tmp_path, "a")
    if dataset is not None:
        describe(tmp_path, dataset)
    with pytest.raises((InputError, ConfigError)) as caught:
        rows_of(tmp_path, labels=labels)
    assert reason in str(caught.value)


@pytest.mark.parametrize("labels", [{1: "heart"}, {256: "lung"}, {"": "lung"}, ["lung"]])
def test_settings_of_labels_that_mean_nothing(labels):
    with pytest.raises(ValidationError):
        Settings(labels=labels)


def test_a_label_that_nothing_explains_excludes_its_case_only(tmp_path):
    describe(write(tmp_path, "a"), V2)
    write(tmp_path, "b", stored=TUMOUR * 4)
    good, bad = rows_of(tmp_path)
    assert images.load_scan(tmp_path, good).labels.max() == Label.NODULE
    with pytest.raises(
        ExcludedCaseError, match=r"labelsTr/b.nii.gz: the labels contain 4, allowed are 0 background, 1 nod"
    ):
        images.load_scan(tmp_path, bad)


def test_pairs_that_miss_one_have_a_row_with_the_reason(tmp_path):
    describe(write(tmp_path, "a_0000", "b_0000", "c_0000"), V2)
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    (tmp_path / "imagesTr" / "c_0000.nii.gz").unlink()
    reasons = {row["case_id"]: row["reason"] for row in rows_of(tmp_path)}
    assert reasons["a"] == ""
    assert reasons["b"].startswith("imagesTr/b_0000.nii.gz: has no label labelsTr/b.nii.gz")
    assert reasons["c"].startswith("labelsTr/c.nii.gz: has no image of its name in imagesTr/")


def test_images_of_a_test_set_without_labels_are_not_cases(tmp_path, caplog):
    caplog.set_level("INFO")
    describe(write(tmp_path, "a_0000"), V2)
    write(tmp_path, "t1_0000", "t2_0000", images="imagesTs", labels=False)
    assert [row["case_id"] for row in rows_of(tmp_path)] == ["a"]
    assert "imagesTs: 2 images without labels are not cases" in caplog.messages
    write(tmp_path, "t1_0000", images="imagesTs")
    assert [row["path"] for row in rows_of(tmp_path)] == ["imagesTr/a_0000.nii.gz", "imagesTs/t1_0000.nii.gz"]


def test_several_channels_are_refused(tmp_path):
    describe(write(tmp_path, "a_0000", "a_0001", "b_0000", "c_0001"), V2)
    write(tmp_path, "d_0000", "d_0001", labels=False)
    rows = {row["case_id"]: row for row in rows_of(tmp_path)}
    assert set(rows) == {"a", "b", "c", "d"}
    assert rows["a"]["path"] == "imagesTr/a_0000.nii.gz"
    assert "has further channels (a_0001.nii.gz), but a CT has one" in rows["a"]["reason"]
    assert rows["b"]["status"] == "ok"
    assert rows["c"]["reason"].startswith("imagesTr/c_0001.nii.gz: is not channel 0000, which should be the CT")
    assert "has no label labelsTr/d.nii.gz" in rows["d"]["reason"]


@pytest.mark.parametrize("second", ["a.nii", "a.nrrd", "a_0000.nii.gz"])
def test_an_image_with_two_labels_is_excluded_because_either_may_be_the_truth(tmp_path, second):
    describe(write(tmp_path, "a_0000", "b_0000"), V2)
    path = tmp_path / "labelsTr" / second
    if path.suffix == ".nrrd":
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TUMOUR.T), str(path))
    else:
        save(path, np.zeros_like(TUMOUR))
    rows = {row["case_id"]: row for row in rows_of(tmp_path)}
    assert {name: row["status"] for name, row in rows.items()} == {"a": "excluded", "b": "ok"}
    assert "imagesTr/a_0000.nii.gz: has several labels (" in rows["a"]["reason"]
    assert second in rows["a"]["reason"]


def test_names_that_end_in_four_digits_are_not_channels(tmp_path):
    for number in ("0007", "0008"):
        save(tmp_path / "images" / f"scan_{number}.nii.gz", CT)
        save(tmp_path / "labels" / f"scan_{number}.nii.gz", TUMOUR)
    rows = rows_of(tmp_path)
    assert [(row["case_id"], row["status"]) for row in rows] == [("scan_0007", "ok"), ("scan_0008", "ok")]


def test_what_the_system_leaves_in_archives_is_not_an_image(tmp_path):
    describe(write(tmp_path, "a"), V1)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder / "._a.nii.gz").write_bytes(b"Mac OS X")
        (tmp_path / folder / "notes.txt").write_text("done")
    assert [row["status"] for row in rows_of(tmp_path)] == ["ok"]


def test_folders_without_images_say_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"has no images in images/ or imagesTr/ \(.nii.gz, .nii, .seg.nrrd, .nrrd,"):
        rows_of(tmp_path)
    write(tmp_path, "a", images="imagesTs", labels=False)
    with pytest.raises(InputError, match=r"has 1 images in imagesTs/, but none with labels"):
        rows_of(tmp_path)
    write(tmp_path / "raw" / "Dataset006_Lung", "a")
    with pytest.raises(InputError, match=r"Set source.path to a folder inside it, such as Dataset006_Lung"):
        rows_of(tmp_path / "raw")


def test_lungs_and_vessels_are_segmented_where_labels_have_none(tmp_path):
    """A phantom with its tumours alone in the labels, as the Decathlon has it, against the truth of the phantom."""
    patient = thorax(Phantom(matrix=80, pixel_mm=4.4, slice_mm=6, nodules=(2, 2), nodule_diameter_mm=(20, 30)), 2)
    tumours = np.zeros(patient.ct.shape, np.uint8)
    for nodule in patient.nodules:
        tumours[nodule.mask] = 1
    for folder, array in (("imagesTr", patient.ct.array), ("labelsTr", tumours)):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, patient.ct.affine), tmp_path / folder / "lung_001.nii.gz")
    describe(tmp_path, V1)
    scan = load(tmp_path)
    truth = patient.ct.like(patient.lungs.astype(np.uint8)).canonical().array > 0
    case = build_case(scan, Config(grid={"size": [32, 32, 32]}))
    found = case.found.lungs_lr > 0
    dice = 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth))
    assert dice > 0.95
    assert case.found.vessels.any()
    assert case.qc["n_nodules"] == 2
    assert (case.layout.array == Label.NODULE).any()


def test_the_settings_are_keys_of_the_config():
    values = {"source": {"kind": "images", "path": ".", "images": {"labels": {1: "nodule", "lung": "lung"}}}}
    config = parse_config(values)
    assert config.source.reading() == (Settings(labels={"1": "nodule", "lung": "lung"}),)
    assert parse_config(json.loads(config.differences())) == config
    assert parse_config({}).source.reading() == ()
    with pytest.raises(ConfigError, match=r"source.images.labels.1"):
        parse_config({"source": {"kind": "images", "path": ".", "images": {"labels": {1: "tumour"}}}})


def test_a_dataset_json_may_begin_with_a_byte_order_mark(tmp_path):
    describe(write(tmp_path, "a"), V2)
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(tmp_path).labels.max() == Label.NODULE
