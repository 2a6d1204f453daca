"""Fill the table of docs/reference/cost.md with what `lungddpm plan` estimates: python docs/site/cost.py"""

from __future__ import annotations

from pathlib import Path

from lungddpm.operations.plan import Stage, count_cohort, known_speed, load_plan_config, plan_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/cost.md"
LIDC_IDRI_SCANS = 1018
ROWS = [
    ("config.yaml", "cpu", None),
    ("config/study.yaml", "cpu", None),
    ("config/rivals.yaml", "cpu", None),
    ("config/lidc.yaml", "a100", LIDC_IDRI_SCANS),
    ("config/lidc.yaml", "h100", LIDC_IDRI_SCANS),
    ("config/paper.yaml", "a100", LIDC_IDRI_SCANS),
    ("config/paper.yaml", "h100", LIDC_IDRI_SCANS),
]
"""Config, device, and number of scans where the config does not say it."""
HEAD = [
    "config", "device", "scans", "jobs", "GPU hours", "core hours", "memory, GiB", "GPU memory, GiB", "disk, GiB",
    "most of it",
]  # fmt: skip
BEGIN, END = "<!-- begin: python docs/site/cost.py -->\n", "<!-- end -->"


def row(name: str, device: str, scans: int | None) -> list[str]:
    """The cells of one config on one device."""
    config = load_plan_config(ROOT / name)
    cohort = count_cohort(config, None, scans)
    stages = plan_run(config, cohort, known_speed(device))
    longest = max({stage.name for stage in stages}, key=lambda name: _hours(stages, name))
    share = _hours(stages, longest) / sum(_hours(stages, name) for name in {stage.name for stage in stages})
    return [
        f"`{name}`", device, f"{cohort.scans:,}", f"{sum(stage.jobs for stage in stages):,}",
        _number(sum(stage.gpu_hours for stage in stages)), _number(sum(stage.core_hours for stage in stages)),
        _number(max(stage.memory_gib for stage in stages)),
        _number(max(stage.gpu_memory_gib or 0.0 for stage in stages)),
        _number(sum(stage.disk_gib for stage in stages)), f"`{longest}`, {share:.0%}",
    ]  # fmt: skip


def fill(page: str) -> str:
    """The page with its table made again."""
    before, _, rest = page.partition(BEGIN)
    lines = [HEAD, ["---"] * len(HEAD), *(row(*planned) for planned in ROWS)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return before + BEGIN + "\n" + table + "\n" + END + rest.partition(END)[2]


def _hours(stages: list[Stage], name: str) -> float:
    return sum(stage.gpu_hours + stage.core_hours for stage in stages if stage.name == name)


def _number(value: float) -> str:
    """Two significant digits: the estimates are good to a factor of two."""
    return "–" if not value else f"{float(f'{value:.2g}'):,g}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
