"""The verdict of a run: tables, figures, one self-contained page, and a manifest of what it was made from."""

from __future__ import annotations

import base64
import json
import math
import platform
import subprocess
import textwrap
from collections import Counter
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

import lungddpm
from lungddpm import cases, drawing, generators
from lungddpm.config import Config
from lungddpm.doctor import versions
from lungddpm.files import sha256_of, write_json, write_text
from lungddpm.pages import Shown, render, show_excluded
from lungddpm.progress import LOG
from lungddpm.verdict import figures
from lungddpm.verdict.image_quality import SYNTHETIC, list_samples, read_sample
from lungddpm.verdict.segmentation import SIZE_BINS
from lungddpm.verdict.statistics import MINIMUM_CASES, POWER, caveats, count, format_p, signed
from lungddpm.verdict.tables import BASELINE, MEASURES, missing_replicates, quality_files, read_csv, write_tables


def run_report(config: Config, results: Path) -> None:
    """Reach the verdict of a run.

    Reads the metrics of all arms and replicates in the config, the cases, and what else the run left (image quality,
    samples, training history, arms, benchmarks; each may be missing). Writes `<results>/tables/`, `figures/`,
    `report.html` and `manifest.json`.

    Raises:
        InputError: metrics or `cases/cases.tsv` are missing or do not fit together.
    """
    case_table = cases.read_cases(results / "cases" / "cases.tsv")
    tables, written = write_tables(config, results)
    drawn = draw_figures(config, results, tables)
    written += [path for paths in drawn.values() for path in paths]
    composed = arm_files(config, results)
    arms = {arm: json.loads(path.read_text(encoding="utf-8")) for arm, path in composed.items()}
    manifest = describe_run(config, results, [*written, *composed.values()])
    write_text(
        results / "report.html",
        render_report(config, case_table, tables, drawn, arms, manifest, (results / "qc/index.html").exists()),
    )
    manifest["sha256"]["report.html"] = sha256_of(results / "report.html")
    write_json(results / "manifest.json", manifest)
    LOG.info("report: %s", results / "report.html")


