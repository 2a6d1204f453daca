"""Every job of a run by name: its stage, its log, its times, and the file whose existence marks it as done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.core.cohorts import count_real_cases
from lungddpm.segmentation.nnunet import weights_file


@dataclass(frozen=True)
class Job:
    """One job of the workflow; all paths are below the results folder."""

    stage: str
    """Its rule."""
    key: str
    """What distinguishes it from other jobs of its stage; empty if there is only one."""
    output: Path
    """It exists when the job has ended well; a directory may be incomplete."""

    @property
    def name(self) -> str:
        """As its log and its times are called, without suffix."""
        return f"{self.stage}-{self.key}" if self.key else self.stage

    @property
    def log(self) -> Path:
        """Its log; its process holds the lock of this file."""
        return Path("logs", f"{self.name}.log")

    @property
    def times(self) -> Path:
        """Seconds and memory that it took, written by Snakemake after it."""
        return Path("benchmarks", f"{self.name}.tsv")

    def is_done(self, results: Path) -> bool:
        """Whether what it makes is there."""
        # A directory is there from its first file on.
        if (results / self.output).is_dir():
            return (results / self.times).is_file()
        return (results / self.output).is_file()


def jobs_of(config: Config, prepare_jobs: int, discovery: int) -> list[Job]:
    """All jobs of a run in the order of the work, except those that only list or merge files.

    Args:
        config: of the run.
        prepare_jobs: how many share the scans; see `shards_of_scans`.
        discovery: how many usable discovery cases a dose is a multiple of.

    Raises:
        ConfigError: `arms.real_cases` names as many cases or more.
    """
    replicates, generators = config.segmentation.replicates(), [*config.arms.largest_doses()]
    return [
        *([Job("simulate", "", Path("source/.complete"))] if config.source.is_simulated else []),
        Job("index", "", Path("cases/index.tsv")),
        *(Job("prepare", str(shard), Path(f"cases/cases-{shard}.tsv")) for shard in range(prepare_jobs)),
        Job("collect", "", Path("cases/cases.tsv")),
        Job("qc", "", Path("qc/index.html")),
        *_trainings(config),
        *_draws(config, discovery),
        *_of_arms(config),
        *(Job("quality", name, Path(f"quality/{name}.csv")) for name in generators),
        *(
            Job("label_fidelity", name, Path(f"label_fidelity/{name}/metrics.csv"))
            for name in (replicates if generators else [])
        ),
        Job("write_report", "", Path("report.html")),
        Job("checksums", "", Path("SHA256SUMS")),
    ]


def shards_of_scans(config: Config, usable: Sequence[bool]) -> int:
    """How many jobs share the rows of an index in turns, so that each has a usable scan.

    Args:
        config: of the run.
        usable: of each row, whether its scan is.
    """
    places = [place for place, is_usable in enumerate(usable) if is_usable]
    jobs = config.workflow.prepare_jobs(len(places))
    while jobs > 1 and len({place % jobs for place in places}) < jobs:
        jobs -= 1
    return jobs


def _trainings(config: Config) -> Iterator[Job]:
    for trained in config.trained_generators():
        for cohort in config.trainings(trained.name):
            own = config.for_training(trained.name, cohort)
            key = own.model_folder.removeprefix("models/").replace("/", "-")
            yield Job("train_generator", key, Path(own.model_folder, "model.safetensors"))


def _draws(config: Config, discovery: int) -> Iterator[Job]:
    for name, doses in config.arms.drawn_doses_of().items():
        cohorts = [cohort for number in config.arms.numbers_of(name) for cohort in config.cohorts(name, number)]
        for cohort in cohorts:
            real_cases = count_real_cases(cohort.real_cases, discovery)
            for dose in doses:
                external = name in config.arms.external
                shards = 1 if external else config.workflow.synthesize_jobs(round(dose * real_cases))
                for shard in range(shards):
                    table = Path(f"synthetic/{name}/{cohort.name}/samples-{dose}-{shard}.tsv")
                    yield Job("synthesize", f"{name}-{cohort.name}-{dose}-{shard}", table)


def _of_arms(config: Config) -> Iterator[Job]:
    """Stage by stage; those without a filter's segmenters could not begin with a filtered arm."""
    arms, replicates = config.arms.all(), config.segmentation.replicates()
    runs = [(arm.name, replicate) for arm in arms for replicate in replicates]
    yield from (Job("compose", arm.name, Path(f"arms/{arm.name}/arm.json")) for arm in arms)
    for arm, replicate in runs:
        if config.has_own_draws(Arm.parse(arm).generator):
            yield Job("compose_draw", f"{arm}-{replicate}", Path(f"arms/{arm}/draws/{replicate}/draw.json"))
    yield from (Job("plan", arm.name, Path(f"arms/{arm.name}/plan.json")) for arm in arms)
    for each in arms:
        for fold in config.segmentation.folds:
            for seed in config.segmentation.seeds:
                key = f"{each.name}-{config.segmentation.replicate_name(fold, seed)}"
                yield Job("train_segmenter", key, weights_file(Path("arms", each.name), fold, seed))
    for arm, replicate in runs:
        yield Job("predict", f"{arm}-{replicate}", Path(f"segmentation/{arm}/{replicate}/predictions"))
    for arm, replicate in runs:
        if Arm.parse(arm).filtered:
            yield Job("filter_samples", f"{arm}-{replicate}", Path(f"filter/{arm}/{replicate}/filter.json"))
    for arm, replicate in runs:
        yield Job("evaluate", f"{arm}-{replicate}", Path(f"segmentation/{arm}/{replicate}/metrics.csv"))
