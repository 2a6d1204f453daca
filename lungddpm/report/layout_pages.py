"""Pages for checking the layouts by eye before anything is trained on them: one per case, and an overview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from lungddpm.config.models import Config, LayoutLimits
from lungddpm.core import cases
from lungddpm.core.files import read_json, write_text
from lungddpm.core.progress import LOG
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import format_number
from lungddpm.report.html import render, show_excluded

UNUSUAL = 3.5
"""Modified z-score beyond which a figure is flagged (Iglewicz & Hoaglin, Detecting outliers, 1993)."""
_ENOUGH_CASES = 8
"""With fewer cases the spread cannot be estimated."""
_NO_LIMIT = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class Check:
    """One figure of a case's `qc` record, as the pages show it."""

    name: str
    """With its unit."""
    value: Callable[[dict], float]
    form: str
    limits: Callable[[LayoutLimits], tuple[float, float]]
    """A case outside them is excluded."""


def _percent(key: str) -> Callable[[dict], float]:
    return lambda qc: 100 * (np.nan if qc[key] is None else qc[key])


CHECKS = (
    Check("right lung, litres", lambda qc: qc["lung_litres_right"], ".2f", lambda _: _NO_LIMIT),
    Check("left lung, litres", lambda qc: qc["lung_litres_left"], ".2f", lambda _: _NO_LIMIT),
    Check(
        "both lungs, litres", lambda qc: qc["lung_litres_right"] + qc["lung_litres_left"], ".2f",
        lambda limits: limits.lung_litres,
    ),
    Check(
        "smaller lung, % of both", _percent("smaller_lung_share"), ".0f",
        lambda limits: (100 * limits.smaller_lung_share, 50),
    ),
    Check(
        "lung area on the first slice, % of the largest", _percent("end_slice_share_bottom"), ".1f",
        lambda limits: (0, 100 * limits.end_slice_share),
    ),
    Check(
        "lung area on the last slice, % of the largest", _percent("end_slice_share_top"), ".1f",
        lambda limits: (0, 100 * limits.end_slice_share),
    ),
    Check(
        "vessels, % of the lungs", _percent("vessel_share_of_lungs"), ".1f",
        lambda limits: (100 * limits.vessel_share[0], 100 * limits.vessel_share[1]),
    ),
    Check(
        "nodules in or touching the lungs, %", _percent("nodule_share_in_or_touching_lungs"), ".0f",
        lambda limits: (100 * limits.nodule_share, 100),
    ),
)  # fmt: skip


def run_qc(config: Config, cases_table: Path, output: Path) -> None:
    """Write `<output>/index.html` and, for every usable case, `<output>/cases/<case>.html`.

    The pages link to `qc.png` in the cases' folders, so they can only be moved together with the results folder.

    Args:
        config: `layouts.limits` are shown beside the figures.
        cases_table: table of cases, with `case.json` in every usable case's folder.
        output: folder of the pages, beside the folder of the cases.

    Raises:
        InputError: the table or a record is missing or unreadable.
    """
    table = cases.read_cases(cases_table)
    usable = table[table["status"] == "ok"].reset_index(drop=True)
    remedy = "Run lungddpm prepare again."
    records = [read_json(cases.folder_of(cases_table, row).record, remedy) for _, row in usable.iterrows()]
    figures = pd.DataFrame([[check.value(record["qc"]) for check in CHECKS] for record in records],
                           columns=[check.name for check in CHECKS], index=usable["case_id"], dtype=float)  # fmt: skip
    odd = unusual(figures)
    pages = output / "cases"
    names = usable["case_id"].tolist()
    for number, (_, row) in enumerate(usable.iterrows()):
        before, after = names[number - 1] if number else None, names[number + 1] if number + 1 < len(names) else None
        write_text(
            pages / f"{row['case_id']}.html",
            render(
                "case.html.jinja",
                case=row.to_dict(),
                before=before and f"{quote(before)}.html",
                after=after and f"{quote(after)}.html",
                place=f"{number + 1} of {len(names)}",
                picture=f"../../{quote(cases_table.parent.name)}/{quote(row['path'])}/qc.png",
                checks=_show_checks(figures, odd, row["case_id"], config.layouts.limits),
                notes=records[number]["qc"]["notes"],
                nodules=_show_nodules(records[number]["qc"]["nodules"]),
            ),
        )
    for page in pages.glob("*.html"):
        if page.stem not in names:
            page.unlink()
    write_text(
        output / "index.html",
        render(
            "index.html.jinja",
            overview=_show_overview(figures, usable),
            links=[_page(name) for name in names],
            unusual=[
                (name, _page(name), _figures_text(figures.loc[name][flags]))
                for name, flags in zip(names, odd.to_numpy(), strict=True)
                if flags.any()
            ],
            enough=len(names) >= _ENOUGH_CASES,
            pictures=[
                (name, _page(name), f"../{quote(cases_table.parent.name)}/{quote(path)}/qc.png")
                for name, path in zip(names, usable["path"], strict=True)
            ],
            excluded=show_excluded(table),
            n_cases=len(names),
        ),
    )  # fmt: skip
    LOG.info("layouts to check: %s", output / "index.html")


