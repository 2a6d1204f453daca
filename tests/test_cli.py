"""The command line on bad input: one clear message, exit code 2, nothing half-written."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
from documented import documented_keys, keys_of
from typer.testing import CliRunner

from lungddpm.cli import app
from lungddpm.core.cases import read_cases
from lungddpm.report.terminal import verdict_table_text

LUNGDDPM = Path(sys.executable).with_name("lungddpm")


def lungddpm(*arguments, cwd):
    return subprocess.run([LUNGDDPM, *arguments], cwd=cwd, text=True, capture_output=True, check=False)


def config_for(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


VERBS = [
    "run", "init", "simulate", "index", "prepare", "collect", "qc", "train", "synthesize", "compose", "segment plan",
    "segment train", "segment predict", "evaluate", "quality", "label-fidelity", "report", "verdict", "status",
    "plan", "export checkpoint", "export dicom", "config show", "config validate", "config schema", "doctor", "bench",
    "fetch lidc",
]  # fmt: skip


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "run"])
def test_every_verb_explains_itself(verb, tmp_path):
    shown = lungddpm(*verb.split(), "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "Usage" in shown.stdout


def test_run_explains_itself_before_it_lets_snakemake_do_so(tmp_path):
    shown = lungddpm("run", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    own, snakemake = shown.stdout.split("Arguments of snakemake:")
    assert "Run the whole benchmark through Snakemake" in own
    assert "--dry-run" in snakemake


def test_help_lists_every_verb(tmp_path):
    shown = lungddpm("--help", cwd=tmp_path).stdout
    assert all(verb.split()[0] in shown for verb in VERBS)


def test_a_shell_completes_verbs_and_options(tmp_path, monkeypatch):
    monkeypatch.setenv("_LUNGDDPM_COMPLETE", "complete_bash")
    for typed, completed in (("lungddpm ini", ["init"]), ("lungddpm segment tra", ["train"])):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        assert lungddpm(cwd=tmp_path).stdout.split() == completed


VERDICT = """arm,metric,mean,difference,ci_low,ci_high,p_holm,verdict,sentence
real,dice,0.5,,,,,baseline,real: the Dice is 0.500
real+lung_ddpm@1.0,dice,0.45,-0.05,-0.1,0.01,0.2,no difference shown,"−0.05 (95 % CI −0.10 to +0.01, n ≥ 3)"
"""
INSTRUMENT = """check,subject,measure,value,limit_low,limit_high,status,sentence
nothing missing,,replicates missing,0,,0,passed,"Every arm has all its replicates, n ≥ 3."
the answer,,,,,,stands,The answer stands: no check failed.
"""
EXTERNAL_VERDICT = """data_set,arm,metric,mean,difference,p_holm,verdict
theirs,real,dice,0.4,,,baseline
theirs,real+lung_ddpm@1.0,dice,0.6,0.2,0.01,better
theirs,real+lung_ddpm@1.0,sensitivity,0.7,0.1,0.3,no difference shown
"""
# Nothing was evaluated on ours, so that it has no verdict.
EXTERNAL_INSTRUMENT = """data_set,check,subject,measure,value,limit_high,status,sentence
theirs,nothing missing,,replicates missing,0,0,passed,Every arm has all its replicates.
ours,nothing missing,,test cases missing,1,0,failed,Test cases that no run segmented: ours-1.
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_any_terminal_is_written_to(environment, tmp_path):
    (tmp_path / "results/tables").mkdir(parents=True)
    (tmp_path / "results/tables/verdict.csv").write_text(VERDICT, encoding="utf-8")
    (tmp_path / "results/tables/instrument.csv").write_text(INSTRUMENT, encoding="utf-8")
    (tmp_path / "config.yaml").write_text("source: {phantom: {patients: 6}}\n")
    latin = "ascii" not in str(environment) and "C" not in environment.values()
    for verb in (["verdict"], ["config", "schema", "--markdown"], ["--help"]):
        run = subprocess.run(
            [LUNGDDPM, *verb], cwd=tmp_path, capture_output=True, env={**os.environ, **environment}, check=False
        )
        assert run.returncode == 0, run.stderr
        if verb == ["verdict"] and latin:
            text = run.stdout.decode("cp1252")
            assert "-0.05 (95 % CI -0.10 to +0.01, n >= 3)" in text
            assert re.search(r"0\.450 +-0\.050 +-0\.100 to \+0\.010 +0\.20 +no difference shown", text)


