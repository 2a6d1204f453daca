"""External test sets in the index: who is in them, what they change, and what is refused."""

import logging

import numpy as np
import pytest
import yaml
from lidc_files import nodule, roi, write_series, xml
from typer.testing import CliRunner

from lungddpm.arms.splits import assign_roles
from lungddpm.cli import app
from lungddpm.config.loading import load_config, parse_config
from lungddpm.config.models import Roles
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import ConfigError, InputError, UserError
from lungddpm.core.volume import Volume, write_volume
from lungddpm.layouts import compose
from lungddpm.sources import source_of
from lungddpm.sources.index import index_source, join_data_sets, read_index, write_index

CT = Volume(np.random.default_rng(2).integers(-1000, 1000, (8, 7, 6)).astype(np.int16), np.diag([0.7, 0.8, 2.5, 1]))
LABELS = CT.like(np.ones(CT.shape, np.uint8))


def write_images(top, names, images="images", labels="labels"):
    for name in names:
        write_volume(top / images / f"{name}.nii.gz", CT)
        write_volume(top / labels / f"{name}.nii.gz", LABELS)
    return top


@pytest.fixture
def indexed(tmp_path):
    """A function that writes image files of these names and gives their index."""

    def index(*names):
        return index_source("images", write_images(tmp_path / "-".join(names), names))

    return index


def who(rows):
    return [(row["case_id"], row["patient_id"], row["data_set"]) for row in rows]


def test_the_cases_of_an_external_test_set_are_named_after_it(indexed):
    joined = join_data_sets(indexed("a", "b"), {"task06": indexed("c"), "Ours": indexed("d")})
    assert who(joined) == [
        ("a", "a", "internal"), ("b", "b", "internal"), ("task06-c", "c", "task06"), ("Ours-d", "d", "Ours"),
    ]  # fmt: skip


def test_names_that_come_out_the_same_are_distinguished(indexed):
    joined = join_data_sets(indexed("x-a", "b"), {"x": indexed("a"), "X": indexed("A")}, {"X"})
    assert [row["case_id"] for row in joined] == ["b", "x-a", "x-a_2", "X-A_3"]


def test_a_patient_of_two_data_sets_is_refused_until_the_user_says_who_it_is(indexed):
    own, other = indexed("001", "002", "003"), indexed("002", "003", "004")
    with pytest.raises(
        InputError, match="external_tests.task06: shares patient ids with the data set 'internal': 002, 003"
    ):
        join_data_sets(own, {"task06": other})
    joined = join_data_sets(own, {"task06": other}, {"task06"})
    assert [row["patient_id"] for row in joined] == ["001", "002", "003", "task06:002", "task06:003", "task06:004"]
    with pytest.raises(InputError, match="distinct_patients: true"):
        join_data_sets(indexed("a"), {"one": indexed("b"), "two": indexed("b", "c")})


def test_a_patient_of_two_data_sets_is_found_in_another_spelling(indexed):
    with pytest.raises(InputError, match="external_tests.task06: shares patient ids with the data set 'internal': p1"):
        join_data_sets(indexed("P1"), {"task06": indexed("p1")})


def test_a_series_of_two_data_sets_is_one_scan_whatever_the_user_says(indexed):
    (own,), (other,) = indexed("a"), indexed("b")
    own, other = own | {"series_uid": "1.2.3"}, other | {"series_uid": "1.2.3"}
    with pytest.raises(InputError, match="shares series with the data set 'internal': 1.2.3. It is the same scan"):
        join_data_sets([own], {"task06": [other]}, {"task06"})


def test_a_series_named_without_its_images_is_not_a_scan_of_either_data_set(tmp_path):
    """LIDC-IDRI split over two folders, each beside the XML of the whole collection."""
    uids = {"own": ("P-01", "1.2.3"), "clinic": ("P-02", "1.2.4")}
    for name, (patient, series) in uids.items():
        write_series(tmp_path / name / patient, patient=patient, series=series)
        for _, uid in uids.values():
            file = tmp_path / name / "tcia-lidc-xml" / f"{uid}.xml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(xml(nodule(roi(1, series=uid)), series=uid))
    own, clinic = (index_source("lidc", tmp_path / name) for name in uids)
    joined = join_data_sets(own, {"clinic": clinic})
    assert [(row["data_set"], row["series_uid"]) for row in joined if row["status"] == "ok"] == [
        ("internal", "1.2.3"), ("clinic", "1.2.4"),
    ]  # fmt: skip
    assert [row["series_uid"] for row in joined if row["status"] == "excluded"] == ["1.2.4", "1.2.3"]


