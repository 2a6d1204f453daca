"""Bad scans beside a good one: `index` and `prepare` exclude them with the reason, write nowhere else, and continue."""

import io
import os
import shutil

import numpy as np
import pytest
from lidc_files import (
    COLUMNS,
    ROWS,
    SLICES,
    STORED,
    find,
    load,
    nodule,
    only,
    roi,
    write_case,
    write_series,
    write_slice,
    xml,
)  # fmt: skip
from pydicom import dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000MC,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from lungddpm.arms.splits import read_register
from lungddpm.config.models import Config
from lungddpm.core.cases import excluded_alike, read_cases
from lungddpm.core.errors import InputError
from lungddpm.layouts.collect import run_collect
from lungddpm.layouts.compose import run_prepare
from lungddpm.sources.index import case_ids, index_source, write_index

THIRD = "000088.dcm"


def rewrite(file, **changes):
    """Change elements of a DICOM file; None deletes one."""
    dataset = dcmread(file)
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.save_as(file)


def truncate(file, share):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def compress_unreadably(folder):
    for file in folder.glob("*.dcm"):
        dataset = dcmread(file)
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" * 9])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG2000MC
        dataset.save_as(file)


def spoil_padding(folder):
    dataset = dcmread(folder / THIRD)
    dataset.add_new("PixelPaddingValue", "US", [1, 2])
    dataset.save_as(folder / THIRD)


def add_slice_of_its_position(folder):
    shutil.copy(folder / THIRD, folder / "copy.dcm")
    rewrite(folder / "copy.dcm", PixelData=bytes(2 * ROWS * COLUMNS))


def mix_in_a_broken_series(folder):
    write_series(folder / "new", slices=[0, 1, 3], series="8.8", patient="P-mixed")
    for file in (folder / "new").iterdir():
        file.rename(folder / f"other-{file.name}")
    (folder / "new").rmdir()


def with_reads(text):
    return lambda folder: (folder / "reads.xml").write_text(text.replace("{series}", folder.name))


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><LidcReadMessage>&i;</LidcReadMessage>"
)
ATTRIBUTES = f'<!DOCTYPE a [<!ATTLIST a b CDATA "{"x" * 10**6}">]><a>' + "<a/>" * 10**5 + "</a>"

