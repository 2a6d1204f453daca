"""Folders of other systems: what is accepted, and every known way to break the contract."""

import json

import numpy as np
import pytest

from lungddpm.arms.compose import run_compose
from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError, LeakError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import read_volume, write_volume
from lungddpm.synthesis.run import SynthesisJob, run_synthesize


@pytest.fixture
def config(tmp_path):
    return parse_config(
        {
            "grid": {"size": [16, 16, 16]},
            "arms": {
                "external": {"gan": tmp_path / "gan"},
                "generators": ["gan"],
                "doses": [0.67, 1.0],
                "controls": [],
            },
            "segmentation": {"n_folds": 3, "folds": [0]},
        }
    )


@pytest.fixture
def folder(tiny_cohort, tmp_path):
    """Three samples that keep the contract: two on the references' grids, one of nobody; the last is float."""
    root = tmp_path / "gan"
    samples = []
    for number, reference in enumerate(["case03", "case04", "none"]):
        name = f"s{number}"
        ct, layout = cases.CaseFolder(tiny_cohort.parent / ("case03" if reference == "none" else reference)).read()
        hu = ct.array + (np.random.default_rng(number).normal(0, 5, ct.shape) if number == 2 else 3)
        write_volume(root / name / "ct.nii.gz", ct.like(hu.astype(np.float32 if number == 2 else np.int16)))
        write_volume(root / name / "layout.nii.gz", layout)
        samples.append({"sample": name, "reference": reference, "donors": "none"})
    samples[1]["donors"] = ["patient01"]
    write_json(root / "samples.json", {"trained_on": "none", "samples": samples})
    return root


@pytest.fixture
def take(config, tiny_cohort, tmp_path):
    def take(dose=1.0, table="samples.tsv"):
        out = tmp_path / "out"
        run_synthesize(config, SynthesisJob("gan", tiny_cohort, out, out / table, dose=dose))
        return cases.read_cases(out / table)

    return take


def declare(folder, **changes):
    path = folder / "samples.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


def redeclare(folder, number, **changes):
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    samples[number] |= changes
    declare(folder, samples=samples)


def test_samples_look_like_any_others(take, folder, tiny_cohort, tmp_path):
    table = take()
    assert table["case_id"].tolist() == ["s0", "s1", "s2"]
    assert table["patient_id"].tolist() == ["patient03", "patient04", "none"]
    assert set(table["source"]) == {"gan"}
    assert set(table["role"]) == {"synthetic"}
    assert table["n_nodules"].tolist() == [1, 1, 1]
    for _, row in table.iterrows():
        ct, layout = cases.CaseFolder(tmp_path / "out" / row["path"]).read()
        theirs = read_volume(folder / row["case_id"] / "ct.nii.gz").array
        assert ct.array.dtype == np.int16
        assert np.abs(ct.array - theirs).max() <= 0.5
        assert (layout.array == read_volume(folder / row["case_id"] / "layout.nii.gz").array).all()
        assert row["sha256"] == cases.CaseFolder(tmp_path / "out" / row["path"]).hash()
        record = (tmp_path / "out" / row["path"] / "sample.json").read_text()
        assert str(tmp_path) not in record
    assert take(0.67, "fewer.tsv")["case_id"].tolist() == ["s0", "s1"]


def test_what_changes_in_the_folder_is_taken_in_again(take, folder, tmp_path):
    take()
    kept = (tmp_path / "out/s1/ct.nii.gz").stat().st_mtime_ns
    ct = read_volume(folder / "s0/ct.nii.gz")
    write_volume(folder / "s0/ct.nii.gz", ct.like(ct.array + 1))
    take()
    assert (read_volume(tmp_path / "out/s0/ct.nii.gz").array == ct.array + 1).all()
    assert (tmp_path / "out/s1/ct.nii.gz").stat().st_mtime_ns == kept


def test_padding_becomes_air(take, folder, tmp_path):
    ct = read_volume(folder / "s0/ct.nii.gz")
    ct.array[0] = -3024
    write_volume(folder / "s0/ct.nii.gz", ct)
    take()
    assert (read_volume(tmp_path / "out/s0/ct.nii.gz").array[0] == -1024).all()


def test_labels_beside_whole_numbers_are_those_numbers(take, folder, tmp_path):
    layout = read_volume(folder / "s0/layout.nii.gz")
    write_volume(folder / "s0/layout.nii.gz", layout.like(layout.array * np.float32(1.0000001)))
    take()
    copied = read_volume(tmp_path / "out/s0/layout.nii.gz")
    assert copied.array.dtype == np.uint8
    np.testing.assert_array_equal(copied.array, layout.array)