def verdict_table_text(results: Path) -> str:
    """The verdict as plain text for a terminal: a table of Dice, a sentence an arm, and where the report lies.

    Raises:
        InputError: the run has no verdict yet.
    """
    verdict = read_csv(results / "tables" / "verdict.csv")
    rows = verdict[verdict["metric"] == next(iter(MEASURES))]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for head in ("arm", "Dice", "difference", "CI", "p", "verdict"):
        table.add_column(head, justify="left" if head in ("arm", "verdict") else "right", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            row["arm"], _number(row["mean"], ".3f"), _number(row["difference"], "+.3f"), _interval(row),
            _number(row["p_holm"], ".3f"), row["verdict"],
        )  # fmt: skip
    console = Console(file=StringIO(), width=100, no_color=True, highlight=False)
    console.print(table)
    console.print()
    for text in rows["sentence"]:
        console.print(textwrap.fill(text, 98, initial_indent="- ", subsequent_indent="  "), markup=False)
    console.print(f"\nReport: {results / 'report.html'}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def draw_figures(config: Config, results: Path, tables: dict[str, pd.DataFrame]) -> dict[str, list[Path]]:
    """Draw every figure that the run has data for, into `<results>/figures/`; SVG and PNG paths by figure name.

    Names: forest, dice_by_arm, montage-<generator>, training.
    """
    folder = results / "figures"
    measure, prose = next(iter(MEASURES.items()))
    drawn = {
        "forest": figures.forest_plot(tables["verdict"], MEASURES, config.verdict.confidence),
        "dice_by_arm": figures.case_plot(tables["cases"], measure, prose),
    }
    for generator in config.arms.largest_doses():
        if (folder_of_sample := typical_sample(results, generator)) is not None:
            sample = read_sample(folder_of_sample, results / "cases" / "cases.tsv")
            title = f"{generator}: sample {folder_of_sample.name}, made from {sample.reference_id}"
            drawn[f"montage-{generator}"] = figures.montage(sample.reference, sample.layout, sample.ct, title)
    history = results / "diffusion" / config.diffusion.run / "history.csv"
    if history.exists():
        drawn["training"] = figures.training_curve(read_csv(history))
    paths = {name: [folder / f"{name}{suffix}" for suffix in (".svg", ".png")] for name in drawn}
    for name, figure in drawn.items():
        drawing.save(figure, *paths[name])
    return paths


def typical_sample(results: Path, generator: str) -> Path | None:
    """Folder of the sample to show: with the reference's own nodules, if any has, and of median squared error in the
    lungs, not the best of all.

    Without measured image quality the first sample with a nodule; None where the generator has none.
    """
    samples = list_samples(sorted((results / "synthetic" / generator).glob("samples-*.tsv")))
    folders = samples[samples["n_nodules"] > 0].set_index("case_id")["folder"]
    if folders.empty:
        return None
    if path := quality_files(results, [generator]).get(generator):
        quality = read_csv(path)
        mse = quality[(quality["image"] == SYNTHETIC) & (quality["metric"] == "mse")]
        mse = mse[mse["case_id"].isin(folders.index)].pivot(index="case_id", columns="region", values="value")
        # Beside a reference whose nodules are elsewhere, a sample says little: those with its own layout come first.
        own = mse[mse["nodules"].notna()]
        ranked = (mse if own.empty else own).sort_values("lungs").index
        if len(ranked):
            return folders[ranked[len(ranked) // 2]]
    return folders.iloc[0]


def arm_files(config: Config, results: Path) -> dict[str, Path]:
    """The `arm.json` of every arm that has one."""
    paths = {arm: results / "arms" / arm / "arm.json" for arm in config.arms.names()}
    return {arm: path for arm, path in paths.items() if path.exists()}


def describe_run(config: Config, results: Path, files: list[Path]) -> dict[str, Any]:
    """What the verdict was made with and from; nothing in it names a machine, a user or an absolute path.

    Args:
        config: the run's config.
        results: its folder.
        files: the files to hash, in that folder.

    Returns:
        JSON-like: written (UTC), git_commit, platform, versions, config, sha256 by relative path.
    """
    values = config.model_dump(mode="json")
    if config.source.path is not None:
        values["source"]["path"] = config.source.path.name
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "config": values,
        "sha256": {path.relative_to(results).as_posix(): sha256_of(path) for path in files},
    }


def render_report(
    config: Config,
    case_table: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    drawn: dict[str, list[Path]],
    arms: dict[str, dict],
    manifest: dict[str, Any],
    layouts: bool,
) -> str:
    """The page as HTML, complete in itself: figures inlined, no script, no network.

    Args:
        config: the run's config.
        case_table: all cases, excluded ones too.
        tables: as of `write_tables`.
        drawn: SVG and PNG path by figure name.
        arms: parsed `arm.json` by arm.
        manifest: as of `describe_run`.
        layouts: whether the pages of the layouts are there to point to.
    """
    images = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for name, paths in drawn.items()
        for path in paths
        if path.suffix == ".png"
    }
    verdict, prose = tables["verdict"], next(iter(MEASURES))
    confidence = f"{100 * config.verdict.confidence:g} %"
    return render(
        "verdict/report.html.jinja",
        generators=config.arms.generators,
        shared_patients=config.roles.allow_shared_patients,
        phantom=config.source.kind == "phantom",
        answers=verdict[(verdict["metric"] == prose) & (verdict["arm"] != BASELINE)].to_dict("records"),
        supports=verdict[(verdict["metric"] != prose) & (verdict["arm"] != BASELINE)].to_dict("records"),
        controls=[arm for arm in config.arms.names() if arm != BASELINE and not _tests_a_generator(arm, config)],
        images=images,
        montages={name.removeprefix("montage-"): src for name, src in images.items() if name.startswith("montage-")},
        numbers=[show_verdict(verdict, measure, confidence) for measure in MEASURES],
        description=[show_description(verdict, measure, confidence) for measure in MEASURES],
        cases_and_replicates=", ".join(
            (count(verdict["n_cases"].max(), "test case"), count(verdict["n_replicates"].max(), "replicate"))
        ),
        detection=show_detection(tables["detection"]),
        dice_by_case=show_dice(tables["cases"]),
        quality=show_quality(tables["image_quality"]) if "image_quality" in tables else None,
        compared=show_published(tables["published_comparison"].query("arm != ''")),
        published=show_published(tables["published_comparison"].query("arm == ''")),
        arms=show_arms(arms),
        generator_notes={
            name: generators.module_of(name).__doc__.splitlines()[0] for name in config.arms.largest_doses()
        },
        arm_cases={arm: [case["name"] for case in content["cases"]] for arm, content in arms.items()},
        roles=show_roles(case_table),
        excluded=show_excluded(case_table),
        layouts=layouts,
        limits=limits_of(config, tables),
        timing=show_timing(tables["timing"]) if "timing" in tables else None,
        confidence=confidence,
        significance=f"{1 - config.verdict.confidence:g}",
        n_compared=int(verdict["n_compared"].max()),
        minimum_cases=MINIMUM_CASES,
        power=f"{100 * POWER:g} %",
        config_text=yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True),
        manifest=manifest,
    )