# What happens to a case, the options it is written with, and the reason in the index or, after "prepare:", in the case
# table.
ERRORS = {
    "zero bytes": (lambda f: (f / THIRD).write_bytes(b""), {}, f"{THIRD}: is empty or not a DICOM file"),
    "truncated": (lambda f: truncate(f / THIRD, 0.9), {}, f"{THIRD}: is truncated"),
    "cut in the header": (lambda f: truncate(f / THIRD, 0.4), {}, f"{THIRD}: "),
    "truncated, implicit": (
        lambda f: truncate(f / THIRD, 0.9), {"syntax": ImplicitVRLittleEndian}, f"{THIRD}: is truncated",
    ),
    "truncated, compressed": (
        lambda f: truncate(f / THIRD, 0.9), {"syntax": RLELossless}, f"prepare:{THIRD}: pixels cannot be decoded",
    ),
    "missing slice": (lambda f: (f / THIRD).unlink(), {}, "1 slice(s) missing between"),
    "doubled slice": (add_slice_of_its_position, {}, "are different slices at the same position"),
    "wrong modality": (lambda f: None, {"Modality": "MR"}, "is not CT (modality MR)"),
    "one slice of another modality": (lambda f: rewrite(f / THIRD, Modality="PT"), {}, "is not CT (modality CT, PT)"),
    "no pixel data": (lambda f: rewrite(f / THIRD, PixelData=None), {}, f"{THIRD}: has no pixel data"),
    "no pixel data, implicit": (
        lambda f: rewrite(f / THIRD, PixelData=None), {"syntax": ImplicitVRLittleEndian}, "has no pixel data",
    ),
    "no decoder": (compress_unreadably, {}, "a transfer syntax that cannot be decoded, JPEG 2000 Part 2"),
    "truncated, deflated": (
        lambda f: truncate(f / THIRD, 0.9), {"syntax": DeflatedExplicitVRLittleEndian}, f"{THIRD}: is truncated",
    ),
    "a file of any size": (lambda f: os.truncate(f / THIRD, 2**40), {}, f"{THIRD}: is larger than the 64 MiB"),
    "no series": (lambda f: rewrite(f / THIRD, SeriesInstanceUID=None), {}, "is truncated, or lacks its Series"),
    "no patient": (lambda f: None, {"PatientID": ""}, "do not have one PatientID"),
    "no position": (lambda f: rewrite(f / THIRD, ImagePositionPatient=None), {}, "has no ImagePositionPatient of 3"),
    "absurd position": (
        lambda f: rewrite(f / THIRD, ImagePositionPatient=[0, 0, 1e300]), {}, "has no ImagePositionPatient of 3",
    ),
    "no pixel size": (lambda f: None, {"PixelSpacing": [0, 0]}, "pixels without a size"),
    "no rows": (lambda f: None, {"Rows": 0}, "has no rows"),
    "a matrix larger than memory": (lambda f: None, {"Rows": 65535, "Columns": 65535}, "prepare:cannot be decoded"),
    "no rescale": (lambda f: rewrite(f / THIRD, RescaleSlope=None), {}, "prepare:has no rescale slope"),
    "no rescale value": (lambda f: rewrite(f / THIRD, RescaleSlope=""), {}, "prepare:value is not a number"),
    "odd padding": (spoil_padding, {}, "prepare:padding value is not a number"),
    "no XML": (lambda f: (f / "reads.xml").unlink(), {}, "no reader XML names this series"),
    "invalid XML": (with_reads("reads"), {}, "reads.xml: cannot be read as LIDC XML"),
    "empty XML": (with_reads(""), {}, "reads.xml: cannot be read as LIDC XML"),
    "billion laughs": (with_reads(BOMB), {}, "cannot be read as LIDC XML (ValueError: it has a document type"),
    "default attributes": (with_reads(ATTRIBUTES), {}, "reads.xml: cannot be read as LIDC XML"),
    "huge XML": (with_reads("<a>" + " " * (17 << 20) + "</a>"), {}, "reads.xml: is larger than the 16 MiB"),
    "XML without a series": (with_reads(xml(series="")), {}, "cannot be read as LIDC XML (it names no series)"),
    "XML of another series": (with_reads(xml(series="9.9.9")), {}, "no reader XML names this series"),
    "contour outside": (
        with_reads(xml(nodule(roi(1, [(3, 3), (99, 3)])), series="{series}")), {}, "prepare:outside the 10 x 12",
    ),
    "contour left of the image": (
        with_reads(xml(nodule(roi(1, [(3, 3), (-1, 3)])), series="{series}")), {}, "prepare:outside the 10 x 12",
    ),
    "contour far outside": (
        with_reads(xml(nodule(roi(1, [(3, 3), (10**30, 3)])), series="{series}")), {}, "neither a pixel nor a rating",
    ),
    "contour on no slice": (
        with_reads(xml(nodule(roi(9, z=500)), series="{series}")), {}, "prepare:z 500 mm, where there is no slice",
    ),
    "contour at no z": (
        with_reads(xml(nodule(roi(9, z="nan")), series="{series}")), {}, "prepare:has a contour at z nan mm",
    ),
}  # fmt: skip


def prepare(top, kind, index, results):
    """The case table of all shards, by case id."""
    for row in index:
        row["role"] = "test"
    write_index(results / "index.tsv", index)
    config = Config(grid={"size": [32, 32, 32]})
    run_prepare(config, results / "index.tsv", top, results, 0, 1, results / "cases-0.tsv")
    return read_cases(results / "cases-0.tsv").set_index("case_id")


