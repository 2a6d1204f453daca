"""What every source declares, what happens to one that does not, and that a new one is one file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import lungddpm
from lungddpm import sources
from lungddpm.core.errors import ConfigError


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a module beside the sources."""
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lungddpm.sources.mine", raising=False)

    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return path

    yield write
    sys.modules.pop("lungddpm.sources.mine", None)


def test_declarations_are_read_without_heavy_imports():
    code = (
        "import sys\n"
        "from lungddpm import sources\n"
        "declared = [sources.source_of(name) for name in sources.names()]\n"
        "assert [each.name for each in declared] == ['images', 'lidc', 'luna16', 'phantom']\n"
        "assert all(each.title and each.citation for each in declared)\n"
        "heavy = {'torch', 'scipy', 'skimage', 'pandas', 'nibabel', 'pydicom', 'SimpleITK'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_without_a_declaration_is_refused_with_its_file(mine):
    path = mine("TITLE = 'Mine'\n\ndef load_scan(path, case): ...\n")
    with pytest.raises(ConfigError) as refused:
        sources.source_of("mine")
    assert f"{path}: does not declare CITATION, find_series" in str(refused.value)


def test_one_that_simulates_its_patients_says_how_many_there_are(mine):
    mine("TITLE = CITATION = 'Mine'\nload_scan = find_series = simulate = print\n")
    with pytest.raises(ConfigError, match=r"mine.py: does not declare Settings, size\."):
        sources.source_of("mine")


def test_an_unknown_source_is_named():
    with pytest.raises(ConfigError, match=r"there is no source 'index'\. Available: images, lidc, luna16, phantom"):
        sources.source_of("index")


TOY = '''
"""Lungs in a box."""
import numpy as np
from lungddpm.config.sections import Section
from lungddpm.core.volume import Volume
from lungddpm.sources import Scan, Series, Size

TITLE = "lungs in a box"
CITATION = "None."

class Settings(Section):
    """A box of patients."""

    patients: int = 3
    """Number of patients."""

def size(settings):
    return Size(settings.patients, 64**3, "the box")

def simulate(settings, seed, output, threads):
    output.mkdir(parents=True)
    for number in range(settings.patients):
        (output / f"{number}.seed").write_text(str(seed + number))

def find_series(path, cache):
    found = []
    for file in sorted(path.glob("*.seed")):
        name = f"toy-{file.stem}"
        cache.recall(name, [file], lambda file=file: file.read_text())
        found.append(Series(name, name, f"1.{file.stem}", (64, 64, 64), (5.0, 5.0, 5.0), 1, file.name))
    return found

def load_scan(path, case):
    rng = np.random.default_rng(int((path / case["path"]).read_text()))
    x, y, z = np.indices((64, 64, 64)) - 31.5
    labels = np.zeros((64, 64, 64), np.uint8)
    for side in (-14, 14):
        labels[((x - side) / 11) ** 2 + (y / 15) ** 2 + (z / 22) ** 2 < 1] = 1
    labels[(x - 14) ** 2 + y**2 + z**2 < 9] = 2
    labels[((x + 14) ** 2 + y**2 < 6) & (labels == 1)] = 3
    hu = np.where(x**2 / 29**2 + y**2 / 25**2 < 1, 40, -1000)
    hu = np.where(labels == 1, -850, np.where(labels > 1, 50, hu)) + rng.normal(0, 5, labels.shape)
    ct = Volume(hu.astype(np.int16), np.diag([5.0, 5.0, 5.0, 1.0]))
    return Scan(ct, labels=labels, files=(path / case["path"],))
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with one more file, and a function that runs Python with it."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(
        Path(lungddpm.__file__).parent, root / "lungddpm", ignore=shutil.ignore_patterns("__pycache__", "workflow")
    )
    (root / "lungddpm/sources/toy.py").write_text(TOY)
    (root / "config.yaml").write_text(
        yaml.safe_dump({"source": {"kind": "toy", "toy": {"patients": 4}}, "grid": {"size": [32, 32, 32]}})
    )

    def call(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return root, call


def test_a_source_that_is_one_file_is_indexed_and_prepared(package):
    root, call = package
    for verb in (["simulate"], ["index"], ["prepare"], ["collect", "results/cases/cases-0.tsv"]):
        call("-m", "lungddpm", *verb)
    cases = pd.read_csv(root / "results/cases/cases.tsv", sep="\t")
    assert cases["case_id"].tolist() == ["toy-0", "toy-1", "toy-2", "toy-3"]
    assert (cases["status"] == "ok").all(), cases["reason"].tolist()
    assert (cases["source"] == "toy").all()
    assert (cases["n_nodules"] == 1).all()
    nodules = pd.read_csv(root / "results/cases/nodules.tsv", sep="\t")
    ball_mm3 = int(np.sum(np.sum((np.indices((64, 64, 64)) - [[[[45.5]]], [[[31.5]]], [[[31.5]]]]) ** 2, 0) < 9)) * 5**3
    assert nodules["volume_mm3"].to_numpy() == pytest.approx(ball_mm3, rel=0.25)


def test_its_settings_are_keys_of_the_config_and_its_size_enters_the_plan(package):
    _, call = package
    schema = json.loads(call("-m", "lungddpm", "config", "schema"))
    assert schema["$defs"]["Source"]["properties"]["toy"]["default"] == {"patients": 3}
    assert "`toy`: lungs in a box" in call("-m", "lungddpm", "config", "schema", "--markdown")
    cohort = "from lungddpm.operations.plan import *; print(count_cohort(load_plan_config('config.yaml'), None, None))"
    assert "scans=4, voxels=262144, discovery=2" in call("-c", cohort)
