"""Names that would run a command, leave the results folder or break a page, taken through the workflow as they are."""

import json
import re
import shlex

import numpy as np
import pytest
from written_files import texts_below

from lungddpm.core.cases import read_cases
from lungddpm.core.labels import Label
from lungddpm.core.volume import write_volume
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom

COMMANDS = "a 'b' \"c\" $(touch pwned) `touch pwned` %s;touch pwned&\nnew"
BRACES = "{input} {wildcards.shard} {x}"
PATIENTS = ["$(touch pwned) 'q' {x}", "`touch pwned`", "; touch pwned #\n<script>alert(1)<|script>", "--help"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four phantom patients as NIfTI, under such names, in a folder of such a name."""
    folder = tmp_path_factory.mktemp("data") / f"{COMMANDS} {BRACES}"
    coarse = Phantom(matrix=64, pixel_mm=5, slice_mm=7, nodules=(2, 2), nodule_diameter_mm=(20, 30))
    for seed, patient in enumerate(PATIENTS):
        scan = thorax(coarse, seed)
        labels = np.zeros(scan.ct.shape, np.uint8)
        labels[scan.lungs], labels[scan.vessels] = Label.LUNG, Label.VESSEL
        for nodule in scan.nodules:
            labels[nodule.mask] = Label.NODULE
        write_volume(folder / "images" / f"{patient}.nii.gz", scan.ct)
        write_volume(folder / "labels" / f"{patient}.nii.gz", scan.ct.like(labels))
    return folder


@pytest.fixture(scope="module")
def benchmark(cohort, make_benchmark, tmp_path_factory):
    """The tiny benchmark on them, in a folder of such a name; not yet run. Braces Snakemake cannot take there."""
    roles = {"discovery": PATIENTS[:2], "reference": PATIENTS[2:3], "test": PATIENTS[3:]}
    source = {"kind": "images", "path": str(cohort)}
    return make_benchmark(tmp_path_factory.mktemp("run") / COMMANDS, {"source": source, "roles": roles})


def words_of_commands(printed):
    """The words of all commands that Snakemake printed, a list per command, without redirections and our own lists."""
    ours = r" 2?> [\w./+-]+|\$\(cut -d ' ' -f 3 [\w./@+-]+\)"
    words = []
    for following in printed.split("Shell command: ")[1:]:
        lines = following.splitlines()
        command = lines.pop(0)
        # What a job prints may follow at once, and a quoted name may hold a line break: quotes show where it ends.
        while (parsed := parsed_words(re.sub(ours, "", command))) is None:
            command += "\n" + lines.pop(0)
        words.append(parsed)
    return words


def parsed_words(command):
    try:
        return shlex.split(command)
    except ValueError:  # an open quote
        return None


def check_quoted(words, cohort):
    for each in words:
        others = [word for word in each if word != str(cohort) and not is_config(word)]
        assert all(re.fullmatch(r"[\w./+@:=-]*", word) for word in others), each


def is_config(word):
    """Whether a word is the merged config, whole: a quote out of place would leave no JSON of these patients."""
    if not word.startswith("{"):
        return False
    roles = json.loads(word)["roles"]
    return roles["discovery"] + roles["reference"] + roles["test"] == PATIENTS


def test_commands_quote_what_is_not_ours(benchmark, cohort):
    run = benchmark.run("--dry-run", "--printshellcmds")
    assert run.returncode == 0, run.stdout[-3000:]
    words = words_of_commands(run.stdout)
    assert len(words) > 5
    assert sum(str(cohort) in each for each in words) == 1  # index; how often scans are prepared is counted after it
    check_quoted(words, cohort)


def test_scans_are_prepared_and_nothing_else_happens(benchmark, cohort):
    top = benchmark.folder.parent
    run = benchmark.run("--cores", "2", "--printshellcmds", "results/qc/index.html", "results/arms/real/arm.json")
    assert run.returncode == 0, run.stdout[-3000:]
    words = words_of_commands(run.stdout)
    assert sum(str(cohort) in each and "prepare" in each for each in words) >= 1
    assert any("compose" in each for each in words)
    check_quoted(words, cohort)

    table = read_cases(benchmark.results / "cases/cases.tsv")
    assert sorted(table["patient_id"]) == sorted(PATIENTS)
    assert (table["status"] == "ok").all()
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", case_id) for case_id in table["case_id"])
    record = json.loads((benchmark.results / "arms/real/arm.json").read_text())
    assert {case["patient_id"] for case in record["cases"]} == set(PATIENTS[:2])

    everything = [*benchmark.repository.iterdir(), *top.rglob("*"), *cohort.parent.rglob("*")]
    assert [path for path in everything if path.name.startswith("pwned")] == []
    assert {path.name for path in top.iterdir()} == {benchmark.folder.name}
    assert {path.name for path in benchmark.folder.iterdir()} == {"overlay.yaml", "results", ".snakemake"}
    pages = [content for path, content in texts_below(benchmark.results / "qc") if path.suffix == ".html"]
    assert any(b"alert(1)" in page for page in pages), "the patient is named"
    assert not any(b"<script>alert" in page for page in pages)