def everything_below(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*")}


@pytest.mark.filterwarnings("ignore:End of file reached")
def test_each_error_is_reported_and_the_good_case_continues(tmp_path, cohort):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(cohort / "PHANTOM-0001", data / "PHANTOM-0001")
    numbers = {error: f"P-{number:02d}" for number, error in enumerate(ERRORS)}
    for number, (error, (harm, options, _)) in enumerate(ERRORS.items()):
        folder = data / numbers[error] / "a study" / f"1.2.{number}"
        write_series(folder, series=folder.name, **{"patient": numbers[error], **options})
        (folder / "reads.xml").write_text(xml(nodule(roi(1, series=folder.name)), series=folder.name))
        harm(folder)
    index = index_source("lidc", data)
    series_of = {row["path"].split("/")[0]: row for row in index if not row["path"].endswith(".xml")}
    reasons = {number: row["reason"] for number, row in series_of.items()}
    table = prepare(data, "lidc", index, results)
    for error, (_, _, expected) in ERRORS.items():
        reported = table.loc[series_of[numbers[error]]["case_id"], "reason"]
        if expected.startswith("prepare:"):
            assert (reasons[numbers[error]], error) == ("", error)
        else:
            assert reported == reasons[numbers[error]], error
        assert expected.removeprefix("prepare:") in reported, error
        assert str(tmp_path) not in reported, error
    assert table.index[table["status"] == "ok"].tolist() == ["PHANTOM-0001"]
    # Nothing is left of the others.
    folders = {path for path in everything_below(results) if (results / path).is_dir()}
    assert folders == {"PHANTOM-0001"}


def test_two_series_in_one_folder_are_distinguished_when_one_is_damaged(tmp_path):
    folder = write_case(tmp_path)
    mix_in_a_broken_series(folder)
    write_slice(folder / "third.dcm", 1, series="7.7", patient="P-third")
    truncate(folder / "third.dcm", 0.9)
    first, mixed, third = find(tmp_path)
    assert (first.case_id, first.excluded) == ("P-01", "")
    assert "1 slice(s) missing between other-000089.dcm and other-000087.dcm" in mixed.excluded
    assert (third.patient_id, "third.dcm: is truncated" in third.excluded) == ("P-third", True)
    assert load(tmp_path).ct.shape == (COLUMNS, ROWS, SLICES)


def test_files_that_are_not_slices_do_no_harm(tmp_path):
    folder = write_case(tmp_path / "a b" / "c")
    (folder / "dicomdir").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "._reads.xml").write_bytes(b"\0\5\x16\7")
    (folder / "notes.TXT").write_text("x")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.xml")
    shutil.copytree(folder, tmp_path / ".snapshot" / "yesterday", ignore=shutil.ignore_patterns("pipe*"))
    series, pipe = find(tmp_path)
    assert not series.excluded
    assert "pipe.xml: is not a file" in pipe.excluded
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED - 1024)


def strip(file, to, syntax=ImplicitVRLittleEndian, prefix=b"", meta=False):
    """Write a slice again without preamble and meta information, as old exports are."""
    dataset = dcmread(file)
    rows = np.frombuffer(dataset.PixelData, "<i2")
    dataset.PixelData = rows.astype(">i2" if syntax == ExplicitVRBigEndian else "<i2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    bare = io.BytesIO()
    dcmwrite(bare, dataset, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian)
    content = bare.getvalue()
    if not meta:
        at = content.index(b"\x08\x00\x05\x00" if syntax != ExplicitVRBigEndian else b"\x00\x08\x00\x05")
        content = content[at:]
    else:
        content = content[132:]
    file.unlink()
    to.write_bytes(prefix + content)
    assert to.read_bytes()[128:132] != b"DICM"


BARE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]


@pytest.mark.parametrize("name", ["{k}.dcm", "IM{k:04d}", "{k}.IMA", "slice.{k}"])
@pytest.mark.parametrize("syntax", BARE)
def test_slices_without_preamble_are_read(tmp_path, syntax, name):
    folder = write_case(tmp_path, SpecificCharacterSet="ISO_IR 100")
    for k, file in enumerate(sorted(folder.glob("*.dcm"))):
        strip(file, folder / name.format(k=k), syntax)
    assert (only(tmp_path).excluded, only(tmp_path).patient_id) == ("", "P-01")
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED - 1024)


@pytest.mark.parametrize("prefix", [b"", b"DICM", bytes(128), b"meta"])
def test_a_single_slice_without_preamble_or_prefix_is_read(tmp_path, prefix):
    folder = write_case(tmp_path, SpecificCharacterSet="ISO_IR 100")
    if prefix == b"meta":
        strip(folder / THIRD, folder / "IM3", ExplicitVRLittleEndian, meta=True)
    else:
        strip(folder / THIRD, folder / "IM3", ExplicitVRLittleEndian, prefix)
    assert not only(tmp_path).excluded
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED - 1024)


