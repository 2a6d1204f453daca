"""Which samples the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.cohorts import Cohort
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.quality.image_quality import SYNTHETIC, Sample, list_samples, read_sample, reference_of
from lungddpm.verdict.records import quality_files
from lungddpm.verdict.tables import read_csv


@dataclass(frozen=True)
class DisplaySample:
    """A sample to show, and why it was chosen."""

    generator: str
    case_id: str
    why: str
    sample: Sample


@dataclass(frozen=True)
class SharedSample:
    """A layout that several generators drew for the same reference."""

    case_id: str
    reference: Volume
    layout: Volume
    drawn: dict[str, Volume]
    """CT by generator."""


def samples_to_show(config: Config, results: Path) -> list[DisplaySample]:
    """A typical sample of every generator, then one of the worst of every generator."""
    ranked = {
        generator: ranked_samples(results, generator, config.cohorts(generator, config.arms.largest_number()))
        for generator in config.arms.largest_doses()
    }
    several = {name: folders for name, folders in ranked.items() if len(folders) > 1}
    chosen = [(name, folders[0], "") for name, folders in ranked.items() if len(folders) == 1]
    chosen += [(name, folders[len(folders) // 2], "median error in the lungs") for name, folders in several.items()]
    chosen += [(name, folders[-1], "largest error in the lungs") for name, folders in several.items()]
    return [
        DisplaySample(generator, folder.path.name, why, read_sample(folder, results / "cases" / cases.CASES))
        for generator, folder, why in chosen
    ]


def first_of_generators(shown: list[DisplaySample]) -> list[DisplaySample]:
    """The first sample of each generator, among those that have a reference to compare with."""
    first: dict[str, DisplaySample] = {}
    for one in shown:
        if one.sample.reference is not None:
            first.setdefault(one.generator, one)
    return list(first.values())


def shared_sample(config: Config, results: Path, shown: list[DisplaySample]) -> SharedSample | None:
    """The first of the samples shown that other generators drew as well; None if there is none.

    Samples of one reference and repeat have the same name. Their nodules can still differ, where they were placed by
    the cases that a generator learned from: then they are not compared.
    """
    number = config.arms.largest_number()
    folders = {name: _with_nodules(results, name, config.cohorts(name, number)) for name in config.arms.largest_doses()}
    for one in first_of_generators(shown):
        same = {name: of_name[one.case_id] for name, of_name in folders.items() if one.case_id in of_name}
        if (reference := one.sample.reference) and len(drawn := _drawn(same, reference.ct, one.sample.layout)) > 1:
            return SharedSample(one.case_id, reference.ct, one.sample.layout, drawn)
    return None


def _drawn(folders: Mapping[str, cases.CaseFolder], reference: Volume, layout: Volume) -> dict[str, Volume]:
    """CT of the samples with these nodules, by generator; left out where it is the reference's own."""
    read = {name: folder.read() for name, folder in folders.items()}
    nodules = layout.array == Label.NODULE
    return {
        name: ct
        for name, (ct, other) in read.items()
        if np.array_equal(other.array == Label.NODULE, nodules) and not np.array_equal(ct.array, reference.array)
    }


def ranked_samples(results: Path, generator: str, cohorts: Sequence[Cohort]) -> list[cases.CaseFolder]:
    """Folders of the samples of these cohorts that can be compared with a reference by eye, sorted by squared error in
    the lungs: those with the reference's own nodules, if there are any, else those with a nodule.

    Without measured image quality only the first sample with a nodule.
    """
    folders = _with_nodules(results, generator, cohorts)
    folders = folders[[reference_of(folder) is not None for folder in folders]]
    if folders.empty:
        return []
    if path := quality_files(results, [generator]).get(generator):
        quality = read_csv(path)
        mse = quality[(quality["image"] == SYNTHETIC) & (quality["metric"] == "mse")]
        mse = mse[mse["case_id"].isin(folders.index)].pivot(index="case_id", columns="region", values="value")
        # Next to a reference whose nodules are elsewhere, a sample shows little: those with its layout come first.
        own = mse[mse["nodules"].notna()]
        if len(ranked := (mse if own.empty else own).sort_values("lungs").index):
            return folders[ranked].tolist()
    return folders.iloc[:1].tolist()


def _with_nodules(results: Path, generator: str, cohorts: Sequence[Cohort]) -> pd.Series:
    """The folder of every sample with a nodule, by its name."""
    folder = results / "synthetic" / generator
    samples = list_samples([table for each in cohorts for table in sorted(folder.glob(f"{each.name}/samples-*.tsv"))])
    return samples[samples["n_nodules"] > 0].set_index("case_id")["folder"]