def unusual(figures: pd.DataFrame) -> pd.DataFrame:
    """Flag figures far from those of the other cases, by modified z-score; none if there are few cases.

    Args:
        figures: one row per case, one column per check.

    Returns:
        bool, same rows and columns.
    """
    distance = (figures - figures.median()).abs()
    spread = distance.median() * 1.4826
    far = distance.gt(UNUSUAL * spread) & (spread > 0)
    return far if len(figures) >= _ENOUGH_CASES else far & False


def _page(case_id: str) -> str:
    """Address of a case's page, from the overview."""
    return f"cases/{quote(case_id)}.html"


def _show_checks(figures: pd.DataFrame, odd: pd.DataFrame, case_id: str, limits: LayoutLimits) -> DisplayTable:
    """A case's figures, the limits, and the interquartile range of all cases."""
    rows = []
    for check in CHECKS:
        low, high = check.limits(limits)
        known = figures[check.name].dropna()
        middle = f"{known.quantile(0.25):{check.form}} to {known.quantile(0.75):{check.form}}" if len(known) else ""
        rows.append(
            [
                check.name,
                format_number(figures.loc[case_id, check.name], check.form),
                "" if (low, high) == _NO_LIMIT else f"{low:g} to {high:g}",
                middle,
                "unusual" if odd.loc[case_id, check.name] else "",
            ]
        )
    return DisplayTable(
        ["figure", "this case", "limits", "middle half of all cases", ""], rows, [False, True, True, True, False]
    )


def _show_nodules(nodules: list[dict]) -> DisplayTable | None:
    if not nodules:
        return None
    rows = [
        [
            str(number),
            str(nodule["readers"]),
            f"{nodule['equivalent_diameter_mm']:.1f}",
            f"{nodule['volume_mm3']:.0f}",
            f"{nodule['layout_volume_mm3']:.0f}",
            *(format_number(nodule[name], ".1f") for name in cases.RATINGS),
            "yes" if nodule["touches_pleura"] else "no",
            "yes" if nodule["touches_vessel"] else "no",
            nodule["notes"],
        ]
        for number, nodule in enumerate(nodules, start=1)
    ]
    heads = ["nodule", "readers", "diameter, mm", "volume, mm³", "in the layout, mm³", *cases.RATINGS,
             "touches pleura", "touches vessel", "notes"]  # fmt: skip
    return DisplayTable(heads, rows, [True] * (5 + len(cases.RATINGS)) + [False] * 3)


def _show_overview(figures: pd.DataFrame, usable: pd.DataFrame) -> DisplayTable:
    rows = [
        [name, row["role"], str(row["n_nodules"]), *(format_number(figures.loc[name, c.name], c.form) for c in CHECKS)]
        for name, (_, row) in zip(figures.index, usable.iterrows(), strict=True)
    ]
    return DisplayTable(
        ["case", "role", "nodules", *(check.name for check in CHECKS)],
        rows,
        [False, False, *[True] * (1 + len(CHECKS))],
    )


def _figures_text(figures: pd.Series) -> str:
    return "; ".join(f"{name}: {value:.3g}" for name, value in figures.items())