def test_external_patients_are_tested_and_change_nobody_elses_role(indexed, caplog):
    own, roles = indexed(*"abcdefghij"), Roles()
    (unusable,) = indexed("l")
    externals = [*indexed("k", "m"), unusable | {"status": "excluded", "reason": "is broken"}]
    alone, joined = (assign_roles(rows, roles, 1) for rows in (own, join_data_sets(own, {"task06": externals})))
    caplog.set_level(logging.INFO, "lungddpm")
    assert joined[: len(own)] == alone
    assert [(row["role"], row["reason"]) for row in joined[len(own) :]] == [
        ("test", ""), ("test", ""), ("", "is broken"),
    ]  # fmt: skip
    # Not even those who are needed: roles are drawn from `source` alone.
    with pytest.raises(Exception, match="roles.test: needs 9 patients, but only 1 are left"):
        assign_roles(join_data_sets(own, {"task06": externals}), Roles(discovery=8, reference=1, test=9), 1)


def write_config(folder, **tests):
    values = {"source": {"kind": "images", "path": str(folder / "own")}, "external_tests": tests}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def test_each_data_set_is_read_by_its_own_settings_from_its_own_folder(tmp_path, monkeypatch, caplog):
    # What the clinic calls its label is known from its own settings alone: without them, the run ends.
    write_images(tmp_path / "own", "abcdefgh")
    write_images(tmp_path / "Task06_Lung", ["lung_001"], "imagesTr", "labelsTr")
    (tmp_path / "Task06_Lung/dataset.json").write_text('{"labels": {"0": "background", "1": "cancer"}}')
    write_images(tmp_path / "clinic", ["x"], "imagesTr", "labelsTr")
    (tmp_path / "clinic/dataset.json").write_text('{"labels": {"background": 0, "GTV": 1}}')
    monkeypatch.chdir(tmp_path)
    task06, clinic = {"kind": "images", "path": "Task06_Lung"}, {"kind": "images", "path": "nowhere"}
    arguments = ["index", "--external-test", "clinic=clinic", "--output", "index.tsv"]
    write_config(tmp_path, task06=task06, clinic=clinic)
    assert "GTV" in str(CliRunner().invoke(app, arguments).exception)
    write_config(tmp_path, task06=task06, clinic=clinic | {"images": {"labels": {"GTV": "nodule"}}})
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.exception
    index = read_index(tmp_path / "index.tsv").set_index("case_id")
    assert index.index[:8].tolist() == [*"abcdefgh"]
    assert (index["data_set"] == "internal").sum() == 8
    assert index.loc["task06-lung_001", ["data_set", "role"]].tolist() == ["task06", "test"]
    assert index.loc["clinic-x", ["data_set", "role"]].tolist() == ["clinic", "test"]
    caches = {path.name for path in tmp_path.glob("*.json")}
    assert caches == {"index.cache.json", "index.task06.cache.json", "index.clinic.cache.json"}


@pytest.mark.parametrize("given", ["clinic", "clinic=", "other=/data"])
def test_an_option_that_names_no_external_test_set(tmp_path, monkeypatch, given):
    write_images(tmp_path / "own", "abcdefgh")
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, clinic={"kind": "images", "path": "clinic"})
    run = CliRunner().invoke(app, ["index", "--external-test", given])
    assert "is not NAME=FOLDER of an external test set. Names are clinic" in str(run.exception)


def test_a_missing_folder_is_named_by_its_key(tmp_path, monkeypatch):
    write_images(tmp_path / "own", "abcdefgh")
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, clinic={"kind": "images", "path": "nowhere"})
    run = CliRunner().invoke(app, ["index"])
    assert "nowhere: is not a folder. Set external_tests.clinic.path" in str(run.exception)


