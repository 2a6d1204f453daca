"""The whole benchmark repeated with different seeds: are its controls as expected?

    python benchmarks/repeated_runs.py --seeds 1-10 --output /tmp/demo-runs
    python benchmarks/repeated_runs.py --seeds 1-20 --output /tmp/null --configfile config.yaml benchmarks/null.yaml

A seed decides the cohort, the roles, every training and every draw, so that the runs are independent. Each has a
folder, in which `lungddpm run` resumes after an interruption; once it is done, its tables are kept and the rest is
removed. At the end: a row per run; and the verdicts of each arm, counted over runs, with the exact 95 % interval of the
share of claims (Clopper and Pearson), and the mean, smallest and largest difference.

<output>/<seed>/tables/, report.html, manifest.json, done
<output>/verdict.csv and the like      the tables of all runs, with a column `seed`

To share the seeds among machines, copy these last tables to the next machine's <output>: seeds that are in them are not
run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from scipy import stats

from lungddpm.core.files import write_table, write_text
from lungddpm.core.text import signed
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.verdict.answer import ANSWER

TABLES = (
    "verdict", "instrument", "calibration", "label_fidelity", "run_spread", "variance_components", "image_quality",
    "timing",
)  # fmt: skip
FILES = ("report.html", "manifest.json")
DONE = "done"
"""An empty file, written last."""
LEVEL = 0.95


def main() -> None:
    """Run what is missing, then print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seeds_of, required=True, help="such as 1-10 or 3,5,8")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--configfile", type=Path, nargs="+", default=[Path("config.yaml")])
    parser.add_argument("--cores", default="all")
    options = parser.parse_args()
    elsewhere = set(kept(options.output, "verdict")["seed"])
    for seed in options.seeds:
        folder = options.output / str(seed)
        if seed not in elsewhere and not (folder / DONE).exists():
            run(options.configfile, seed, folder, options.cores)
        # After each, so that an interruption leaves the table of the runs so far.
        for name, rows in gather(options.output, options.seeds).items():
            write_table(options.output / f"{name}.csv", rows)
    verdicts, checks = (pd.read_csv(options.output / f"{name}.csv") for name in ("verdict", "instrument"))
    verdicts = verdicts[verdicts["metric"] == deciding_measure().column]
    print(by_seed(verdicts, checks).to_markdown(index=False, disable_numparse=True), "\n")
    print(counts(verdicts).to_markdown(index=False, floatfmt=".3f"))


def seeds_of(text: str) -> list[int]:
    """`1-4,7` -> [1, 2, 3, 4, 7]."""
    ranges = [part.split("-") for part in text.split(",")]
    return [seed for part in ranges for seed in range(int(part[0]), int(part[-1]) + 1)]


def run(configs: list[Path], seed: int, folder: Path, cores: str) -> None:
    """Take one run to its end, keep its tables and remove the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    overlay = folder / "seed.json"
    write_text(overlay, json.dumps({"seed": seed}))
    command = ["lungddpm", "run", "--cores", cores, "--directory", str(folder), "--quiet", "all"]
    files = [str(path.resolve()) for path in (*configs, overlay)]
    with (folder / "run.log").open("a", encoding="utf-8") as log:
        done = subprocess.run([*command, "--configfile", *files], stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.exit(f"seed {seed} ended with exit code {done.returncode}: see {folder / 'run.log'}")
    results = folder / "results"
    # Copied, not moved: should this be interrupted, the next start finds the run complete.
    for name in FILES:
        shutil.copyfile(results / name, folder / name)
    shutil.copytree(results / "tables", folder / "tables", dirs_exist_ok=True)
    write_text(folder / DONE, "")
    shutil.rmtree(results)
    shutil.rmtree(folder / ".snakemake")


def gather(output: Path, seeds: list[int]) -> dict[str, pd.DataFrame]:
    """The tables of all runs, by name."""
    found = {}
    for name in TABLES:
        paths = {seed: output / str(seed) / "tables" / f"{name}.csv" for seed in seeds}
        here = [pd.read_csv(path).assign(seed=seed) for seed, path in paths.items() if path.exists()]
        # An empty table would turn whole numbers into decimal ones.
        parts = [rows for rows in (kept(output, name), *here) if len(rows)]
        rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["seed"])
        rows = rows[rows["seed"].isin(seeds)]
        if len(rows):
            found[name] = rows.sort_values("seed", kind="stable")
    return found


def kept(output: Path, name: str) -> pd.DataFrame:
    """Rows of a former table of all runs whose seeds have no folder here: they were run on another machine."""
    path = output / f"{name}.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["seed"], dtype=int)
    here = [seed for seed in rows["seed"].unique() if (output / str(seed)).exists()]
    return rows[~rows["seed"].isin(here)]


def by_seed(verdicts: pd.DataFrame, checks: pd.DataFrame) -> pd.DataFrame:
    """One row per run: the mean of each baseline, the difference of each other arm with its verdict if that is a claim,
    and the answer.

    Args:
        verdicts: rows of `verdict.csv` of all runs, of the deciding measure.
        checks: rows of `instrument.csv` of all runs.
    """
    rows = []
    answers = checks[checks["check"] == ANSWER].set_index("seed")["status"]
    for seed, of_run in verdicts.groupby("seed"):
        cells = {"seed": seed}
        for row in of_run.to_dict("records"):
            claim = f", {row['verdict']}" if row["verdict"] in ("better", "worse") else ""
            is_baseline = row["verdict"] == "baseline"
            cells[row["arm"]] = f"{row['mean']:.2f}" if is_baseline else f"{signed(row['difference'], 2)}{claim}"
        rows.append(cells | {"answer": answers[seed]})
    return pd.DataFrame(rows)


def counts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: counts of its verdicts over runs, and the size of its differences.

    Args:
        verdicts: rows of `verdict.csv` of all runs, of the deciding measure.
    """
    rows = []
    for arm, of_arm in verdicts[verdicts["verdict"] != "baseline"].groupby("arm", sort=False):
        called = of_arm["verdict"].value_counts()
        n, claims = len(of_arm), int(called.get("better", 0) + called.get("worse", 0))
        low, high = stats.binomtest(claims, n).proportion_ci(LEVEL)
        rows.append(
            {"arm": arm, "runs": n, "better": called.get("better", 0), "worse": called.get("worse", 0)}
            | {"called anything": claims / n, "low": low, "high": high}
            | {"mean": of_arm["difference"].mean(), "smallest": of_arm["difference"].min()}
            | {"largest": of_arm["difference"].max(), "detectable": of_arm["detectable_difference"].median()}
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