def test_what_a_terminal_lacks_goes_to_the_log_as_it_is(tmp_path):
    name = b"n\xfcchtern-\xe2\x88\x92.yaml"  # a Latin-1 letter, which is not UTF-8, and a minus, which is
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"}
    command = [LUNGDDPM, "--log", "mine.log", "config", "validate", "-c", name]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert run.returncode == 2
    assert run.stderr.decode("latin-1").startswith("error: n\\udcfcchtern--.yaml: does not exist.")
    assert "n\\udcfcchtern-−.yaml: does not exist." in (tmp_path / "mine.log").read_text(encoding="utf-8")


def test_errors_go_to_the_log_file_as_well(tmp_path):
    run = lungddpm("--log", "mine.log", "config", "validate", "-c", "none.yaml", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: none.yaml: does not exist.")
    assert "none.yaml: does not exist." in (tmp_path / "mine.log").read_text()


@pytest.mark.parametrize("error", ["OSError(5, 'Input/output error')", "ZeroDivisionError('a bug')"])
def test_a_bug_goes_to_the_log_file_with_its_traceback(error, tmp_path):
    program = f"""
import sys
from lungddpm import cli

@cli.app.command()
def fail():
    raise {error}

sys.argv = ["lungddpm", "--log", "mine.log", "fail"]
cli.main()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "in fail" in (tmp_path / "mine.log").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "has no CT series"),
        (lambda path: path.write_text("not a folder"), "is not a folder"),
    ],
    ids=["missing", "empty", "a file"],
)
def test_index_refuses_a_source_without_scans(tmp_path, make, message):
    make(tmp_path / "data")
    config = config_for(tmp_path, source={"kind": "lidc", "path": str(tmp_path / "data")})
    run = lungddpm("index", "-c", config, "--output", "index.tsv", cwd=tmp_path)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "index.tsv").exists()


@pytest.fixture
def scans(tmp_path):
    """A data set in a home folder: an image without labels."""
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    (tmp_path / "home" / "scans" / "images").mkdir(parents=True)
    nibabel.save(image, tmp_path / "home" / "scans" / "images" / "a.nii.gz")
    return tmp_path / "home" / "scans"


def test_index_without_a_usable_series_leaves_the_reasons_and_fails(tmp_path, scans):
    config = config_for(tmp_path, source={"kind": "images", "path": str(scans)})
    run = lungddpm("index", "-c", config, "--output", "index.tsv", cwd=tmp_path)
    assert run.returncode == 2
    assert "0 usable patients" in run.stderr
    (row,) = read_cases(tmp_path / "index.tsv").to_dict("records")
    assert (row["status"], row["role"]) == ("excluded", "")
    assert "has no label" in row["reason"]


def test_images_are_planned_from_the_table_that_index_writes(tmp_path, monkeypatch):
    for name in "abcd":
        for folder in ("images", "labels"):
            (tmp_path / "scans" / folder).mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4))
            nibabel.save(image, tmp_path / "scans" / folder / f"{name}.nii.gz")
    source, roles = {"kind": "images", "path": "scans"}, {"discovery": 2, "reference": 1, "test": 1}
    config = ["-c", str(config_for(tmp_path, source=source, roles=roles))]
    monkeypatch.chdir(tmp_path)
    counted = []
    monkeypatch.setattr("lungddpm.operations.plan.plan_run", lambda _, cohort, __: counted.append(cohort) or [])

    def call(*arguments):
        return CliRunner().invoke(app, [*arguments, *config])

    assert "no index lists the scans" in str(call("plan").exception)
    assert "index.tsv: does not exist. Write it" in str(call("plan", "--index", "index.tsv").exception)
    assert call("index", "--output", "index.tsv").exit_code == 0
    planned = call("plan", "--index", "index.tsv")
    assert planned.exit_code == 0, planned.exception
    (cohort,) = counted
    assert (cohort.scans, cohort.voxels, cohort.discovery, cohort.test) == (4, 120, 2, 1)


@pytest.mark.parametrize("verb", ["index", "prepare"])
def test_a_source_on_the_command_line_replaces_the_one_of_the_config(tmp_path, scans, verb):
    config = config_for(tmp_path, source={"kind": "images"})
    without = lungddpm(verb, "-c", config, cwd=tmp_path)
    assert "source.path is needed" in without.stderr
    run = lungddpm(verb, "-c", config, "--source", scans, cwd=tmp_path)
    # What is wrong now comes later.
    assert ("0 usable patients" if verb == "index" else "index.tsv: does not exist") in run.stderr


def test_the_home_folder_on_the_command_line_and_in_the_config(tmp_path, scans, monkeypatch):
    monkeypatch.setenv("HOME", str(scans.parent))
    for path, option in (("~/scans", ()), ("none", ("--source=~/scans",))):
        config = config_for(tmp_path, source={"kind": "images", "path": path})
        assert "0 usable patients" in lungddpm("index", "-c", config, *option, cwd=tmp_path).stderr


def test_messages_say_where_a_relative_source_is_looked_up(tmp_path):
    config = config_for(tmp_path, source={"kind": "lidc", "path": "scans"})
    (tmp_path / "elsewhere").mkdir()
    run = lungddpm("index", "-c", config, cwd=tmp_path / "elsewhere")
    assert f"{tmp_path}/elsewhere/scans: is not a folder" in run.stderr
    assert "a relative path starts in the working directory" in run.stderr


def write_pair(folder, name, ct, labels, label_affine=None):
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    for kind, array, grid in (("images", ct, affine), ("labels", labels, label_affine)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine if grid is None else grid), folder / kind / f"{name}.nii.gz")


@pytest.fixture
def bad_pairs(tmp_path):
    """Good pairs beside one of each error."""
    rng = np.random.default_rng(0)
    shape = (64, 64, 64)
    ct = rng.normal(40, 10, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    for left in (8, 36):
        labels[left : left + 20, 16:48, 8:56] = 1
        labels[left + 12 : left + 15, 24:27, 12:52] = 3
    labels[14:18, 30:34, 30:34] = 2
    ct[labels == 1] = rng.normal(-850, 10, (labels == 1).sum())
    for name in ("good1", "good2", "good3"):
        write_pair(tmp_path / "data", name, ct, labels)
    write_pair(tmp_path / "data", "shape", ct, labels[:-1])
    write_pair(tmp_path / "data", "affine", ct, labels, np.diag([4.0, 4.0, 5.0, 1.0]))
    write_pair(tmp_path / "data", "nan", np.where(labels == 2, np.nan, ct).astype(np.float32), labels)
    write_pair(tmp_path / "data", "constant", np.full(shape, -1000, np.int16), labels)
    write_pair(tmp_path / "data", "unknown", ct, np.where(labels == 2, 7, labels).astype(np.uint8))
    write_pair(tmp_path / "data", "lungless", rng.normal(40, 10, shape).astype(np.float32), np.zeros(shape, np.uint8))
    return tmp_path


def prepare_pairs(folder, test_patient):
    """Index, prepare and collect with that patient in the role test; the last stage's process."""
    config = config_for(
        folder,
        source={"kind": "images", "path": str(folder / "data")},
        roles={"discovery": ["good1"], "reference": ["good2"], "test": [test_patient]},
        grid={"size": [32, 32, 32]},
        generators={"lung_ddpm": {"denoiser": {"attention": False}}},
    )
    for arguments in (
        ["index", "--output", "cases/index.tsv"],
        ["prepare", "--index", "cases/index.tsv", "--output", "cases", "--table", "cases/cases-0.tsv"],
    ):
        run = lungddpm(*arguments, "-c", config, cwd=folder)
        assert run.returncode == 0, run.stderr
    return lungddpm("collect", "cases/cases-0.tsv", "--output", "cases/cases.tsv", "-c", config, cwd=folder)


def test_bad_pairs_are_excluded_with_their_reason_and_the_others_continue(bad_pairs):
    run = prepare_pairs(bad_pairs, "good3")
    assert run.returncode == 0, run.stderr
    table = pd.read_csv(bad_pairs / "cases/cases.tsv", sep="\t", keep_default_na=False).set_index("case_id")
    assert table.loc[table["status"] == "ok"].index.tolist() == ["good1", "good2", "good3"]
    expected = {
        "shape": "shape", "affine": "affine", "nan": "NaN", "constant": "constant", "unknown": "7", "lungless": "lung",
    }  # fmt: skip
    for case_id, word in expected.items():
        assert word in table.loc[case_id, "reason"], case_id
        assert not (bad_pairs / "cases" / case_id / "ct.nii.gz").exists()
    assert str(bad_pairs) not in (bad_pairs / "cases/cases.tsv").read_text()


def test_a_role_that_loses_its_last_case_ends_the_run_with_the_reason(bad_pairs):
    run = prepare_pairs(bad_pairs, "constant")
    assert run.returncode == 2
    assert "roles.test" in run.stderr
    assert "constant" in run.stderr
    assert not (bad_pairs / "cases/cases.tsv").exists()


@pytest.fixture(params=["size=16k", "ro"], ids=["full", "read-only"])
def unwritable(request, tmp_path):
    """A small tmpfs, full or read-only; needs the right to mount."""
    folder = tmp_path / "results"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_quality_takes_the_path_of_a_network_that_the_config_only_names(monkeypatch):
    from lungddpm.quality import image_quality

    seen = []
    monkeypatch.setattr(image_quality, "run_quality", lambda config, *_: seen.append(config.image_quality.weights))
    of_job = '{"image_quality": {"weights": "resnet_50.pth"}}'
    command = ["quality", "x.tsv", "--generator", "g", "--output", "g.csv", "--configfile", of_job, "--threads", "1"]
    for option in ([], ["--weights", "/data/resnet_50.pth"]):
        result = CliRunner().invoke(app, [*command, *option])
        assert result.exit_code == 0, result.output
    assert seen == [Path("resnet_50.pth"), Path("/data/resnet_50.pth")]


def test_a_full_or_read_only_folder_is_reported(unwritable, tmp_path):
    config = config_for(tmp_path, source={"phantom": {"patients": 1, "matrix": 80, "pixel_mm": 4.4, "slice_mm": 6}})
    run = lungddpm("simulate", "-c", config, "--output", unwritable / "source", cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert "no space left" in run.stderr or "read-only" in run.stderr
    assert "Traceback" not in run.stderr
    left = [path for path in unwritable.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert not any("phantom.json" in path.name for path in left), "an unfinished patient is not marked complete"


def test_dose_0_is_not_the_largest_dose(tiny_cohort, tmp_path):
    config = config_for(tmp_path, grid={"size": [16, 16, 16]}, arms={"generators": ["reference"], "doses": [1.0]})
    command = ["synthesize", "--generator", "reference", "--configfile", str(config), "--cases", str(tiny_cohort)]
    run = lungddpm(*command, "--dose", "0", cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert "--dose: 0" in run.stderr
    assert not (tmp_path / "results").exists()


def test_doctor_knows_what_is_here(tmp_path):
    shown = lungddpm("doctor", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"cores: {os.cpu_count()}" in shown.stdout
    assert "torch " in shown.stdout


@pytest.mark.parametrize(
    ("commit", "line"), [("0123 with changes", ["commit of lungddpm: 0123 with changes"]), (None, [])]
)
def test_doctor_names_the_commit_of_a_checkout(monkeypatch, commit, line):
    monkeypatch.setattr("lungddpm.operations.doctor.git_commit", lambda: commit)
    shown = CliRunner().invoke(app, ["doctor"])
    assert [text for text in shown.stdout.splitlines() if "commit" in text] == line
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["git_commit"] == commit


@pytest.mark.parametrize(("name", "major", "bf16"), [("NVIDIA L4", 8, True), ("Tesla V100", 7, False)])
def test_doctor_gives_json_with_the_keys_of_the_docs(monkeypatch, name, major, bf16):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "12.6")
    properties = SimpleNamespace(total_memory=24 * 2**30, major=major)
    for function, value in (
        ("is_available", True), ("device_count", 1), ("current_device", 0), ("get_device_name", name),
        ("get_device_properties", properties), ("_check_bf16_tensor_supported", True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    values = json.loads(shown.stdout)
    assert values["devices"] == [{"device": "cuda:0", "name": name, "memory_gib": 24.0, "bf16": bf16}]
    assert values["versions"]["torch"] == importlib.metadata.version("torch")
    assert values["cores"] == os.cpu_count()
    keys = {"versions" if key.startswith("versions.") else key for key in keys_of(values)}
    assert documented_keys("doctor") - {"devices"} == keys
    assert shown.exit_code == (2 if values["missing"] else 0)


@pytest.fixture
def verdict_folder(tmp_path):
    (tmp_path / "results/tables").mkdir(parents=True)
    (tmp_path / "results/tables/verdict.csv").write_text(VERDICT, encoding="utf-8")
    (tmp_path / "results/tables/instrument.csv").write_text(INSTRUMENT, encoding="utf-8")
    return tmp_path


def test_the_verdict_gives_json_with_the_keys_of_the_docs(verdict_folder):
    # As an interrupted pipe or a Latin-1 terminal would have it: plain ASCII.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    tables = verdict_folder / "results/tables"
    (tables / "external_verdict.csv").write_text(EXTERNAL_VERDICT, encoding="utf-8")
    (tables / "external_instrument.csv").write_text(EXTERNAL_INSTRUMENT, encoding="utf-8")
    run = subprocess.run(
        [LUNGDDPM, "verdict", "--json"], cwd=verdict_folder, text=True, capture_output=True, env=environment, check=True
    )
    values = json.loads(run.stdout, parse_constant=pytest.fail)
    # The empty list of a set on which nothing was evaluated has no keys below it.
    assert documented_keys("verdict") == keys_of(values) - {"external_tests[].arms"}
    assert (values["answer"], values["sentence"]) == ("stands", "The answer stands: no check failed.")
    real, synthetic = values["arms"]
    assert (real["arm"], real["mean"], real["difference"], real["verdict"]) == ("real", 0.5, None, "baseline")
    assert (synthetic["difference"], synthetic["ci_low"], synthetic["p_holm"]) == (-0.05, -0.1, 0.2)
    assert "−0.05" in synthetic["sentence"]
    (check,) = values["checks"]
    assert (check["check"], check["value"], check["limit_low"], check["limit_high"]) == ("nothing missing", 0, None, 0)
    theirs, ours = values["external_tests"]
    assert [(arm["arm"], arm["difference"], arm["verdict"]) for arm in theirs["arms"]] == [
        ("real", None, "baseline"),
        ("real+lung_ddpm@1.0", 0.2, "better"),
    ]
    assert [(each["data_set"], each["checks"][0]["status"]) for each in (theirs, ours)] == [
        ("theirs", "passed"),
        ("ours", "failed"),
    ]
    assert ours["arms"] == []


def test_a_run_without_external_test_sets_has_none_in_json(verdict_folder):
    run = lungddpm("verdict", "--json", cwd=verdict_folder)
    assert json.loads(run.stdout)["external_tests"] == []


def test_without_a_verdict_json_has_nothing_on_standard_output(tmp_path):
    run = lungddpm("verdict", "--json", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "error: results/tables/verdict.csv: does not exist. 'lungddpm run' ends with it; 'lungddpm status' shows how "
        "far a run is.\n"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
    ids=["terminal", "NO_COLOR", "dumb", "file"],
)
def test_only_a_terminal_gets_colours(monkeypatch, verdict_folder, stream, environment, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    text = verdict_table_text(verdict_folder / "results")
    assert ("\x1b[32mpassed\x1b[0m" in text) == coloured
    assert ("\x1b" in text) == coloured


LIGHT = """
import json, sys
from typer.testing import CliRunner
from lungddpm import cli
import lungddpm.operations.run

loaded = {}
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, arguments)
    heavy = [name for name in ("torch", "monai", "nnunetv2", "diffusers", "accelerate") if name in sys.modules]
    loaded[" ".join(arguments)] = [result.exit_code, heavy]
print(json.dumps(loaded))
"""


def test_light_commands_load_no_network_library(verdict_folder):
    images = '{"source": {"kind": "images"}}'
    commands = [
        ["--help"], ["--version"], ["config", "show"], ["config", "validate"], ["config", "schema"],
        ["verdict"], ["verdict", "--json"], ["status", "-c", images], ["status", "--json", "-c", images],
        ["simulate", "--help"], ["checksums"], ["init", "folder"],
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands)], cwd=verdict_folder, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert json.loads(run.stdout) == {" ".join(command): [0, []] for command in commands}


def test_config_show_gives_a_config_that_is_valid_again(repository, tmp_path):
    shown = lungddpm("config", "show", "-c", repository / "config.yaml", cwd=tmp_path)
    (tmp_path / "all.yaml").write_text(shown.stdout)
    again = lungddpm("config", "show", "-c", "all.yaml", cwd=tmp_path)
    assert again.stdout == shown.stdout != ""


@pytest.fixture
def trained(monkeypatch):
    """Names of the generators whose training was estimated."""
    names = []
    monkeypatch.setattr("lungddpm.operations.estimate.run_estimate", lambda config, _: names.append(config.name))
    return names


@pytest.mark.parametrize(
    ("arms", "arguments", "name"),
    [
        ({}, [], "lung_ddpm"),
        ({"generators": ["copy_paste", "pix2pix3d"]}, [], "pix2pix3d"),
        ({"generators": ["lung_ddpm", "pix2pix3d"]}, ["--generator", "pix2pix3d"], "pix2pix3d"),
    ],
)
def test_train_takes_the_one_generator_that_the_arms_train(repository, trained, arms, arguments, name):
    config = ["-c", str(repository / "config/lidc.yaml"), "-c", json.dumps({"arms": arms})]
    result = CliRunner().invoke(app, ["train", "--estimate", "--device", "cpu", *config, *arguments])
    assert (result.exit_code, trained) == (0, [name]), result.exception


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (["lung_ddpm", "pix2pix3d"], "--generator: is required, as the arms use 2 trained generators. "
         "Name one of lung_ddpm, pix2pix3d."),
        (["copy_paste"], "--generator: is required, as the arms use no trained generators. Name one."),
    ],
)  # fmt: skip
def test_train_asks_which_of_several_generators(trained, generators, message):
    values = {"source": {"kind": "phantom"}, "arms": {"generators": generators}}
    result = CliRunner().invoke(app, ["train", "--estimate", "--device", "cpu", "-c", json.dumps(values)])
    assert (str(result.exception), trained) == (message, [])
