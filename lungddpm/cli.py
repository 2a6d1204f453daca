"""The command line: one thin command per stage. Heavy imports stay inside them, so that `--help` is quick."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lungddpm import __version__
from lungddpm.core.device import claim_device
from lungddpm.core.errors import UserError, from_os_error
from lungddpm.core.locks import hold_until_exit
from lungddpm.core.progress import LOG, adapt_terminal, is_first_process, start_logging, waiting
from lungddpm.core.shipped import default_config
from lungddpm.core.text import plural

if TYPE_CHECKING:
    from lungddpm.config.models import Config

app = typer.Typer(
    name="lungddpm",
    help="Does synthetic CT from a layout-guided diffusion model make a lung-nodule segmenter better?\n\n"
    "'lungddpm run' does everything through Snakemake; the other commands are its stages, in order.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
segment_app = typer.Typer(no_args_is_help=True, help="nnU-Net: plan, train, predict (one arm at a time).")
config_app = typer.Typer(no_args_is_help=True, help="Show, check and document the configuration.")
fetch_app = typer.Typer(no_args_is_help=True, help="Fetch a public data set.")
export_app = typer.Typer(no_args_is_help=True, help="Export cases or a denoiser to other formats.")
app.add_typer(segment_app, name="segment", rich_help_panel="Stages")
app.add_typer(config_app, name="config", rich_help_panel="Tools")
app.add_typer(fetch_app, name="fetch", rich_help_panel="Tools")
app.add_typer(export_app, name="export", rich_help_panel="Tools")

ConfigFiles = Annotated[
    list[str], typer.Option("--configfile", "-c", help="YAML or JSON file, or JSON; later files override earlier ones.")
]
ConfigOfRun = Annotated[
    list[str],
    typer.Option(
        "--configfile", "-c",
        default_factory=lambda: [str(default_config())], show_default="config.yaml, or the demo's",
        help="YAML or JSON file, or JSON; later files override earlier ones.",
    ),
]  # fmt: skip
CasesTable = Annotated[Path, typer.Option("--cases", help="Table of cases (cases.tsv).")]
ExternalTests = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FOLDER of an external test set; default: external_tests.NAME.path. Repeat for each set."),
]
SampleTables = Annotated[
    list[Path] | None, typer.Argument(help="Tables of synthetic cases, in order of shards (none for real arms).")
]
CohortName = Annotated[
    str,
    typer.Option("--cohort", help="all, or by number of real cases and replicate: real4, all-fold0_seed1."),
]
Shard = Annotated[int, typer.Option(min=0, help="Index of this shard, from 0.")]
Shards = Annotated[int, typer.Option(min=1, help="Number of shards that the work is split into.")]
Device = Annotated[
    str,
    typer.Option(
        help="auto (a GPU if there is one), cpu, cuda (the next free GPU), cuda:1 (the second visible one), mps."
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses all cores.")]
Fold = Annotated[int, typer.Option(min=0, help="Fold, from 0.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of this replicate.")]
ArmFolder = Annotated[Path, typer.Option("--arm-folder", help="Folder of the arm (results/arms/<arm>).")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for other programs (keys: docs/reference/command-line.md).")
]
DEFAULT_CONFIG = ["config.yaml"]
RESULTS = Path("results")
CASES = RESULTS / "cases" / "cases.tsv"
STAGES, TOOLS = "Stages", "Tools"


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lungddpm {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    log: Annotated[Path | None, typer.Option(help="Also write messages to this file.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    start_logging(log)
    if log is not None and is_first_process():
        hold_until_exit(log)  # by this, `status` knows that the stage runs


class _PassedOn(TyperCommand):
    """A command whose arguments are those of another program, `--help` and `--` included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # a context of click, which typer keeps to itself
        ctx.args = args
        return args


