"""`lungddpm run`: the same command continues, a second one is refused, errors are repeated last."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from lungddpm.operations import run as runner

LUNGDDPM = Path(sys.executable).with_name("lungddpm")

HANGS_AFTER_SECONDS = 1800
"""Against waiting forever; no result depends on it."""
SNAKEFILE = """
rule all:
    input: "results/second.txt"

rule first:
    output: "results/first.txt"
    shell: "echo $$ > job.pid; while [ ! -e go ]; do sleep 0.05; done; date +%s%N > {output}"

rule second:
    input: "results/first.txt"
    output: "results/second.txt"
    shell: "cp {input} {output}"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


@pytest.fixture(params=["flock", "no flock"])
def any_disk(request, folder, monkeypatch):
    """The folder, as it is and as if its disk had no locks."""
    if request.param == "no flock":
        without_flock(folder, monkeypatch)
    return folder


def without_flock(folder, monkeypatch):
    """Let every Python process find a disk as Lustre is without `-o flock`."""
    (folder / "python").mkdir()
    (folder / "python/sitecustomize.py").write_text(
        "import errno, fcntl\n"
        "def flock(file, operation):\n"
        "    raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = flock\n"
    )
    before = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "python"), *before]))


def start(folder, *arguments):
    # A suite that a shell runs in the background has SIGINT ignored, and so would all that it starts.
    return subprocess.Popen(
        [LUNGDDPM, "run", "--cores", "1", *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def end_of(run):
    """Exit code and output of a run, once it has ended."""
    output, _ = run.communicate(timeout=HANGS_AFTER_SECONDS)
    return run.returncode, output


def wait_for(condition, run=None):
    """Wait until the condition holds, for as long as the run continues."""
    while not (value := condition()):
        assert run is None or run.poll() is None, f"the run ended before: {run.stdout.read()}"
        time.sleep(0.05)
    return value


def job_of(folder, run):
    path = folder / "job.pid"
    return wait_for(lambda: path.exists() and path.read_text().strip() and int(path.read_text()), run)


def wait_for_the_end_of(process):
    wait_for(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE)


def test_runs_to_the_end_and_passes_arguments_on(folder):
    (folder / "go").touch()
    code, output = end_of(start(folder, "results/first.txt"))
    assert code == 0, output
    assert [(folder / f"results/{name}.txt").exists() for name in ("first", "second")] == [True, False]


@pytest.mark.parametrize("value", ["", "1"])
def test_snakemake_writes_no_colours_where_nobody_sees_them(folder, monkeypatch, value):
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr(runner, "_supervise", lambda command, *_: seen.extend(command) or 0)
    seen = []
    assert runner.run_snakemake(["--directory", str(folder), "--snakefile", str(folder / "Snakefile")]) == 0
    assert ("--nocolor" in seen) == bool(value)


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ([], ["--cores", "all"]),
        (["-c4"], []),
        (["-j4"], []),
        (["--core", "4"], []),
        (["--cores=4"], []),
        (["--workflow-profile", "one_core"], []),
        (["--profile", "one_core"], []),
        (["--workflow-profile", "cluster"], []),
        (["--executor", "slurm", "--jobs", "9"], []),
        (["--workflow-profile", "without"], ["--cores", "all"]),
    ],
)
def test_all_cores_are_used_only_if_nothing_else_is_asked_for(folder, monkeypatch, arguments, added):
    profiles = {"one_core": "cores: 1\n", "cluster": "executor: slurm\njobs: 50\n", "without": "keep-going: true\n"}
    for name, text in profiles.items():
        (folder / name).mkdir()
        (folder / name / "profile.yaml").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runner, "_supervise", lambda command, *_: seen.extend(command[1:]) or 0)
    seen = []
    assert runner.run_snakemake(arguments) == 0
    assert [word for word in seen if word != "--nocolor"] == [*arguments, *added, "--rerun-incomplete"]


