"""How true the HU of a trained generator are, by recipe and training seed, on a prepared cohort.

    python benchmarks/generator_calibration.py --cases results/cases/cases.tsv --output /tmp/calibration \
        --recipe epsilon '{}' --recipe v '{"prediction": "v"}' --seeds 11 12 13 --threads 1

A recipe is a name and what it changes of the generator's settings in the config. Each is trained once per seed on the
discovery cases, and draws every usable reference with its own layout. Samples and references are then compared as in
the calibration check: mean difference of HU in lungs, vessels and nodules, and the ratio of their spreads. Rows of
<output>/calibration.csv are kept, so that the study can be interrupted and extended. The last table is the mean over
samples by recipe and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lungddpm.config.loading import parse_config, read_values
from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.files import write_table
from lungddpm.core.roles import REFERENCE
from lungddpm.generators import Task, plugin
from lungddpm.models.training import run_train
from lungddpm.quality.calibration import compare_hu

KEYS = ["recipe", "seed"]


def main() -> None:
    """Train, draw and measure what is missing, then print the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", type=Path, nargs="+", default=[Path("config.yaml")])
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--generator", default="lung_ddpm")
    parser.add_argument("--recipe", nargs=2, action="append", metavar=("NAME", "JSON"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--references", type=int, help="draw no more than this many")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = options.output / "calibration.csv"
    for seed in options.seeds:
        for name, changes in options.recipe:
            rows = pd.read_csv(table) if table.exists() else pd.DataFrame(columns=KEYS)
            if ((rows["recipe"] == name) & (rows["seed"] == seed)).any():
                continue
            config = changed(read_values(*options.configfile), options.generator, json.loads(changes), seed)
            measured = measure(config, options.generator, options.cases, options.output / name / str(seed), options)
            write_table(table, pd.concat([rows, measured.assign(recipe=name, seed=seed)], ignore_index=True))
            print(summary(pd.read_csv(table)).to_markdown(floatfmt=".2f"), flush=True)


def changed(values: dict[str, Any], generator: str, changes: dict[str, Any], seed: int) -> Config:
    """The config with another seed and other settings of a generator."""
    overlay = json.dumps({"seed": seed, "generators": {generator: changes}})
    return parse_config(read_values(json.dumps(values), overlay))


def measure(config: Config, generator: str, table: Path, folder: Path, options: argparse.Namespace) -> pd.DataFrame:
    """Train a generator and compare what it draws; one row per sample, region and measure, and one for the seconds."""
    of_generator, declared = config.for_training(generator), plugin(generator)
    began = os.times().user
    run_train(of_generator, *declared.training(of_generator), table, folder, "cpu")
    trained = os.times().user
    drawer = declared.load(of_generator, folder / "model.safetensors", "cpu")
    rows = []
    references = cases.usable(cases.read_cases(table), REFERENCE)
    for _, row in references.head(options.references or len(references)).iterrows():
        ct, layout = cases.folder_of(table, row).read()
        (made,) = drawer.make([Task(ct, layout, seed=config.seed)])
        found = compare_hu(made, ct.array, layout.array, layout.array)
        rows += [{**each, "case_id": row["case_id"]} for each in found]
    seconds = {"training_cpu_s": trained - began, "drawing_cpu_s": os.times().user - trained}
    rows += [{"region": "", "metric": name, "value": value, "case_id": ""} for name, value in seconds.items()]
    return pd.DataFrame(rows).drop(columns="note")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over samples: a row per recipe and seed, a column per region and measure."""
    names = rows["region"].fillna("").str.split().str[0].fillna("") + " " + rows["metric"].str.removeprefix("hu_")
    return rows.assign(measure=names).pivot_table(index=KEYS, columns="measure", values="value", sort=False)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s")