@app.command(cls=_PassedOn)
def run(context: typer.Context) -> None:
    """Run the whole benchmark through Snakemake, one run per folder; all arguments are passed on to snakemake.

    The same command continues an interrupted run; a second run in the same folder is refused.
    Inputs: config.yaml (by default the demo's) and --configfile overlays.
    Outputs: results/ in the working directory (or --directory).
    Example: lungddpm run --cores all --configfile config/lidc.yaml --configfile my_paths.yaml
    """
    from lungddpm.operations.run import run_snakemake

    if {"--help", "-h"} & set(context.args):
        typer.echo(f"{context.get_help()}\n\nArguments of snakemake:\n")
        sys.stdout.flush()
    raise typer.Exit(run_snakemake(context.args))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to copy to; created if it does not exist.")] = Path(),
) -> None:
    """Copy config.yaml, the overlays (config/) and the profiles (profiles/) into a folder, for editing."""
    from lungddpm.core.shipped import copy_to_edit

    for path in copy_to_edit(folder):
        typer.echo(folder / path)
    typer.echo("Edit config.yaml, then start 'lungddpm run' in that folder.")


@app.command(rich_help_panel=STAGES)
def simulate(
    config: ConfigFiles = DEFAULT_CONFIG,
    output: Annotated[Path, typer.Option(help="Folder to write it to.")] = RESULTS / "source",
    threads: Threads = 0,
) -> None:
    """Write the cohort of a simulated source (phantom: DICOM in HU, LIDC-style reader XML in pixels)."""
    from lungddpm.config.loading import load_config
    from lungddpm.core.errors import ConfigError

    settings = load_config(*config)
    declared = settings.source.declared
    if declared.simulate is None:
        raise ConfigError(
            "source.kind", f"'{declared.name}' is not simulated: nothing to write", "Continue with 'lungddpm index'."
        )
    processes = _set_threads(threads)
    _set_threads(1)  # of each process
    declared.simulate(settings.source.settings, settings.seed, output, processes)


@app.command(rich_help_panel=STAGES)
def index(
    config: ConfigFiles = DEFAULT_CONFIG,
    source: Annotated[Path | None, typer.Option(help="Folder of the data set; default: source.path.")] = None,
    external_test: ExternalTests = None,
    output: Annotated[Path, typer.Option(help="Table to write, one row per CT series.")] = RESULTS / "cases/index.tsv",
) -> None:
    """List every CT series of the source and of external test sets from its headers (sizes in voxels, spacings in mm)
    and assign roles."""
    from lungddpm.arms.splits import assign_roles
    from lungddpm.config.loading import load_config
    from lungddpm.sources.index import index_source, join_data_sets, key_of, write_index

    settings = load_config(*config, needs_source=source is None)
    folder, cache = _source_folder(settings, source), output.with_suffix(".cache.json")
    found = index_source(settings.source.kind, folder, cache, settings.source.reading())
    externals = {}
    for name, folder in _external_folders(settings, external_test).items():
        each, cache = settings.external_tests[name], output.with_suffix(f".{name}.cache.json")
        externals[name] = index_source(each.kind, folder, cache, each.reading(), key_of(name))
    distinct = {name for name, each in settings.external_tests.items() if each.distinct_patients}
    try:
        found = join_data_sets(found, externals, distinct)
        found = assign_roles(found, settings.roles, settings.seed)
    finally:
        # If too few series are usable, their rows give the reasons.
        write_index(output, found)


@app.command(rich_help_panel=STAGES)
def prepare(
    config: ConfigFiles = DEFAULT_CONFIG,
    index: Annotated[Path, typer.Option(help="Table written by 'index'.")] = RESULTS / "cases/index.tsv",
    source: Annotated[Path | None, typer.Option(help="Folder of the data set; default: source.path.")] = None,
    external_test: ExternalTests = None,
    output: Annotated[Path, typer.Option(help="Folder for the cases.")] = RESULTS / "cases",
    shard: Shard = 0,
    shards: Shards = 1,
    table: Annotated[Path, typer.Option(help="Table of this shard's cases to write.")] = RESULTS / "cases/cases-0.tsv",
) -> None:
    """Convert scans to cases: ct.nii.gz (int16 HU) and layout.nii.gz on the model grid, nodules.nii.gz, case.json."""
    from lungddpm.config.loading import load_config
    from lungddpm.layouts.compose import run_prepare

    settings = load_config(*config, needs_source=source is None)
    with claim_device("cpu" if settings.layouts.lungs == "classical" else "auto"):
        folders = _external_folders(settings, external_test)
        run_prepare(settings, index, _source_folder(settings, source), output, shard, shards, table, folders)