def test_a_file_without_preamble_that_begins_with_another_element(tmp_path):
    folder = write_case(tmp_path)
    for file in folder.glob("*.dcm"):
        dataset = dcmread(file)
        # The first element is ImageType here, not the character set.
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.save_as(file)
        content = file.read_bytes()
        file.with_suffix("").write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])
        file.unlink()
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED - 1024)


def test_a_truncated_slice_without_preamble_is_named(tmp_path):
    folder = write_case(tmp_path, SpecificCharacterSet="ISO_IR 100")
    strip(folder / THIRD, folder / "IM3")
    truncate(folder / "IM3", 0.9)
    assert "IM3: is truncated" in only(tmp_path).excluded


def test_other_files_without_extension_are_not_slices(tmp_path):
    folder = write_case(tmp_path)
    (folder / "README").write_text("slices")
    (folder / "zeros").write_bytes(bytes(4096))
    (folder / "short").write_bytes(b"\x08\x00")
    (folder / "numbers").write_bytes(bytes(range(256)) * 8)
    (folder / "VERSION").write_bytes(b"\x08\x00\x08\x00" + b"\xff" * 40)
    assert not only(tmp_path).excluded


def test_a_link_to_nowhere_is_a_slice_that_cannot_be_read(tmp_path):
    folder = write_case(tmp_path)
    (folder / THIRD).unlink()
    (folder / THIRD).symlink_to(tmp_path / "annex" / "object")
    assert f"{THIRD}: cannot be read (No such file or directory)" in only(tmp_path).excluded


