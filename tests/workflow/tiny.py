"""A tiny benchmark that goes through every rule, and what drives Snakemake through it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

BIN = Path(sys.executable).parent
TINY = {
    "source": {
        "phantom": {
            "patients": 6, "matrix": 96, "pixel_mm": 3.6, "slice_mm": 6.0,
            "nodules": [2, 4], "nodule_diameter_mm": [16, 30],
        },
    },
    "roles": {"discovery": 3, "reference": 1, "test": 2},
    "grid": {"size": [32, 32, 32], "extent": "lungs"},
    "generators": {
        "lung_ddpm": {
            "denoiser": {"base_channels": 8, "multipliers": [1, 2], "norm_groups": 4},
            "training": {"steps": 20, "crop": 16, "save_every": 5},
            "sampling": {"steps": 4},
        },
    },
    "arms": {"doses": [1.0], "controls": ["real"], "control_dose": 1.0, "synthetic_only": ["lung_ddpm"]},
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


TWO_ARMS = {"arms": {"controls": [], "synthetic_only": []}}
"""Over `TINY`: half of its arms, for what has to be run again."""


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


def rules_of(stdout: str) -> dict[str, int]:
    """How often each rule ran, or would run."""
    found = re.findall(r"^(\w+) +(\d+)$", stdout, re.MULTILINE)
    return {name: int(count) for name, count in found if name not in ("all", "total")}


def finished_rules(stdout: str) -> list[str]:
    """The rules of the jobs that have ended well, in this order."""
    return re.findall(r"^Finished jobid: \d+ \(Rule: (\w+)\)$", stdout, re.MULTILINE)


def assert_same_measures(benchmark: Benchmark, other: Benchmark) -> None:
    """All cases and lesions of a benchmark are measured as in another one, which may have more arms."""
    for name in ("cases.csv", "lesions.csv"):
        ours, theirs = benchmark.table(name), other.table(name)
        theirs = theirs[theirs["arm"].isin(ours["arm"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, theirs)
