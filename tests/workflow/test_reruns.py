"""What a change of the source reruns, by doing: a dry run of the finished tiny benchmark with a changed package."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from tiny import rules_of

from lungddpm.core.roles import ROLES
from lungddpm.core.volume import Volume, write_volume

pytestmark = pytest.mark.workflow

LAST = {"write_report": 1, "checksums": 1}
SEGMENTERS = {"train_segmenter": 4, "predict": 4, "evaluate": 4}
ARMS = {"compose": 4, "compose_draw": 2, "plan": 4, **SEGMENTERS, "label_fidelity": 1}
# Of the four arms, two take samples of lung_ddpm, which are next to the cases that replicates share.
SAMPLES = {"synthesize": 1, "quality": 1, "compose_draw": 2, **dict.fromkeys(SEGMENTERS, 2), "label_fidelity": 1}
MODEL = {"train_generator": 1, **SAMPLES}
CASES = {"prepare": 1, "collect": 1, "qc": 1, **MODEL, **ARMS}

CHANGES = [
    pytest.param(
        [
            ("layouts/lungs.py", '"""', '"""Changed: '),
            ("layouts/compose.py", "LUNG_OCCUPANCY = 0.5", "LUNG_OCCUPANCY = 0.5  # Changed."),
            ("models/optimization.py", "\ndef learning_rate", "\n# Changed.\ndef learning_rate"),
            ("generators/copy_paste.py", "FEATHER_VOXELS = ", "FEATHER_VOXELS = 1 + "),
            ("generators/lung_ddpm_plus.py", "import numpy as np", "import numpy as np\n\nCHANGED = 1"),
            ("operations/bench.py", "from __future__ import annotations", "from __future__ import annotations\nX = 1"),
            ("operations/plan.py", "from __future__ import annotations", "from __future__ import annotations\nX = 1"),
            ("core/progress.py", "from __future__ import annotations", "from __future__ import annotations\nX = 1"),
            ("cli.py", "from __future__ import annotations", "from __future__ import annotations\nX = 1"),
        ],
        {},
        id="comments, docstrings, another generator, tools",
    ),
    pytest.param(
        [("report/templates/report.html.jinja", "</h1>", "!</h1>")], {"qc": 1, **LAST}, id="template of a page"
    ),
    pytest.param([("verdict/published.csv", "\n", "\n\n")], LAST, id="published figures"),
    pytest.param(
        [("sources/phantom/scanner.py", "PADDING_HU = ", "PADDING_HU = -1 + ")],
        {"simulate": 1, "index": 1, **CASES, **LAST},
        id="simulate",
    ),
    pytest.param(
        [("arms/splits.py", 'seed, "roles")', 'seed, "other roles")')],
        {"index": 1, **CASES, **LAST},
        id="assignment of roles",
    ),
    pytest.param(
        [("layouts/compose.py", "VESSEL_OCCUPANCY = 0.25", "VESSEL_OCCUPANCY = 0.3")],
        {**CASES, **LAST},
        id="constant of layouts",
    ),
    pytest.param([("core/labels.py", "VESSEL = 3", "VESSEL = 4")], {**CASES, **LAST}, id="label numbers"),
    # The pictures of the cases are made with them.
    pytest.param(
        [("core/drawing.py", "LUNG_WINDOW_HU = (", "LUNG_WINDOW_HU = (1 + ")], {**CASES, **LAST}, id="drawing"
    ),
    pytest.param(
        [("models/optimization.py", "math.pi * after", "math.pi * (after + 1)")], {**MODEL, **LAST}, id="training"
    ),
    pytest.param(
        [("models/sampling.py", "implied.clamp(-1, 1)", "implied.clamp(-1, 1.5)")], {**SAMPLES, **LAST}, id="sampling"
    ),
    pytest.param(
        [("segmentation/trainers/lungddpm_trainer.py", "self.save_every = 1", "self.save_every = 2")],
        {**SEGMENTERS, "label_fidelity": 1, **LAST},
        id="trainer of the segmenter",
    ),
    pytest.param(
        [("evaluation/segmentation.py", "def run_evaluate(", "def run_evaluate(*, changed=1, ")],
        {"evaluate": 4, **LAST},
        id="measures of segmenters",
    ),
    pytest.param(
        [("evaluation/lesions.py", "_TOUCHING = 26", "_TOUCHING = 18")],
        {"evaluate": 4, "label_fidelity": 1, **LAST},
        id="lesions of masks",
    ),
    pytest.param(
        [("quality/label_fidelity.py", "def judge(\n    ", "def judge(\n    *, changed=1, ")],
        {"label_fidelity": 1, **LAST},
        id="judging of labels",
    ),
    pytest.param(
        [("quality/label_fidelity.py", "def fidelity_table(\n    ", "def fidelity_table(\n    *, changed=1, ")],
        LAST,
        id="table of label fidelity",
    ),
    pytest.param(
        [("quality/similarity.py", "def ", "def changed():\n    pass\n\n\ndef ")], {}, id="a function that nothing uses"
    ),
]


def test_one_more_replicate_reruns_nothing_of_the_others(tiny_benchmark, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("segmentation: {seeds: [0, 1]}\n")
    run = tiny_benchmark.run(str(more), "--dry-run")  # a second file after --configfile
    assert run.returncode == 0, run.stdout[-3000:]
    new = {"synthesize": 1, "compose_draw": 2, **SEGMENTERS, "label_fidelity": 1}
    # Image quality is that of all draws together.
    assert rules_of(run.stdout) == {"merge_config": 1, "quality": 1, **new, **LAST}, run.stdout[-3000:]


@pytest.mark.parametrize(
    ("values", "rerun"),
    [
        # The samples of a shared draw are others; those of the draws stay for whoever turns them on again.
        ("synthesis: {draw_per_replicate: false}", {"compose": 2, "plan": 2, "synthesize": 1, "quality": 1}),
        (
            "synthesis: {training_per_replicate: true}",
            {"train_generator": 1, "synthesize": 1, "quality": 1, "compose_draw": 2},
        ),
    ],
)
def test_other_draws_rerun_only_arms_with_synthetic_cases(tiny_benchmark, tmp_path, values, rerun):
    more = tmp_path / "more.yaml"
    more.write_text(values + "\n")
    run = tiny_benchmark.run(str(more), "--dry-run")  # a second file after --configfile
    assert run.returncode == 0, run.stdout[-3000:]
    trained = {**dict.fromkeys(SEGMENTERS, 2), "label_fidelity": 1}
    assert rules_of(run.stdout) == {"merge_config": 1, **rerun, **trained, **LAST}, run.stdout[-3000:]


@pytest.mark.parametrize(("edits", "rerun"), CHANGES)
def test_changed_code_reruns_what_depends_on_it(tiny_benchmark, tmp_path, edits, rerun):
    copy = tmp_path / "repository"
    for name in ("lungddpm", "workflow", "profiles", "envs"):
        shutil.copytree(tiny_benchmark.repository / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copyfile(tiny_benchmark.repository / name, copy / name)
    for name, old, new in edits:
        path = copy / "lungddpm" / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} holds {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
    run = subprocess.run(
        tiny_benchmark.command("--dry-run"), cwd=copy, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(copy)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert rules_of(run.stdout) == rerun, run.stdout[-3000:]


@pytest.fixture
def three_scans(make_benchmark, tmp_path):
    """A run on three scans, each of a patient of its own by a table of patients, that are listed."""
    for name in "abc":
        write_scan(tmp_path / "scans", name)
    (tmp_path / "scans/participants.tsv").write_text("file\tpatient\na\tP1\nb\tP2\nc\tP3\nd\tP4\n")
    source = {"kind": "images", "path": str(tmp_path / "scans"), "images": {"patient_table": "participants.tsv"}}
    benchmark = make_benchmark(tmp_path / "run", {"source": source, "roles": dict.fromkeys(ROLES, 1)})
    first = benchmark.run("--until", "index")
    assert first.returncode == 0, first.stdout[-3000:]
    return benchmark


def write_scan(folder, name):
    image = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    write_volume(folder / "images" / f"{name}.nii.gz", image)
    write_volume(folder / "labels" / f"{name}.nii.gz", image.like(np.ones(image.shape, np.uint8)))


def test_a_changed_table_of_patients_lists_the_scans_again(three_scans, tmp_path):
    """Otherwise two scans that turn out to be of one patient would keep their roles."""
    assert "index" not in rules_of(three_scans.run("--dry-run", "--until", "index").stdout)
    (tmp_path / "scans/participants.tsv").write_text("file\tpatient\na\tP1\nb\tP2\nc\tP2\n")
    assert rules_of(three_scans.run("--dry-run", "--until", "index").stdout)["index"] == 1


def test_one_more_scan_is_taken_in_when_asked_for(three_scans, tmp_path):
    """Not before: it would give patients other roles, and a run of weeks would start again."""
    write_scan(tmp_path / "scans", "d")
    assert "index" not in rules_of(three_scans.run("--dry-run", "--until", "index").stdout)
    again = three_scans.run("--forcerun", "index", "prepare", "--until", "index")
    assert again.returncode == 0, again.stdout[-3000:]
    listed = (three_scans.results / "cases/index.tsv").read_text().splitlines()
    assert [any(patient in line for line in listed) for patient in ("P1", "P2", "P3", "P4")] == [True] * 4