@pytest.mark.parametrize("key", ["source", "external_tests"])
def test_a_list_of_data_sets_is_pointed_to_the_mapping_of_external_tests(key):
    with pytest.raises(
        ConfigError,
        match=rf"{key}: must be a mapping, not a list. .*external_tests: {{clinic: {{kind: images, path: DIR}}}}",
    ):
        parse_config({"source": {"kind": "images", "path": "x"}, key: [{"kind": "images", "path": "y"}]})


# What is wrong with a data set, its settings, and the key that the message names, after that of the data set.
KEYS = {
    "labels": ("images", {}, '{"labels": {"background": 0, "GTV": 1}}', "images.labels, e.g. {1: nodule}"),
    "label names": ("images", {"labels": {"x": "lung"}}, '{"labels": {"tumour": 1}}', "images.labels: has the name"),
    "no dataset.json": ("images", {}, None, "images.labels: {1: nodule}"),
    "table": ("images", {"patient_table": "p.tsv"}, '{"labels": {"tumour": 1}}', "images.patient_table is looked up"),
    "pattern": ("images", {"patient_pattern": "(Q)"}, '{"labels": {"tumour": 1}}', "images.patient_pattern"),
    "table of LUNA16": ("luna16", {"patient_table": "p.tsv"}, None, "luna16.patient_table is looked up"),
    "spheres of LUNA16": ("luna16", {"nodules": "spheres"}, None, "luna16.nodules: readers"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["source", "external_tests.clinic"])
@pytest.mark.parametrize("case", KEYS)
def test_messages_name_the_keys_of_their_data_set(tmp_path, case, key):
    kind, settings, dataset, named = KEYS[case]
    write_images(tmp_path, ["source.x"], "imagesTr", "labelsTr")
    if dataset:
        (tmp_path / "dataset.json").write_text(dataset)
    section = source_of(kind).settings(**settings)
    try:
        said = index_source(kind, tmp_path, reading=(section,), key=key)[0]["reason"]
    except UserError as error:
        said = str(error)
    assert f"{key}.{named}" in said
    assert ("source." in said.replace("source.x", "")) == (key == "source")


def test_a_folder_inside_is_set_by_the_key_of_the_data_set(tmp_path):
    write_images(tmp_path / "inside", ["a"])
    with pytest.raises(InputError, match=r"Set external_tests.clinic.path to a folder inside it, such as inside"):
        index_source("images", tmp_path, key="external_tests.clinic")


def test_a_case_that_cannot_be_read_is_excluded_with_the_key_of_its_data_set(tmp_path):
    stored = CT.like(np.full(CT.shape, 9, np.uint8))
    for name in ("own", "clinic"):
        write_images(tmp_path / name, [name])
        write_volume(tmp_path / name / "labels" / f"{name}.nii.gz", stored)
    config = load_config(write_config(tmp_path, clinic={"kind": "images", "path": str(tmp_path / "clinic")}))
    own, clinic = (index_source("images", tmp_path / name) for name in ("own", "clinic"))
    index = join_data_sets(own, {"clinic": clinic})
    write_index(tmp_path / "index.tsv", [{**row, "role": "test"} for row in index])
    external = {"clinic": tmp_path / "clinic"}
    out, table = tmp_path / "out", tmp_path / "cases.tsv"
    compose.run_prepare(config, tmp_path / "index.tsv", tmp_path / "own", out, 0, 1, table, external)
    reasons = read_cases(tmp_path / "cases.tsv").set_index("data_set")["reason"]
    assert "define the label in source.images.labels" in reasons["internal"]
    assert "define the label in external_tests.clinic.images.labels" in reasons["clinic"]


def test_folders_of_external_test_sets_are_kept_out_of_results(tmp_path):
    tests = {"clinic": {"kind": "images", "path": "/home/jane/clinic"}}
    shown = load_config(write_config(tmp_path, **tests)).without_folders()
    assert "jane" not in shown.differences()
    assert shown.external_tests["clinic"].path.name == "clinic"