@app.command(rich_help_panel=STAGES)
def collect(
    tables: Annotated[list[Path], typer.Argument(help="Tables of all shards, as written by 'prepare'.")],
    config: ConfigFiles = DEFAULT_CONFIG,
    output: Annotated[Path, typer.Option(help="Merged table to write; nodules.tsv goes beside it.")] = CASES,
) -> None:
    """Merge the shards' tables into cases.tsv, list nodules in nodules.tsv, check that every role has cases."""
    from lungddpm.config.loading import load_config
    from lungddpm.layouts.collect import run_collect

    run_collect(load_config(*config), tables, output)


@app.command(rich_help_panel=STAGES)
def qc(
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    output: Annotated[Path, typer.Option(help="Folder for the pages, next to that of the cases.")] = RESULTS / "qc",
) -> None:
    """Write pages for checking layouts by eye: contours over each scan in three planes, figures (litres, mm, %)."""
    from lungddpm.config.loading import load_config
    from lungddpm.report.layout_pages import run_qc

    run_qc(load_config(*config), cases, output)


@app.command(rich_help_panel=STAGES)
def train(
    config: ConfigFiles = DEFAULT_CONFIG,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Generator to train: a module of lungddpm/generators/, or a variant in config.",
            show_default="the only one that the arms train",
        ),
    ] = None,
    cases: CasesTable = CASES,
    cohort: CohortName = "all",
    output: Annotated[
        Path | None, typer.Option(help="Folder; default results/models/<generator>/<run>/<cohort>.")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option("--init", help="Weights to start from: model.safetensors, or a published .pt.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over; by default training resumes.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only estimate memory, time and disk; writes nothing.")
    ] = False,
) -> None:
    """Train a generator on the discovery cases, or a subset: model.safetensors (EMA weights), history.csv, and state/
    for resuming.

    On several GPUs: torchrun --nproc-per-node 4 --no-python -- lungddpm train ...
    """
    from lungddpm.config.loading import load_config
    from lungddpm.core.cohorts import Cohort

    complete = load_config(*config, needs_source=False)
    settings = complete.for_training(generator or complete.only_trained_generator(), Cohort.parse(cohort))
    _set_threads(threads)
    with claim_device(device) as claimed:
        if estimate:
            _load("lungddpm.operations.estimate")
            from lungddpm.operations.estimate import run_estimate

            run_estimate(settings, claimed)
            return
        _load("lungddpm.models.training")
        from lungddpm.generators import plugin
        from lungddpm.models.training import run_train

        recipe, preview = plugin(settings.kind).training(settings)
        folder = output or RESULTS / settings.model_folder
        run_train(settings, recipe, preview, cases, folder, claimed, initial, restart=restart)