def test_the_leak_guard_reads_the_declaration(take, folder, config, tiny_cohort, tmp_path):
    def compose():
        take()
        run_compose(config, "real+gan@1.0", tiny_cohort, [tmp_path / "out/samples.tsv"], tmp_path / "arm")
        return json.loads((tmp_path / "arm/arm.json").read_text())

    arm = compose()
    assert [case["patient_id"] for case in arm["cases"] if case["source"] == "gan"] == [
        "patient03",
        "patient04",
        "none",
    ]
    assert arm["leak_guard"]["disjoint"]
    declare(folder, trained_on=["patient01", "case05"])
    with pytest.raises(LeakError, match="patient05 in s0, s1, s2"):
        compose()
    declare(folder, trained_on="none")
    redeclare(folder, 1, donors=["case05"])
    with pytest.raises(LeakError, match="patient05 in s1"):
        compose()


def break_volume(name, change):
    def break_it(folder):
        volume = read_volume(folder / name)
        write_volume(folder / name, change(volume))

    return break_it


def marked(volume, value):
    array = volume.array.astype(np.float32)
    array[0, 0, 0] = value
    return volume.like(array)


def link_out(folder):
    outside = folder.parent / "elsewhere.nii.gz"
    (folder / "s0/ct.nii.gz").rename(outside)
    (folder / "s0/ct.nii.gz").symlink_to(outside)


def shifted(volume):
    affine = volume.affine.copy()
    affine[0, 3] += 1
    return type(volume)(volume.array, affine)


def sheared(volume):
    affine = volume.affine.copy()
    affine[1, 2] = 0.1 * affine[2, 2]
    return type(volume)(volume.array, affine)


def without(label):
    return lambda volume: volume.like(np.where(volume.array == label, 3, volume.array))


