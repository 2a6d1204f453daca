"""Fill the tables of docs/explanation/rivals.md with those of a run: python docs/site/rivals.py [results]

With the folder of a run's results, its tables are first copied to docs/explanation/rivals/, and its pictures drawn.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
PAGE, TABLES, IMAGES = (
    ROOT / path for path in ("docs/explanation/rivals.md", "docs/explanation/rivals", "docs/images")
)
COPIED = [
    "ladder", "label_fidelity", "quality_and_cost", "calibration", "verdict", "instrument", "run_spread",
    "sample_filter",
]  # fmt: skip
OF_SETS = [
    "fid", "kid", "mmd_squared", "feature_precision", "feature_recall", "classifier_auc", "nearest_training_ratio",
    "smallest_training_ratio", "n_nearer_than_any_real", "pairwise_ms_ssim", "voxel_sd_hu", "nodule_mean_sd_hu",
]  # fmt: skip
"""Measures of `image_quality.csv` that are copied: of all samples of a generator together."""
FLOORS = {
    "other patients": "real CT of the four other patients", "constant lungs": "lungs of one grey value",
    "copies of the references": "copies of the references",
}  # fmt: skip
"""Images made without a generator -> their name on the page."""
BEGIN, END = "<!-- begin: python docs/site/rivals.py, {} -->\n", "<!-- end -->"
DASH = "–"
GIVEN = {"layout": "layout", "layout+slice": "layout + slice", "layout+volume": "layout + volume"}
ROLES = {
    "real+reference": "positive control", "real+real": "null control", "real+reconstruct": "floor",
}  # fmt: skip


def copy(results: Path) -> None:
    """Copy a run's tables, with five digits, and draw its pictures."""
    from lungddpm.config.loading import load_config
    from lungddpm.report import figures
    from lungddpm.report.samples import samples_to_show, shared_sample

    config = load_config(results / "config.json")
    for name in COPIED:
        table = pd.read_csv(results / "tables" / f"{name}.csv")
        write(name, table)
    quality = pd.read_csv(results / "tables/image_quality.csv")
    # Those floors are the same for every generator.
    kept = (quality["image"] == "synthetic") | (
        quality["image"].isin(FLOORS) & (quality["generator"] == quality["generator"].iloc[0])
    )
    quality = quality[kept & quality["metric"].isin(OF_SETS)]
    write("image_quality", quality.drop(columns=["sd", "weights_sha256", "extractor", "note"]))
    timing = pd.read_csv(results / "tables/timing.csv")
    write("timing", timing[timing["stage"] == "train_generator"])
    sample = shared_sample(config, results, samples_to_show(config, results))
    figures.side_by_side(sample.reference, sample.layout, sample.drawn).savefig(IMAGES / "rivals.png", dpi=90)
    figures.cost_plot(read("quality_and_cost")).savefig(IMAGES / "rivals-cost.svg")


def write(name: str, table: pd.DataFrame) -> None:
    """A table of the run, without columns that are empty in all rows."""
    table.dropna(axis=1, how="all").to_csv(
        TABLES / f"{name}.csv", index=False, float_format="%.5g", lineterminator="\n"
    )


def read(name: str) -> pd.DataFrame:
    """One of the tables that were copied."""
    return pd.read_csv(TABLES / f"{name}.csv")


def gains() -> list[list[str]]:
    """What each arm gained over `real`."""
    verdict = read("verdict")
    verdict = verdict[verdict["metric"] == "dice"]
    cells = read("ladder").dropna(subset=["arm"]).set_index("arm")
    baseline = verdict[verdict["arm"] == "real"].iloc[0]
    rows = [["(`real` alone)", "", "", "", f"{baseline['mean']:.3f}", "", "", ""]]
    for row in verdict[verdict["arm"] != "real"].itertuples():
        name = row.arm.partition("@")[0]
        # A filtered arm is in the cell of its generator, but stands for no published method.
        unfiltered = row.arm.replace(".filtered", "")
        cell = cells.loc[unfiltered] if unfiltered in cells.index else None
        kind = f" ({ROLES[name]})" if name in ROLES else ""
        rows.append([
            f"`{name.removeprefix('real+') if cell is not None else name}`{kind}",
            "" if cell is None else cell["family"],
            "" if cell is None else GIVEN[cell["given"]],
            "" if row.arm not in cells.index or pd.isna(cell["stands_for"]) else cell["stands_for"],
            f"{row.mean:.3f}", signed(row.difference), f"{signed(row.ci_low)} to {signed(row.ci_high)}", row.verdict,
        ])  # fmt: skip
    return [["generator", "family", "given", "stands for", "Dice", "difference", "95 % CI", "called"], *rows]


def fidelity() -> list[list[str]]:
    """What segmenters find on the CT of each generator, and what it costs."""
    costs = read("quality_and_cost").set_index("generator")
    measured = read("calibration").set_index(["generator", "region", "measure"])["mean"]
    draws = of_sets()["synthetic", "nodules", "voxel_sd_hu"]
    heads = [
        "generator", "function evaluations", "seconds per volume", "Dice on its CT", "lesions found", "HU in lungs",
        "HU in nodules", "spread in nodules", "spread between draws, HU", "KID in lungs (standard error)",
    ]  # fmt: skip
    rows = []
    for row in read("label_fidelity").itertuples():
        of_hu = [
            measured.get((row.generator, *place), math.nan)
            for place in (
                ("lungs without nodules", "hu_difference"), ("nodules", "hu_difference"), ("nodules", "hu_spread_ratio")
            )
        ]  # fmt: skip
        cost = costs.loc[row.generator] if row.generator in costs.index else pd.Series(math.nan, costs.columns)
        kid, error = (number(cost[name], 1) for name in ("kid_lungs", "kid_lungs_standard_error"))
        rows.append([
            "the references' real CT (ceiling)" if row.generator == "(real CT)" else f"`{row.generator}`",
            number(cost["function_evaluations"], 0), number(cost["seconds_per_volume"], 1),
            number(row.dice_mean, 2), number(row.recall, 2),
            signed(of_hu[0], 0), signed(of_hu[1], 0), number(of_hu[2], 2),
            number(draws.get(row.generator, math.nan), 0), f"{kid} ({error})" if kid != DASH else DASH,
        ])  # fmt: skip
    return [heads, *rows]