def test_a_folder_that_cannot_be_listed_has_a_row(tmp_path, monkeypatch):
    write_case(tmp_path)
    write_case(tmp_path, "P-02", "1.2.4")
    true = os.scandir

    def scandir(folder):
        if str(folder).endswith("P-02"):
            raise PermissionError(13, "Permission denied", str(folder))
        return true(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    first, second = find(tmp_path)
    assert not first.excluded
    assert (second.case_id, second.patient_id) == ("P-02", "")
    assert second.excluded.startswith("P-02: cannot be listed (Permission denied).")


# ---------------------------------------------------------------- what only XML names


@pytest.fixture
def whole_xml_tree(tmp_path):
    """One patient, and XML of sixty series and five radiographs, as the separate download has it."""
    write_case(tmp_path / "data")
    tree = tmp_path / "data" / "tcia-lidc-xml"
    for number in range(60):
        (tree / str(number % 7)).mkdir(parents=True, exist_ok=True)
        uid = f"1.3.6.1.{number}"
        (tree / str(number % 7) / f"{number}.xml").write_text(xml(nodule(roi(1, series=uid)), series=uid))
    for number in range(5):
        (tree / "0" / f"cxr-{number}.xml").write_text(xml(series=f"1.9.{number}", root="IdriReadMessage"))
    (tree / "0" / "again.xml").write_text(xml(nodule(roi(1, series="1.3.6.1.0")), series="1.3.6.1.0"))
    (tree / "0" / "torn.xml").write_text("<LidcReadMessage>")
    (tree / "0" / "settings.xml").write_text("<settings/>")
    return tmp_path


def test_series_that_only_xml_names_have_rows_and_one_line(whole_xml_tree, caplog):
    caplog.set_level("INFO")
    index = index_source("lidc", whole_xml_tree / "data")
    assert len(index) == len({row["case_id"] for row in index}) == 1 + 60 + 5 + 1
    assert [row["patient_id"] for row in index] == ["P-01"] + [""] * 66
    by_uid = {row["series_uid"]: row for row in index}
    assert by_uid["1.3.6.1.33"]["case_id"] == "1.3.6.1.33"
    assert by_uid["1.3.6.1.33"]["reason"].startswith("tcia-lidc-xml/5/33.xml: names a series whose images are missing")
    assert by_uid["1.3.6.1.0"]["annotations"] == '["tcia-lidc-xml/0/0.xml", "tcia-lidc-xml/0/again.xml"]'
    assert by_uid[""]["case_id"] == "tcia-lidc-xml_0_torn_xml".replace("_xml", ".xml")
    assert by_uid[""]["reason"].startswith("tcia-lidc-xml/0/torn.xml: cannot be read as LIDC XML")
    lines = [record.getMessage() for record in caplog.records]
    assert "1 of 67 series are usable" in lines
    assert sum("excluded" in line for line in lines) == 2
    assert any("and 62 more: excluded for reasons such as: tcia-lidc-xml/0/0.xml: names" in line for line in lines)

    table = prepare(whole_xml_tree / "data", "lidc", index, whole_xml_tree / "results")
    assert table["reason"].iloc[1:].tolist() == [row["reason"] for row in index[1:]]
    assert "" not in read_register(table.reset_index()).by_patient
    caplog.clear()
    with pytest.raises(InputError, match="no usable case is left"):
        run_collect(Config(), [whole_xml_tree / "results/cases-0.tsv"], whole_xml_tree / "results/cases.tsv")
    assert len(caplog.records) <= 4


def test_radiographs_have_rows_with_and_without_images(tmp_path):
    folder = write_case(tmp_path)
    write_slice(tmp_path / "P-01" / "x ray" / "1.dcm", 0, series="5.5", Modality="DX")
    write_slice(tmp_path / "P-01" / "x ray 2" / "1.dcm", 0, series="5.6", Modality="CR")
    (folder / "x.xml").write_text(xml(series="5.5", root="IdriReadMessage"))
    series = find(tmp_path)
    assert [one.case_id for one in series] == ["P-01", "P-01_2", "P-01_3"]
    assert [one.excluded.partition(": ")[2] for one in series] == [
        "",
        "is a chest radiograph (modality DX). Leave it out.",
        "is a chest radiograph (modality CR). Leave it out.",
    ]


def test_published_radiograph_reads_name_the_radiograph(shared_data, tmp_path):
    write_case(tmp_path)
    shutil.copy(shared_data / "lidc-xml" / "185-068.xml", tmp_path)
    _, radiograph = find(tmp_path)
    assert radiograph.series_uid == "1.3.6.1.4.1.14519.5.2.1.6279.6001.141365756818074696859567662357"
    assert "185-068.xml: names a series whose images are missing" in radiograph.excluded


def test_reasons_of_one_kind_are_reported_together():
    reasons = {
        "a": "x/1: 1 slice(s) missing between 000089.dcm and 000087.dcm. Download",
        "b": "y/2: 3 slice(s) missing between 000012.dcm and 000016.dcm. Download",
        "c": "scan: no lungs were found. Look",
        "d": "plain",
    }
    rows = [{"case_id": name, "status": "excluded", "reason": reason} for name, reason in reasons.items()]
    alike = excluded_alike([*rows, {"case_id": "e", "status": "ok", "reason": ""}])
    assert [[row["case_id"] for row in group] for group in alike] == [["a", "b"], ["c"], ["d"]]


# ---------------------------------------------------------------- names

PATIENTS = [
    "../../etc", "/etc/passwd", "..", "a\nb", "a b", "a/b", "A:B", ".hidden", "cases.tsv", "index.cache.json", "x" * 64,
]  # fmt: skip


def test_patient_ids_lead_nowhere_else_and_stay_apart(tmp_path):
    data, results = tmp_path / "deep" / "data", tmp_path / "deep" / "results"
    for number, patient in enumerate(PATIENTS):
        write_case(data / str(number), "P", f"1.2.{number}", PatientID=patient, RescaleSlope="")
    before = everything_below(tmp_path)
    index = index_source("lidc", data)
    assert sorted(row["patient_id"] for row in index) == sorted(PATIENTS)
    assert len({row["case_id"].casefold() for row in index}) == len(PATIENTS)
    assert all(row["case_id"] not in ("cases.tsv", "index.cache.json") for row in index)
    table = prepare(data, "lidc", index, results)
    assert sorted(table["patient_id"]) == sorted(PATIENTS)
    assert table["reason"].str.contains("rescale or padding").all()
    made = everything_below(tmp_path) - before
    assert all(path.startswith("deep/results") for path in made)
    assert not (tmp_path.parent / "etc").exists()


def test_case_ids_are_short_and_quick_for_many_equal_names():
    ids = case_ids(["P"] * 5000 + ["p_7", "y" * 10000, "y" * 10000, "z.TSV"])
    assert len({name.casefold() for name in ids}) == len(ids)
    assert ids[:2] == ["P", "P_2"]
    assert max(map(len, ids)) < 80
    assert ids[-1] == "z_TSV"
