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
COPIED = ["ladder", "label_fidelity", "quality_and_cost", "calibration", "verdict"]
BEGIN, END = "<!-- begin: python docs/site/rivals.py, {} -->\n", "<!-- end -->"
DASH = "–"
GIVEN = {"layout": "layout", "layout+slice": "layout + slice", "layout+volume": "layout + volume"}
CONTROLS = {"real+reference": "positive control", "real+real": "null control"}


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
    write("spread_between_draws", quality[(quality["metric"] == "voxel_sd_hu") & (quality["image"] == "synthetic")])
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
        cell = cells.loc[row.arm] if row.arm in cells.index else None
        kind = f" ({CONTROLS[name]})" if name in CONTROLS else ""
        rows.append([
            f"`{name.removeprefix('real+') if cell is not None else name}`{kind}",
            "" if cell is None else cell["family"],
            "" if cell is None else GIVEN[cell["given"]],
            "" if cell is None or pd.isna(cell["stands_for"]) else cell["stands_for"],
            f"{row.mean:.3f}", signed(row.difference), f"{signed(row.ci_low)} to {signed(row.ci_high)}", row.verdict,
        ])  # fmt: skip
    return [["generator", "family", "given", "stands for", "Dice", "difference", "95 % CI", "called"], *rows]


def fidelity() -> list[list[str]]:
    """What segmenters find on the CT of each generator, and what it costs."""
    costs = read("quality_and_cost").set_index("generator")
    measured = read("calibration").set_index(["generator", "region", "measure"])["mean"]
    draws = read("spread_between_draws").set_index("generator")["mean"]
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
    for name, rows in (("gains", gains()), ("fidelity", fidelity())):
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