def of_sets() -> pd.DataFrame:
    """A row per generator, a column per image, region and measure of `image_quality.csv`."""
    quality = read("image_quality")
    wide = quality.pivot_table("mean", "generator", ["image", "region", "metric"])
    return wide.reindex(quality["generator"].unique())


def quality() -> list[list[str]]:
    """Distances, diversity and nearness to training cases of each generator and of the floors."""
    measured, given = of_sets(), read("ladder").dropna(subset=["generator"]).set_index("generator")["given"]
    background = {name: "pasted" if cell == "layout+volume" else "drawn" for name, cell in given.items()}
    first = measured.index[0]
    images = [(f"`{name}`", background.get(name, ""), name, "synthetic") for name in measured.index]
    images += [(title, "", first, image) for image, title in FLOORS.items()]
    columns = {
        "FID, whole volume": ("whole volume", "fid", 1), "FID, lungs": ("lungs", "fid", 2),
        "precision": ("lungs", "feature_precision", 2), "recall": ("lungs", "feature_recall", 2),
        "AUC": ("lungs", "classifier_auc", 2), "MS-SSIM of draws": ("nodules", "pairwise_ms_ssim", 3),
        "sd of means, HU": ("nodules", "nodule_mean_sd_hu", 0),
        "nearest training case": ("lungs", "nearest_training_ratio", 2),
        "(smallest)": ("lungs", "smallest_training_ratio", 2),
        "nearer than any real": ("lungs", "n_nearer_than_any_real", 0),
    }  # fmt: skip
    rows = [
        [title, drawn]
        + [
            number(measured.loc[name].get((image, region, metric), math.nan), digits)
            for region, metric, digits in columns.values()
        ]
        for title, drawn, name, image in images
    ]
    table = [["CT", "background", *columns], *rows]
    for row in table:
        smallest = row.pop(-2)
        row[-2] += f" {smallest}" if smallest in columns else f" ({smallest})" if smallest != DASH else ""
    return table


def checks() -> list[list[str]]:
    """The checks of the instrument that did not pass."""
    instrument, arms = read("instrument"), read("run_spread")["arm"]
    rows = []
    failed = instrument[instrument["status"].isin(["failed", "not measured"])]
    for (check, measure, status), lines in failed.groupby(["check", "measure", "status"], sort=False):
        line = lines.iloc[0]
        limit = f"at most {line['limit_high']:g}" if pd.notna(line["limit_high"]) else f"at least {line['limit_low']:g}"
        if lines["subject"].isna().all():
            found = number(line["value"], 4 if line["value"] < 0.01 else 2)
        else:
            # Arms that have converged have no row.
            names = instrument.loc[instrument["check"] == check, "subject"].unique()
            among = len(arms if check == "segmenters converged" else names)
            found = f"{len(lines)} of {among}: {', '.join(map(subject, lines.to_dict('records')))}"
        rows.append([check, measure, limit, found if status == "failed" else f"{status}, {found}"])
    return [["check", "measure", "limit", "failed"], *rows]


def subject(line: dict) -> str:
    """An arm or a generator that failed, with what was measured."""
    if line["measure"] == "limits of HU exceeded":
        hu = read("calibration")
        beyond = hu[(hu["generator"] == line["subject"]) & (hu["status"] != "within limits") & hu["limit_low"].notna()]
        texts = [
            f"{row.region.removesuffix(' without nodules')} "
            + (f"{row.mean:.2f}" if row.measure == "hu_spread_ratio" else f"{signed(row.mean, 0)} HU")
            for row in beyond.itertuples()
        ]
        return f"`{line['subject']}` ({', '.join(texts)})"
    name = line["subject"].partition("@")[0]
    value = f" {number(line['value'], 2)}" if pd.notna(line["value"]) else ""
    return f"`{name if name in ROLES else name.removeprefix('real+')}`{value}"


def signed(value: float, digits: int = 3) -> str:
    """With its sign, if it is not 0; a minus as wide as a plus."""
    if pd.isna(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def number(value: float, digits: int) -> str:
    """Without a sign."""
    return DASH if pd.isna(value) else f"{value if round(value, digits) else 0:.{digits}f}"


def fill(page: str) -> str:
    """The page with its tables made again."""
    tables = {"gains": gains, "checks": checks, "fidelity": fidelity, "quality": quality}
    for name, rows in ((name, make()) for name, make in tables.items()):
        before, begin, rest = page.partition(BEGIN.format(name))
        heads, *others = rows
        lines = [heads, ["---"] * len(heads), *others]
        table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        page = before + begin + "\n" + table + "\n" + END + rest.partition(END)[2]
    return page


if __name__ == "__main__":
    if sys.argv[1:]:
        copy(Path(sys.argv[1]))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