@pytest.mark.parametrize("arguments", [["--dry-run"], ["-n"], ["--version"], ["--help"], ["--summary"], ["--bad"]])
def test_what_runs_no_job_needs_no_lock_and_leaves_that_of_others(folder, monkeypatch, arguments):
    lock = folder / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runner, "_lock", lambda _: pytest.fail("takes the lock"))
    assert (runner.run_snakemake([*arguments, "--cores", "1"]) == 0) == (arguments != ["--bad"])
    assert lock.exists()
    assert not (folder / "results").exists()


def test_a_report_after_a_run_is_a_run(folder, monkeypatch):
    (folder / "go").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runner, "_supervise", lambda command, *_: seen.extend(command) or 0)
    seen = []
    assert runner.run_snakemake(["--cores", "1", "--report", "page.html", "--report-after-run"]) == 0
    assert "--report-after-run" in seen


def test_a_dry_run_is_possible_beside_a_run(folder):
    run = start(folder)
    job_of(folder, run)
    code, output = end_of(start(folder, "--dry-run"))
    assert code == 0, output
    (folder / "go").touch()
    assert end_of(run)[0] == 0


def test_a_snakemake_that_was_started_by_hand_keeps_its_lock(folder):
    by_hand = subprocess.Popen(
        [LUNGDDPM.with_name("snakemake"), "--cores", "1"], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    job_of(folder, by_hand)
    code, output = end_of(start(folder))
    assert code == 2
    assert f"Snakemake is working in this folder (process {by_hand.pid})" in output
    assert list((folder / ".snakemake/locks").iterdir())
    (folder / "go").touch()
    assert end_of(by_hand)[0] == 0


def test_jobs_on_other_nodes_can_leave_their_errors(folder, tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("shared")

    def supervise(command, environment, lock):
        errors = Path(environment[runner.ERRORS_VARIABLE])
        assert errors.is_absolute()
        assert errors.parent == directory / "results"
        with errors.open("a") as file:
            file.write("x.dcm: is truncated.\n" * 2)
        return 1

    monkeypatch.setattr(runner, "_supervise", supervise)
    monkeypatch.chdir(folder)
    assert runner.run_snakemake(["--directory", str(directory), "--cores", "1"]) == 2
    assert [path.name for path in (directory / "results").iterdir()] == [".lock"]


def test_a_second_run_is_refused_and_the_first_continues(any_disk):
    folder = any_disk
    first = start(folder)
    job_of(folder, first)
    code, output = end_of(start(folder))
    assert code == 2
    assert "another run is working in this folder" in output
    (folder / "go").touch()
    assert end_of(first)[0] == 0


def snakemake_under(run):
    return wait_for(
        lambda: [p for p in psutil.Process(run.pid).children() if "snakemake" in " ".join(p.cmdline())], run
    )[0]


@pytest.mark.parametrize("victim", ["snakemake", "job"])
def test_continues_after_kill_9(any_disk, victim):
    folder = any_disk
    run = start(folder)
    job = job_of(folder, run)
    os.kill(job if victim == "job" else snakemake_under(run).pid, signal.SIGKILL)
    assert end_of(run)[0] != 0
    wait_for_the_end_of(job)
    (folder / "go").touch()
    code, output = end_of(start(folder))
    assert code == 0, output
    assert (folder / "results/second.txt").exists()


def test_what_a_killed_job_leaves_ends_with_the_run(folder):
    job = "sleep infinity & echo $! > job.pid; kill -9 $$"
    (folder / "Snakefile").write_text(f'rule all:\n    output: "results/a"\n    shell: "{job}"\n')
    assert end_of(start(folder))[0] != 0
    wait_for_the_end_of(int((folder / "job.pid").read_text()))


def test_ctrl_c_ends_in_order_and_the_same_command_continues(folder):
    run = start(folder)
    job_of(folder, run)
    run.send_signal(signal.SIGINT)
    assert end_of(run)[0] != 0
    (folder / "go").touch()
    assert end_of(start(folder))[0] == 0


def test_a_run_whose_snakemake_survives_still_holds_the_folder(any_disk):
    folder = any_disk
    run = start(folder)
    job_of(folder, run)
    snakemake = snakemake_under(run)
    run.kill()
    run.wait()
    assert end_of(start(folder))[0] == 2
    (folder / "go").touch()
    snakemake.wait()
    assert (folder / "results/second.txt").exists()


def test_errors_of_stages_are_repeated_last_with_exit_code_2(folder):
    (folder / "stage.py").write_text(
        "from lungddpm.cli import _refuse\n"
        "from lungddpm.core.errors import InputError\n"
        "_refuse(InputError('x.dcm', 'is truncated', 'Copy it again.'))\n"
    )
    job = f"{sys.executable} stage.py"
    (folder / "Snakefile").write_text(f'rule all:\n    output: "results/a"\n    shell: "{job}"\n')
    run = start(folder)
    output, _ = run.communicate()
    assert run.returncode == 2
    assert output.strip().splitlines()[-1] == "error: x.dcm: is truncated. Copy it again."


def test_the_folder_can_be_chosen(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "go").touch()
    assert end_of(start(folder, "--directory", str(elsewhere)))[0] == 0
    assert (elsewhere / "results/second.txt").exists()
    assert (elsewhere / "results/.lock").exists()


def test_a_results_path_that_cannot_be_a_folder_is_refused(folder):
    (folder / "results").write_text("in the way")
    run = start(folder)
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "results" in output


@pytest.mark.parametrize(("option", "message"), [("size=1m", "MiB are free"), ("ro", "read-only")])
def test_a_full_or_read_only_folder_is_refused_before_anything_runs(folder, option, message):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", option, "tmpfs", elsewhere], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        run = start(folder, "--directory", str(elsewhere))
        output, _ = run.communicate()
    finally:
        subprocess.run(["umount", elsewhere], check=True)
    assert run.returncode == 2
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize("key", ["__use_yte__", '"__use\\x5fyte__"'])
def test_a_config_that_would_run_code_is_refused(folder, key):
    mine = folder / "mine.yaml"
    mine.write_text(f"{key}: true\nseed: ?__import__('pathlib').Path('pwned').touch()\n")
    run = start(folder, "--configfile", "config.yaml", str(mine))
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "mine.yaml: has the key __use_yte__" in output
    assert not list(folder.rglob("pwned"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configfile", "mine.yaml"], "mine.yaml: has the key seed twice, in line 1 and in line 3"),
        (["--config", "grid={'margin_mm': 1, 'margin_mm': 2}"], "--config grid: has the key margin_mm twice"),
        (["--config", "config.yaml"], "--config: config.yaml is not KEY=VALUE. Pass files with --configfile."),
    ],
)
def test_what_snakemake_would_drop_or_not_understand_is_refused(folder, arguments, message):
    (folder / "mine.yaml").write_text("seed: 1\ngrid: {}\nseed: 2\n")
    run = start(folder, *arguments)
    output, _ = run.communicate()
    assert run.returncode == 2
    assert message in output
    assert not (folder / "results").exists()


def test_braces_in_the_folder_are_refused(folder):
    elsewhere = folder / "{sample}"
    elsewhere.mkdir()
    run = start(folder, "--directory", str(elsewhere))
    output, _ = run.communicate()
    assert run.returncode == 2
    assert "has '{' in its path" in output


def test_without_a_snakefile_the_shipped_workflow_runs_with_the_demos_config(tmp_path):
    code, output = end_of(start(tmp_path, "--dry-run"))
    assert code == 0, output
    assert "No Snakefile in this folder: running the workflow of lungddpm" in output
    assert "'lungddpm init' copies it" in output
    assert re.search(r"^train_segmenter +16$", output, re.MULTILINE)
    assert "/profiles/default for setting default" in output


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("overlay", [[], ["--configfile", "mine.yaml"], ["--configfile=mine.yaml"]])
def test_without_a_snakefile_the_folders_own_config_is_used(repository, tmp_path, overlay, elsewhere):
    values = yaml.safe_load((repository / "config.yaml").read_text())
    values.setdefault("segmentation", {})["seeds"] = [0, 1, 2]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "mine.yaml").write_text("segmentation: {seeds: [0]}\n")
    options = overlay + (["--directory", str(tmp_path / "else/where")] if elsewhere else [])
    code, output = end_of(start(tmp_path, "--dry-run", *options))
    assert code == 0, output
    assert re.search(rf"^train_segmenter +{4 if overlay else 12}$", output, re.MULTILINE)


@pytest.mark.parametrize(
    "options",
    [
        ["--configfile", "a.yaml", "b.yaml", "--config", "seed=7", "arms={'controls': []}"],
        ["--configfile", "a.yaml", "--config", "arms={'controls': []}", "--configfiles=b.yaml", "-C", "seed=7"],
        ["--configfile", "a.yaml", "-C", "arms={'controls': []}", "--configfile", "b.yaml", "--", "all"],
    ],
)
def test_config_files_and_values_may_follow_one_option_or_several(tmp_path, options):
    (tmp_path / "a.yaml").write_text("preset: demo\nsegmentation: {seeds: [0, 1, 2]}\n")
    (tmp_path / "b.yaml").write_text("segmentation: {seeds: [0]}\n")
    code, output = end_of(start(tmp_path, "--dry-run", *options))
    assert code == 0, output
    assert re.search(r"^train_segmenter +2$", output, re.MULTILINE)


def test_missing_locks_are_reported_once_and_leave_nothing(folder, monkeypatch):
    without_flock(folder, monkeypatch)
    (folder / "go").touch()
    stage = f"{LUNGDDPM} simulate --configfile {folder}/phantom.yaml --output {folder}/phantom"
    (folder / "phantom.yaml").write_text("source: {phantom: {patients: 1, matrix: 64, pixel_mm: 5, slice_mm: 20}}\n")
    (folder / "Snakefile").write_text(f'rule all:\n    output: "results/a"\n    shell: "{stage}; touch results/a"\n')
    run = start(folder)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.count("has no file locks (Function not implemented)") == 1
    assert not list(folder.rglob("*.held*"))


def test_a_home_that_cannot_be_written_is_reported_and_does_not_matter(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/1/nobody")
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    (folder / "go").touch()
    code = "import matplotlib; print(matplotlib.get_cachedir())"
    (folder / "Snakefile").write_text(
        f'rule all:\n    output: "results/a"\n    shell: """{sys.executable} -c "{code}" > {{output}}"""\n'
    )
    run = start(folder)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert output.count("/proc/1/nobody/.cache is not writable") == 1
    assert (folder / "results/a").read_text().strip() == str(folder / ".snakemake/cache/matplotlib")


def test_jobs_do_not_import_from_the_working_folder(folder):
    (folder / "lungddpm").mkdir()
    code = "import sys, lungddpm.config; print(sys.flags.safe_path)"
    (folder / "Snakefile").write_text(
        f'rule all:\n    output: "results/a"\n    shell: """{sys.executable} -c "{code}" > {{output}}"""\n'
    )
    run = start(folder)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert (folder / "results/a").read_text().strip() == "True"


def test_without_a_folder_for_temporary_files_the_runs_own_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/1/tmp"])
    monkeypatch.setenv("TMPDIR", "/proc/1/tmp")
    chosen = runner._temporary_folder(tmp_path)
    assert chosen == os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path / ".snakemake/tmp")


def test_the_lock_is_free_after_a_run(folder):
    (folder / "go").touch()
    end_of(start(folder))
    with (folder / "results/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
