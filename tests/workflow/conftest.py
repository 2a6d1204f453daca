"""A tiny benchmark that goes through every rule, and helpers to drive Snakemake."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lungddpm.files import exclusive_lock

BIN = Path(sys.executable).parent
TINY = {
    "source": {
        "phantom": {"patients": 6, "matrix": 96, "pixel_mm": 3.6, "slice_mm": 6.0, "nodule_diameter_mm": [16, 30]},
    },
    "roles": {"discovery": 3, "reference": 1, "test": 2},
    "grid": {"size": [32, 32, 32], "extent": "lungs"},
    "diffusion": {
        "denoiser": {"base_channels": 8, "multipliers": [1, 2], "norm_groups": 4},
        "training": {"steps": 20, "crop": 16, "save_every": 5},
        "sampling": {"steps": 4},
    },
    "arms": {"doses": [1.0], "synthetic_only": ["lung_ddpm"]},
    "segmentation": {
        "network": {"patch": [16, 16, 16], "features": [4, 8]},
        "steps": 20,
        "save_every": 5,
        "n_folds": 3,
        "seeds": [0],
    },
    "verdict": {"bootstraps": 200},
    "workflow": {"case_shards": 1, "synthesis_shards": 1},
}  # fmt: skip


def merged(base: dict, overlay: dict) -> dict:
    """Nested values of both, the overlay winning."""
    both = {
        k: merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in overlay.items()
    }
    return {**base, **both}


class Benchmark:
    """One run in a folder of its own."""

    def __init__(self, repository: Path, folder: Path, values: dict):
        self.repository, self.folder, self.results = repository, folder, folder / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self.overlay = folder / "overlay.yaml"
        self.overlay.write_text(yaml.safe_dump(values))

    def command(self, *arguments: str) -> list:
        """`lungddpm run` with this folder and config."""
        fixed = ["--cores", "2", "--directory", self.folder, "--configfile", self.overlay]
        return [BIN / "lungddpm", "run", *fixed, *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run to the end; the output is in `stdout`."""
        return subprocess.run(
            self.command(*arguments), cwd=self.repository, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"}, check=False,
        )  # fmt: skip

    def table(self, name: str) -> pd.DataFrame:
        """A result table."""
        return pd.read_csv(self.results / "tables" / name)


@pytest.fixture(scope="session")
def make_benchmark(repository):
    """Factory: (folder, overlay over the tiny config) -> `Benchmark`, not yet run."""
    return lambda folder, overlay=None: Benchmark(repository, folder, merged(TINY, overlay or {}))


@pytest.fixture(scope="session")
def tiny_benchmark(make_benchmark, tmp_path_factory):
    """The finished tiny benchmark (about 1.5 minutes); tests read it, they do not change it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first process makes it for all
        folder = folder.parent
    benchmark = make_benchmark(folder / "tiny")
    with exclusive_lock(folder / "tiny.lock", "making the tiny benchmark"):
        if not (benchmark.results / "SHA256SUMS").exists():
            run = benchmark.run()
            assert run.returncode == 0, run.stdout[-8000:]
    return benchmark