@app.command(rich_help_panel=STAGES)
def synthesize(
    generator: Annotated[
        str, typer.Option(help="Module of lungddpm/generators/, a variant in config, or a name in arms.external.")
    ],
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    weights: Annotated[
        Path | None, typer.Option(help="Weights, for generators that need them: model.safetensors, or a published .pt.")
    ] = None,
    cohort: CohortName = "all",
    output: Annotated[Path | None, typer.Option(help="Folder; default results/synthetic/<generator>/<cohort>.")] = None,
    dose: Annotated[
        float | None, typer.Option(help="Samples per real training case; default: the largest in config.")
    ] = None,
    external: Annotated[
        Path | None, typer.Option(help="Folder of samples from another system; default: arms.external.")
    ] = None,
    shard: Shard = 0,
    shards: Shards = 1,
    table: Annotated[
        Path | None, typer.Option(help="Table to write; default samples-<dose>-<shard>.tsv there.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Draw synthetic cases from references and layouts: CT (int16 HU) and layout on the reference's own grid."""
    from lungddpm.config.loading import load_config

    settings = load_config(*config)
    _set_threads(threads)
    folder = output or RESULTS / "synthetic" / generator / cohort
    if dose is None:
        dose = settings.arms.largest_doses().get(generator)
    samples = table or folder / f"samples-{dose}-{shard}.tsv"
    # Generators without a network do not need a GPU.
    with claim_device(device if weights else "cpu") as claimed:
        if weights:
            _load("lungddpm.models.sampling")
        from lungddpm.core.cohorts import Cohort
        from lungddpm.synthesis.run import SynthesisJob, run_synthesize

        made = Cohort.parse(cohort)
        job = SynthesisJob(generator, cases, folder, samples, shard, shards, dose, weights, external, claimed, made)
        run_synthesize(settings, job)


@app.command(rich_help_panel=STAGES)
def compose(
    arm: Annotated[str, typer.Option(help="Name of the arm, e.g. real+lung_ddpm@1.0.")],
    samples: SampleTables = None,
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    output: Annotated[Path | None, typer.Option(help="Folder of the arm; default results/arms/<arm>.")] = None,
    filters: Annotated[
        list[Path] | None,
        typer.Option("--filter", help="For a filtered arm: filter.json of each segmenter that judged its samples."),
    ] = None,
    replicate: Annotated[
        str | None, typer.Option(help="Add the samples drawn for this replicate only: fold0_seed1.")
    ] = None,
) -> None:
    """Compose a training set (nnU-Net raw dataset, HU) from real and synthetic cases, behind the leak guard."""
    from lungddpm.arms.compose import run_compose, run_compose_draw
    from lungddpm.config.loading import load_config
    from lungddpm.core.arms import Arm

    settings, folder = load_config(*config), output or RESULTS / "arms" / Arm.parse(arm).name
    if replicate is None:
        run_compose(settings, arm, cases, samples or [], folder, filters or [])
    else:
        run_compose_draw(settings, arm, replicate, cases, samples or [], folder, filters or [])


@segment_app.command("plan")
def segment_plan(
    arm_folder: ArmFolder,
    config: ConfigFiles = DEFAULT_CONFIG,
    plans_from: Annotated[Path, typer.Option(help="Folder of the arm that plans are made on.")] = RESULTS / "arms/real",
    threads: Threads = 1,
) -> None:
    """Preprocess one arm with the plans made on 'real'; for 'real' itself, make them first."""
    from lungddpm.config.loading import load_config

    settings, threads = load_config(*config), _set_threads(threads)
    from lungddpm.segmentation.nnunet import run_plan_segmenter

    run_plan_segmenter(settings, arm_folder, None if arm_folder == plans_from else plans_from, threads)


@segment_app.command("train")
def segment_train(
    arm_folder: ArmFolder,
    fold: Fold = 0,
    seed: Seed = 0,
    config: ConfigFiles = DEFAULT_CONFIG,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train nnU-Net on one arm for the number of steps in config; resumes an interrupted training."""
    from lungddpm.config.loading import load_config

    settings, threads = load_config(*config), _set_threads(threads)
    with claim_device(device) as claimed:
        _load("lungddpm.core.torch_device")
        from lungddpm.segmentation.nnunet import run_train_segmenter

        run_train_segmenter(settings, arm_folder, fold, seed, claimed, threads)


@segment_app.command("predict")
def segment_predict(
    arm_folder: ArmFolder,
    output: Annotated[Path, typer.Option(help="Folder for the predicted masks, one NIfTI file (0, 1) per test case.")],
    fold: Fold = 0,
    seed: Seed = 0,
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment the nodules of every test case with a trained replicate."""
    from lungddpm.config.loading import load_config

    settings, threads = load_config(*config), _set_threads(threads)
    with claim_device(device) as claimed:
        _load("lungddpm.core.torch_device")
        from lungddpm.segmentation.nnunet import run_predict

        run_predict(settings, arm_folder, fold, seed, cases, output, claimed, threads)


@app.command("filter", rich_help_panel=STAGES)
def filter_samples(
    samples: Annotated[list[Path], typer.Argument(help="Tables of the candidates, in order of shards.")],
    arm: Annotated[str, typer.Option(help="Name of the filtered arm, e.g. real+lung_ddpm.filtered@1.0.")],
    output: Annotated[Path, typer.Option(help="Folder for samples.csv (one row per sample) and filter.json.")],
    arm_folder: ArmFolder = RESULTS / "arms/real",
    fold: Fold = 0,
    seed: Seed = 0,
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment the candidates of a filtered arm with a replicate trained on the same real cases alone: share of their
    nodule voxels that it finds."""
    from lungddpm.config.loading import load_config

    settings, threads = load_config(*config), _set_threads(threads)
    with claim_device(device) as claimed:
        _load("lungddpm.core.torch_device")
        from lungddpm.quality.sample_filter import run_filter

        run_filter(settings, arm, arm_folder, fold, seed, cases, samples, output, claimed, threads)


@app.command(rich_help_panel=STAGES)
def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder with <case>.nii.gz masks of all test cases.")],
    output: Annotated[
        Path, typer.Option(help="Folder for metrics.csv (one row per case), lesions.csv, candidates.csv.")
    ],
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
) -> None:
    """Compare predictions with the test cases' nodules: Dice, sensitivity, ... (ratios), distances (mm), volumes (mm3).

    For FROC, lesions get scores if PREDICTIONS/probability/<case>.nii.gz exist.
    """
    from lungddpm.config.loading import load_config
    from lungddpm.evaluation.segmentation import run_evaluate

    run_evaluate(load_config(*config), cases, predictions, output)


@app.command(rich_help_panel=STAGES)
def quality(
    samples: Annotated[list[Path], typer.Argument(help="Tables of synthetic cases, in order of shards.")],
    generator: Annotated[str, typer.Option(help="Generator whose samples to judge.")],
    output: Annotated[Path, typer.Option(help="Table to write, one row per sample and measure, and NAME-sets.csv.")],
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    weights: Annotated[
        Path | None, typer.Option(help="MedicalNet's public file; default: image_quality.weights.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Judge synthetic CT: error against its references by region (on [0, 1] over grid.window_hu), FID, MMD, diversity,
    nearness to the training cases; each with floors to compare with."""
    from lungddpm.config.loading import load_config

    settings = load_config(*config)
    if weights is not None:
        judging = settings.image_quality.model_copy(update={"weights": weights})
        settings = settings.model_copy(update={"image_quality": judging})
    _set_threads(threads)
    _load("lungddpm.quality.image_quality")
    from lungddpm.quality.image_quality import run_quality

    run_quality(settings, cases, samples, generator, output)


@app.command(rich_help_panel=STAGES)
def label_fidelity(
    samples: Annotated[list[Path], typer.Argument(help="Tables of synthetic cases: the shards of every generator.")],
    output: Annotated[Path, typer.Option(help="Folder for metrics.csv (one row per case) and lesions.csv.")],
    arm_folder: ArmFolder = RESULTS / "arms/real",
    fold: Fold = 0,
    seed: Seed = 0,
    config: ConfigFiles = DEFAULT_CONFIG,
    cases: CasesTable = CASES,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment synthetic CT with a replicate trained on real cases: Dice and lesions found against the sample's layout.

    The references' real CT is segmented as well, as the ceiling.
    """
    from lungddpm.config.loading import load_config

    settings, threads = load_config(*config), _set_threads(threads)
    with claim_device(device) as claimed:
        _load("lungddpm.core.torch_device")
        from lungddpm.quality.label_fidelity import run_label_fidelity

        run_label_fidelity(settings, arm_folder, fold, seed, cases, samples, output, claimed, threads)


@app.command(rich_help_panel=STAGES)
def report(
    config: ConfigFiles = DEFAULT_CONFIG,
    results: Annotated[Path, typer.Option(help="Folder of a run; tables/, figures/, report.html go there.")] = RESULTS,
) -> None:
    """Compute the verdict from the metrics of all arms: tables, figures, report.html, manifest.json."""
    from lungddpm.config.loading import load_config
    from lungddpm.report.page import run_report

    run_report(load_config(*config), results)


@app.command(rich_help_panel=STAGES)
def checksums(
    results: Annotated[Path, typer.Option(help="Folder of a run; SHA256SUMS goes there.")] = RESULTS,
) -> None:
    """Write SHA256SUMS: hashes of everything that the run computed, for 'verify' and for sha256sum --check."""
    from lungddpm.operations.verify import run_checksums

    run_checksums(results)


@app.command(rich_help_panel=TOOLS)
def verify(
    results: Annotated[Path, typer.Option(help="Folder of a finished run.")] = RESULTS,
    repair: Annotated[bool, typer.Option(help="Delete damaged files, so that 'run' makes them again.")] = False,
) -> None:
    """Find files of a finished run that have since been truncated, changed or deleted (by SHA-256)."""
    from lungddpm.operations.verify import run_verify

    found = run_verify(results, repair)
    if not found:
        typer.echo(f"{results}: unchanged since the run.")
    elif repair:
        deleted = plural(sum(bool(damage.outputs) for damage in found), "damaged file")
        typer.echo(f"Deleted {deleted}. The same 'lungddpm run' makes them again.")
    else:
        damaged = plural(len(found), "damaged file")
        typer.echo(f"{damaged}. 'lungddpm verify --repair' deletes them; 'lungddpm run' then makes them again.")
        raise typer.Exit(2)


@app.command(rich_help_panel=TOOLS)
def verdict(
    results: Annotated[Path, typer.Option(help="Folder of a finished run.")] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Print the verdict of a finished run and the path of its report."""
    from lungddpm.report.terminal import verdict_table_text, verdict_values

    _print_json(verdict_values(results)) if as_json else typer.echo(verdict_table_text(results))


@app.command(rich_help_panel=TOOLS)
def status(
    results: Annotated[Path, typer.Option(help="Folder of a run, under way or not.")] = RESULTS,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--configfile", "-c", help="Config of the run; default: config.json in its folder, else config.yaml."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run has done, what it is doing and when it will end (as a range); starts nothing.

    Works from another terminal or another node while the run is under way, and after it was killed.
    """
    from lungddpm.operations.plan import load_plan_config
    from lungddpm.operations.status import describe_status, run_status, status_values

    record = results / "config.json"
    sources = config or [str(record if record.exists() else default_config())]
    found = run_status(load_plan_config(*sources), results)
    _print_json(status_values(found)) if as_json else typer.echo(describe_status(found))


@export_app.command("checkpoint")
def export_checkpoint(
    weights: Annotated[Path, typer.Option(help="Denoiser trained here (model.safetensors).")],
    output: Annotated[Path, typer.Option(help="File to write (.pt).")],
) -> None:
    """Write a trained denoiser in the format of the published checkpoints (.pt: step, model, ema)."""
    _load("lungddpm.models.published_checkpoint")
    from lungddpm.models.published_checkpoint import export_published

    export_published(weights, output)


@export_app.command("dicom")
def export_dicom(
    cases: Annotated[list[Path], typer.Argument(help="Folders of cases: results/cases/<case>, results/synthetic/...")],
    output: Annotated[Path, typer.Option(help="Folder to write to; made if it does not exist.")],
    predictions: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with <case>.nii.gz masks (0, 1) of all these cases; can be given more than once."),
    ] = None,
) -> None:
    """Write cases as DICOM, for a PACS viewer: CT (HU) as a series, layout and predictions as SEG objects.

    Every file is marked as derived, synthetic CT also as synthetic; a second export is byte-identical. SEG objects need
    the optional package highdicom. Outputs: OUTPUT/<case>/CT/*.dcm, OUTPUT/<case>/SEG/*.dcm.
    Example: lungddpm export dicom results/synthetic/lung_ddpm/all-fold0_seed0/*/ --output dicom
    """
    from lungddpm.operations import export

    for line in export.export_dicom(cases, output, predictions or []):
        typer.echo(line)


@app.command(rich_help_panel=TOOLS)
def plan(
    config: ConfigOfRun,
    cases: Annotated[int | None, typer.Option(min=1, help="Number of scans, if there is no table.")] = None,
    index: Annotated[Path | None, typer.Option(help="Table of the scans; default: this run's, if any.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or a GPU such as a100, h100.")] = "cpu",
    step_seconds: Annotated[
        float | None, typer.Option(help="Seconds per optimizer step on that device, as shown by 'train --estimate'.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(help="Output of 'lungddpm bench' on that machine.")] = None,
    power: Annotated[
        bool, typer.Option("--power", help="Show the power of this and similar designs, with their hours.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="With --power: folder of a finished run to take variances and times from.")
    ] = None,
    run_sd: Annotated[
        float | None, typer.Option(min=0, help="With --power: sd of Dice between training runs (arm x replicate).")
    ] = None,
    residual_sd: Annotated[
        float | None, typer.Option(min=0, help="With --power: residual sd (arm x replicate x case).")
    ] = None,
    arm_case_sd: Annotated[
        float | None, typer.Option(min=0, help="With --power: sd between cases, the same in all runs (arm x case).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show jobs, GPU and core hours, memory (GiB) and disk (GiB) of every stage before a run; writes nothing.

    With --power instead: for replicates x test cases, the difference in Dice that can be detected, the power for
    `verdict.relevant_difference`, and the hours.
    """
    if index is not None and not index.exists():
        from lungddpm.core.errors import InputError

        raise InputError(index, "does not exist", f"Write it with 'lungddpm index --output {index}'.")
    tables = [index] if index else [CASES, CASES.with_name("index.tsv")]
    if power:
        from lungddpm.operations.design import Assumed, describe_designs, design_values, run_design

        assumed = Assumed(run_sd, residual_sd, arm_case_sd)
        designs = run_design(config, tables, cases, device, step_seconds, bench, results, assumed)
        _print_json(design_values(designs)) if as_json else typer.echo(describe_designs(designs))
        return
    from lungddpm.operations.plan import describe_plan, plan_values, run_plan

    planned = run_plan(config, tables, cases, device, step_seconds, bench)
    _print_json(plan_values(planned)) if as_json else typer.echo(describe_plan(planned))


@app.command(rich_help_panel=TOOLS)
def bench(
    size: Annotated[int, typer.Option(min=16, help="Edge of the volumes in voxels.")] = 64,
    base: Annotated[int, typer.Option(min=1, help="Base channels of the published network.")] = 64,
    option: Annotated[list[str] | None, typer.Option(help="Measure only this option; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per option, each beside the base.")] = 3,
    longest: Annotated[float, typer.Option(help="Extrapolate samplings longer than this (seconds).")] = 120.0,
    training: Annotated[bool, typer.Option(help="Measure training as well.")] = True,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS / "bench.json",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure how fast the denoiser trains and samples here with each option: ratios to the base, seconds."""
    _set_threads(threads)
    with claim_device(device) as claimed:
        _load("lungddpm.operations.bench")
        from lungddpm.operations.bench import run_bench

        run_bench(claimed, size, base, option or [], rounds, longest, training, output)


@fetch_app.command("lidc")
def fetch_lidc(
    patients: Annotated[str, typer.Option(help="A number (of patients with nodules), comma-separated ids, or all.")],
    output: Annotated[Path, typer.Option(help="Folder of the data set; created if it does not exist.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation above 20 GB.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Show what would be fetched without fetching it.")
    ] = False,
) -> None:
    """Fetch LIDC-IDRI from the Imaging Data Commons: CT, and the readers' nodules as DICOM SEG (sizes in GB).

    The same command resumes an interrupted download; number and size of the files of every series are checked.
    Inputs: the index in the optional package idc-index. Outputs: the data set, and a lidc.yaml that points to it.
    Example: lungddpm fetch lidc --patients 20 --output /data/LIDC-IDRI
    """
    from lungddpm.core.errors import InputError
    from lungddpm.operations import fetch

    with waiting("reading the index"):
        items = fetch.select(fetch.read_index(), patients)
        missing = [item for item in items if not item.is_complete(output)]
    typer.echo("\n".join(fetch.describe(items, missing, output)))
    if estimate:
        return
    if sum(item.size for item in missing) > fetch.LARGE_BYTES and not yes:
        if not sys.stdin.isatty():
            raise InputError("--yes", "is needed for more than 20 GB", "Add it, or choose fewer patients.")
        typer.confirm("Fetch all of this?", abort=True)
    fetch.fetch(items, output, fetch.by_idc)
    config = fetch.write_config(output)
    typer.echo(f"Licence: {fetch.LICENCE}\nPlease cite:\n  " + "\n  ".join(fetch.CITATIONS))
    typer.echo(f"Next: lungddpm run --cores all --configfile config/lidc.yaml --configfile {config}")


@config_app.command("show")
def config_show(config: ConfigOfRun) -> None:
    """Print the complete configuration, defaults included, as YAML."""
    import yaml

    from lungddpm.config.loading import load_config

    typer.echo(yaml.safe_dump(load_config(*config).model_dump(mode="json"), sort_keys=False), nl=False)


@config_app.command("validate")
def config_validate(config: ConfigOfRun) -> None:
    """Check names, types, limits and combinations; list the arms and replicates that will run."""
    from lungddpm.config.loading import load_config

    settings = load_config(*config)
    typer.echo(
        f"{' + '.join(map(str, config))}: valid. Arms: {', '.join(settings.arms.names())}; "
        f"replicates: {', '.join(settings.segmentation.replicates())}."
    )


@config_app.command("schema")
def config_schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Every key as Markdown (config/README.md).")] = False,
) -> None:
    """Print the JSON schema of the configuration (workflow/schemas/config.schema.json)."""
    from lungddpm.config.reference import json_schema, markdown_reference

    typer.echo(markdown_reference() if markdown else json.dumps(json_schema(), indent=2))


@app.command(rich_help_panel=TOOLS)
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, free disk and memory, and what is missing."""
    from lungddpm.operations.doctor import describe, machine

    with waiting("loading torch"):
        found = machine()
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(describe(found)))
    for problem in found["missing"]:
        typer.echo(f"missing: {problem}", err=True)
    if found["missing"]:
        raise typer.Exit(2)


def main() -> None:
    """Entry point: user errors end with exit code 2 and one message, our bugs with 1 and a traceback."""
    adapt_terminal()
    try:
        app()
    except UserError as error:
        _refuse(error)
    except Exception as error:
        if (known := from_os_error(error)) is not None:
            _refuse(known)
        LOG.error(traceback.format_exc())
        sys.exit(1)


def _refuse(error: UserError) -> None:
    from lungddpm.operations.run import report_error

    LOG.error("error: %s", error)
    report_error(error)
    sys.exit(2)


def _print_json(values: dict[str, Any]) -> None:
    from lungddpm.core.files import json_text

    typer.echo(json_text(values))


def _load(module: str) -> None:
    """Import a module that needs torch, and report it if that takes long. Not before a GPU is claimed."""
    with waiting("loading torch"):
        importlib.import_module("torch")
        importlib.import_module(module)


def _source_folder(settings: Config, source: Path | None) -> Path:
    if source is not None:
        # A shell leaves --source=~/scans as it is.
        return Path(os.path.expanduser(source))
    folder = settings.source.path
    # Only a simulated source does not need a folder.
    return RESULTS / "source" if settings.source.is_simulated or folder is None else folder


def _external_folders(settings: Config, given: list[str] | None) -> dict[str, Path]:
    """The folder of each external test set, by its name."""
    from lungddpm.core.errors import ConfigError

    folders = {name: each.path or Path() for name, each in settings.external_tests.items()}
    for text in given or []:
        name, _, folder = text.partition("=")
        if name not in folders or not folder:
            known = ", ".join(folders) or "none"
            problem = "is not NAME=FOLDER of an external test set"
            raise ConfigError(f"--external-test {text}", problem, f"Names are {known} (external_tests in the config).")
        folders[name] = Path(os.path.expanduser(folder))
    return folders


def _set_threads(threads: int) -> int:
    """Limit every library's threads (0: all cores); must come before torch and numpy's BLAS are loaded.

    Processes that torchrun starts on one machine share the cores.
    """
    count = max(1, (threads or os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(count)
    return count