def limits_of(config: Config, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What this run cannot tell, as sentences."""
    verdict, cases_scored = tables["verdict"], tables["cases"]
    n_cases, n_replicates = int(verdict["n_cases"].max()), int(verdict["n_replicates"].max())
    limits = [
        f"Not evaluated, and left out: {arm}, {', '.join(replicates)}."
        for arm, replicates in missing_replicates(cases_scored, config).items()
    ]
    limits += caveats(n_cases, n_replicates)
    if 1 < n_replicates < 5:
        limits.append(
            f"{n_replicates} replicates show only roughly how much training runs scatter: with few arms, a difference "
            "that is not there is shown somewhat more often than it should be."
        )
    if (n_patients := cases_scored["patient_id"].nunique()) < (n_scans := cases_scored["case_id"].nunique()):
        limits.append(
            f"{n_scans} test cases come from {n_patients} patients, but count as if each were a patient of its own."
        )
    if n_empty := cases_scored.loc[cases_scored["n_lesions"] == 0, "case_id"].nunique():
        limits.append(
            f"Test cases without a nodule: {n_empty}. They do not count towards Dice and sensitivity; "
            "what was wrongly marked in them is under “Lesions found”."
        )
    x, y, z = config.grid.size
    limits.append(f"All CT was resampled to {x} x {y} x {z} voxels: nodules of a voxel or two can vanish or merge.")
    return limits


def show_verdict(verdict: pd.DataFrame, measure: str, confidence: str) -> Shown:
    """The rows of one measure in `verdict.csv` for reading."""
    rows = [
        [
            row["arm"], _spread(row["mean"], row["sd"], ".3f"), _number(row["difference"], "+.3f"), _interval(row),
            _number(row["relative_percent"], "+.1f"), _p(row["p"]), _p(row["p_holm"]),
            _number(row["detectable_difference"], ".3f"), row["verdict"],
        ]
        for row in verdict[verdict["metric"] == measure].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"{MEASURES[measure]} ± sd", "difference", f"{confidence} CI", "in %", "p", "p, Holm", "detectable",
             "verdict"]  # fmt: skip
    return Shown(heads, rows, [False, *[True] * 7, False])


def show_description(verdict: pd.DataFrame, measure: str, confidence: str) -> Shown:
    """What describes the comparisons of one measure without deciding them."""
    rows = [
        [
            row["arm"], _number(row["difference"], "+.3f"), _interval(row, "bootstrap"), _p(row["p_wilcoxon"]),
            f"{row['wins']} / {row['ties']} / {row['losses']}", _number(row["standard_error"], ".4f"),
            _number(row["df"], ".1f"),
        ]
        for row in verdict[(verdict["metric"] == measure) & verdict["difference"].notna()].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"difference, {MEASURES[measure]}", f"{confidence} CI, bootstrap", "p, Wilcoxon",
             "wins / ties / losses", "standard error", "df"]  # fmt: skip
    return Shown(heads, rows, [False, *[True] * 6])


def show_detection(detection: pd.DataFrame) -> Shown:
    """`detection.csv` for reading."""
    heads = ["arm", "lesions", "found %", *[f"found %, {size}" for size in SIZE_BINS], "false positives a scan",
             "scans without nodule", "false positives there, mm³"]  # fmt: skip
    formats = [None, "d", ".0f", ".0f", ".0f", ".0f", ".2f", "d", ".0f"]
    rows = [
        [value if form is None else _number(value, form) for value, form in zip(row, formats, strict=True)]
        for row in detection.itertuples(index=False)
    ]
    return Shown(heads, rows, [False, *[True] * 8])


def show_dice(cases_scored: pd.DataFrame) -> Shown:
    """Dice of every case and arm, mean over replicates."""
    measure = next(iter(MEASURES))
    wide = cases_scored.pivot_table(index="case_id", columns="arm", values=measure, sort=False, dropna=False)
    wide = wide[list(dict.fromkeys(cases_scored["arm"]))]
    rows = [
        [str(case), *(_number(value, ".3f") for value in scores)]
        for case, scores in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return Shown(["case", *wide.columns], rows, [False, *[True] * wide.shape[1]])


def show_quality(quality: pd.DataFrame) -> Shown:
    """`image_quality.csv` for reading: one row a generator, image and region."""
    columns = {"mse": ("MSE × 1000", 1000, ".2f"), "psnr_db": ("PSNR, dB", 1, ".1f"), "ssim": ("SSIM", 1, ".3f"),
               "mean_difference_hu": ("mean difference, HU", 1, "+.0f")}  # fmt: skip
    rows = []
    for (generator, image, region), group in quality.groupby(["generator", "image", "region"], sort=False):
        values = group.set_index("metric").reindex(columns)
        cells = [
            _spread(factor * values.loc[metric, "mean"], factor * values.loc[metric, "sd"], form)
            for metric, (_, factor, form) in columns.items()
        ]
        rows.append([generator, image, region, str(int(values["n"].max())), *cells])
    heads = ["generator", "image", "region", "samples", *(name for name, _, _ in columns.values())]
    return Shown(heads, rows, [False, False, False, *[True] * 5])


def show_published(comparison: pd.DataFrame) -> tuple[Shown, list[str]]:
    """`published_comparison.csv` for reading, and the reasons to which its last column points, (a) first."""
    reasons = comparison["why_not"].unique().tolist()
    rows = []
    for row in comparison.to_dict("records"):
        form = {"sampling": ".1f", "image_quality": ".4f"}.get(row["table"], ".3f")
        rows.append(
            [
                row["method"],
                row["training_set"] or row["cohort"],
                MEASURES.get(row["metric"], row["metric"].replace("_", " ")),
                _spread(row["published_mean"], row["published_sd"], form),
                _number(row["published_change"], "+.3f"),
                row["arm"],
                _spread(row["measured_mean"], row["measured_sd"], form),
                _number(row["measured_change"], "+.3f"),
                f"{row['comparable']} ({ascii_lowercase[reasons.index(row['why_not'])]})",
            ]
        )
    heads = ["method", "data", "measure", "published", "change", "here", "measured", "change", "comparable?"]
    return Shown(heads, rows, [False, False, False, True, True, False, True, True, False]), reasons


def show_roles(case_table: pd.DataFrame) -> Shown:
    """Patients, cases and nodules of every role."""
    rows = []
    for role in ("discovery", "reference", "test"):
        members = cases.usable(case_table, role)
        counts = (members["patient_id"].nunique(), len(members), int(members["n_nodules"].sum()))
        rows.append([role, *map(str, counts)])
    return Shown(["role", "patients", "cases", "nodules"], rows, [False, True, True, True])


def show_arms(arms: dict[str, dict]) -> Shown:
    """What every arm is trained on, and what its leak guard found; from the parsed `arm.json` files."""
    rows = []
    for arm, content in arms.items():
        sources = Counter(
            case["source"] + (" again" if case["name"] != case["case_id"] else "") for case in content["cases"]
        )
        patients, shared = {case["patient_id"] for case in content["cases"]}, content["leak_guard"]["shared_patients"]
        made_of = ", ".join(f"{count} {source}" for source, count in sources.items())
        guard = f"SHARED: {', '.join(shared)}" if shared else "no test patient in it"
        rows.append([arm, str(len(content["cases"])), made_of, str(len(patients)), guard])
    return Shown(["arm", "training cases", "from", "patients", "leak guard"], rows, [False, True, False, True, False])


def show_timing(timing: pd.DataFrame) -> Shown:
    """Time and memory by stage."""
    stages = timing.groupby("stage", sort=False).agg(
        jobs=("job", "size"), seconds=("seconds", "sum"), longest=("seconds", "max"), memory=("max_rss_mb", "max")
    )
    rows = [
        [stage, str(row.jobs), _duration(row.seconds), _duration(row.longest), _number(row.memory, ".0f")]
        for stage, row in zip(stages.index, stages.itertuples(), strict=True)
    ]
    heads = ["stage", "jobs", "time of all", "longest job", "peak memory, MB"]
    return Shown(heads, rows, [False, *[True] * 4])


def _tests_a_generator(arm: str, config: Config) -> bool:
    return any(arm.startswith(f"{BASELINE}+{generator}@") for generator in config.arms.generators)


def _number(value: float, form: str) -> str:
    if pd.isna(value):
        return ""
    if math.isinf(value):
        return "∞"
    return signed(value, int(form[2])) if form.startswith("+") else format(value, form)


def _spread(mean: float, sd: float, form: str) -> str:
    unsigned = form.removeprefix("+")
    return _number(mean, form) + ("" if pd.isna(sd) else f" ± {_number(sd, unsigned)}")


def _interval(row: dict, kind: str = "ci") -> str:
    low, high = row[f"{kind}_low"], row[f"{kind}_high"]
    return "" if pd.isna(low) else f"{signed(low)} to {signed(high)}"


def _p(value: float) -> str:
    return "" if pd.isna(value) else format_p(value).removeprefix("= ")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _git_commit() -> str | None:
    """The commit of the code that runs, marked where it has been changed since; None outside a git checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        folder = str(Path(lungddpm.__file__).parent)
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)

    try:
        # An environment inside somebody's repository is not a checkout of ours.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return f"{commit} with changes" if git("status", "--porcelain", "--", ".").stdout else commit
    except FileNotFoundError:
        return None