ERRORS = {
    "missing file": (lambda f: (f / "s1/ct.nii.gz").unlink(), "s1/ct.nii.gz: does not exist"),
    "damaged file": (lambda f: (f / "s1/ct.nii.gz").write_bytes(b"no"), "s1/ct.nii.gz: cannot be read"),
    "link out": (link_out, "s0/ct.nii.gz: points outside the folder"),
    "nan": (
        break_volume("s0/ct.nii.gz", lambda v: marked(v, np.nan)),
        "s0/ct.nii.gz: has NaN or infinite values in 1 vox",
    ),
    "beyond HU": (break_volume("s0/ct.nii.gz", lambda v: marked(v, 1e6)), "s0/ct.nii.gz: ranges from"),
    "constant": (break_volume("s0/ct.nii.gz", lambda v: v.like(0 * v.array - 900)), "s0/ct.nii.gz: is constant"),
    "scaled to [0, 1]": (
        break_volume("s0/ct.nii.gz", lambda v: v.like(((v.array + 1024) / 3000).astype(np.float32))),
        r"s0/ct.nii.gz: is not in Hounsfield units: its values are normalised to \[0, 1\]",
    ),
    "stored values": (
        break_volume("s1/ct.nii.gz", lambda v: v.like(v.array + 1024)),
        "s1/ct.nii.gz: is not in Hounsfield units: its values are about 1024 too high",
    ),
    "stored values, layout missing": (
        lambda f: (
            break_volume("s1/ct.nii.gz", lambda v: v.like(v.array + 1024))(f),
            (f / "s1/layout.nii.gz").unlink(),
        ),
        "s1/ct.nii.gz: is not in Hounsfield units: its values are about 1024 too high",
    ),
    "other grid": (break_volume("s0/ct.nii.gz", shifted), "s0/ct.nii.gz: is not on the grid of case03"),
    "layout beside": (break_volume("s0/layout.nii.gz", shifted), "s0/layout.nii.gz: is not on the grid of its CT"),
    "other size": (
        break_volume("s2/ct.nii.gz", lambda v: v.crop((slice(0, 8),) * 3)),
        r"s2/ct.nii.gz: has \(8, 8, 8\) voxels, but the grid has \(16, 16, 16\)",
    ),
    "no true affine": (
        break_volume("s2/ct.nii.gz", lambda v: type(v)(v.array, np.eye(4))),
        "s2/ct.nii.gz: has voxels of 1.00 x 1.00 x 1.00 mm",
    ),
    "sheared axes": (
        lambda f: [break_volume(f"s2/{name}", sheared)(f) for name in ("ct.nii.gz", "layout.nii.gz")],
        "s2/ct.nii.gz: has sheared axes",
    ),
    "a label between": (
        break_volume("s1/layout.nii.gz", lambda v: marked(v, 1.5)),
        "s1/layout.nii.gz: has the label 1.5",
    ),
    "unknown label": (break_volume("s1/layout.nii.gz", lambda v: marked(v, 7)), "s1/layout.nii.gz: has the label 7"),
    "no nodule": (break_volume("s1/layout.nii.gz", without(Label.NODULE)), "s1/layout.nii.gz: has no nodule"),
    "no lung": (break_volume("s1/layout.nii.gz", without(Label.LUNG)), "s1/layout.nii.gz: has no lung"),
    "unknown reference": (lambda f: redeclare(f, 0, reference="case77"), "s0/ct.nii.gz: is made from case77"),
    "unknown donor": (lambda f: redeclare(f, 0, donors=["x"]), "samples.json: donors of s0 names x, not in this run"),
    "unknown patient": (lambda f: declare(f, trained_on=["y"]), "samples.json: trained_on names y"),
    "twice": (lambda f: redeclare(f, 1, sample="s0"), "samples.json: lists s0 2 times"),
    "name of a case": (lambda f: redeclare(f, 1, sample="case01"), "samples.json: gives a sample the name of the case"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_every_violation_is_reported_with_its_file(take, folder, error):
    break_it, message = ERRORS[error]
    break_it(folder)
    with pytest.raises(InputError, match=message):
        take()


def test_all_violations_are_reported_at_once(take, folder, tmp_path):
    for name in ("nan", "no nodule", "unknown donor"):
        ERRORS[name][0](folder)
    with pytest.raises(InputError) as caught:
        take()
    assert "3 times" in str(caught.value)
    assert all(ERRORS[name][1] in str(caught.value) for name in ("nan", "no nodule", "unknown donor"))
    assert not (tmp_path / "out").exists()


DECLARATIONS = {
    "no file": (None, "does not exist"),
    "no JSON": ("{", "cannot be read as JSON"),
    "a key twice": ('{"trained_on": ["patient05"], "trained_on": "none"}', "has the key 'trained_on' twice"),
    "a list": ("[]", "is not a JSON object"),
    "nothing said": ('{"samples": [{"sample": "s0"}]}', r"samples.0.donors: .*samples.0.reference: .*trained_on: "),
    "nobody by silence": ('{"trained_on": [], "samples": []}', "has . errors: .*trained_on"),
    "typo": ('{"trained_on": "none", "sampels": []}', "sampels: Extra inputs"),
}


@pytest.mark.parametrize("case", DECLARATIONS)
def test_invalid_declarations(take, folder, case):
    text, message = DECLARATIONS[case]
    (folder / "samples.json").unlink()
    if text is not None:
        (folder / "samples.json").write_text(text)
    with pytest.raises(InputError, match=f"samples.json: .*{message}"):
        take()


@pytest.mark.parametrize("name", ["..", "../gan/s0", "/etc", "a/b", "", ".hidden", "samples-1.0-0.tsv"])
def test_names_that_lead_elsewhere(take, folder, name):
    redeclare(folder, 0, sample=name)
    with pytest.raises(InputError, match="samples.0.sample: String should match"):
        take()


def test_too_few_samples(take, folder):
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    declare(folder, samples=samples[:2])
    assert len(take(0.67)) == 2
    with pytest.raises(InputError, match="has 2 samples, but an arm takes 3"):
        take(1.0)


def test_without_an_arm_layouts_need_no_nodule(folder, tiny_cohort, tmp_path):
    for layout in folder.glob("*/layout.nii.gz"):
        labels = read_volume(layout)
        write_volume(layout, labels.like(np.where(labels.array == Label.NODULE, Label.LUNG, labels.array)))
    arms = {"external": {"gan": folder}, "generators": [], "doses": [], "controls": []}
    job = SynthesisJob("gan", tiny_cohort, tmp_path / "out", tmp_path / "out" / "samples.tsv")
    grid = {"grid": {"size": [16, 16, 16]}}
    run_synthesize(parse_config({**grid, "arms": {**arms, "quality_only": ["gan"]}}), job)
    assert cases.read_cases(job.table)["n_nodules"].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="has no nodule"):
        run_synthesize(parse_config({**grid, "arms": {**arms, "controls": ["gan"]}}), job)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"external": {"lung_ddpm": "x"}}, "the name lung_ddpm is taken"),
        ({"external": {"real": "x"}}, "the name real is taken"),
        ({"external": {"a b": "x"}}, "arms.external"),
        ({"generators": ["gan"]}, "there is no 'gan'"),
        ({"generators": ["external"]}, "there is no 'external'"),
    ],
)
def test_names_in_the_config(arms, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"arms": arms})
