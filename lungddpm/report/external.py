"""What the report page shows of each external test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import plural
from lungddpm.evaluation.measures import deciding_measure, verdict_measures
from lungddpm.report.sections import (
    DisplayCheck,
    limits_of_size,
    show_case_scores,
    show_checks,
    show_detection,
    show_measures,
    show_sensitivity,
    show_verdict,
    source_note,
)
from lungddpm.verdict.answer import doubted_arms
from lungddpm.verdict.instrument import COMPLETE, OF_TEST_SET


@dataclass(frozen=True)
class ExternalTestSet:
    """An external test set as it is shown."""

    name: str
    note: str
    """What its source is, whom to cite, and what to know of its labels."""
    size: str
    checks: list[DisplayCheck]
    """Those of `external_instrument.csv`."""
    doubted: dict[str, list[dict]]
    """As `doubted_arms`: by the checks of the set, and by those of the run that need no test cases."""
    answers: list[dict]
    """Rows of `external_verdict.csv` of the compared arms in the deciding measure."""
    supports: list[dict]
    """The same in the other measures of the verdict."""
    numbers: list[DisplayTable]
    measures: DisplayTable
    detection: DisplayTable
    sensitivity: DisplayTable | None
    """None without probabilities."""
    scores: DisplayTable
    limits: list[str]
    """What its size does not allow to say, as sentences."""


def show_external(config: Config, tables: Mapping[str, pd.DataFrame]) -> list[ExternalTestSet]:
    """Every external test set that was evaluated, in the order of the config."""
    if "external_verdict" not in tables:
        return []
    evaluated = set(tables["external_verdict"]["data_set"])
    return [_show(name, config, tables) for name in config.external_tests if name in evaluated]


def not_tested(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """What is missing of each external test set that no run was tested on."""
    if "external_instrument" not in tables:
        return {}
    evaluated = set(tables["external_verdict"]["data_set"]) if "external_verdict" in tables else set()
    checks = tables["external_instrument"]
    rows = checks[(checks["check"] == COMPLETE) & ~checks["data_set"].isin(evaluated)]
    return dict(zip(rows["data_set"], rows["sentence"], strict=True))


def _show(name: str, config: Config, tables: Mapping[str, pd.DataFrame]) -> ExternalTestSet:
    verdict, checks, measures, detection, band, cases = (
        table[table["data_set"] == name].drop(columns="data_set")
        for table in (
            tables[f"external_{kind}"]
            for kind in ("verdict", "instrument", "measures", "detection", "froc_band", "cases")
        )
    )
    of_run = tables["instrument"][~tables["instrument"]["check"].isin(OF_TEST_SET)]
    confidence, significance = f"{100 * config.verdict.confidence:g} %", 1 - config.verdict.confidence
    decisive, source = deciding_measure().column, config.external_tests[name]
    compared = verdict[verdict["arm"] != verdict["baseline"]]
    n_patients, n_cases = cases["patient_id"].nunique(), cases["case_id"].nunique()
    n_scored = int(verdict["n_cases"].max())
    return ExternalTestSet(
        name=name,
        note=source_note(source),
        size=f"{plural(n_cases, 'test case')} of {plural(n_patients, 'patient')}, {n_scored} with a nodule",
        checks=show_checks(checks),
        doubted=doubted_arms(pd.concat([of_run, checks]), verdict, config),
        answers=compared[compared["metric"] == decisive].to_dict("records"),
        supports=compared[compared["metric"] != decisive].to_dict("records"),
        numbers=[show_verdict(verdict, measure, confidence, significance) for measure in verdict_measures()],
        measures=show_measures(measures),
        detection=show_detection(detection),
        sensitivity=show_sensitivity(band, detection, confidence),
        scores=show_case_scores(cases),
        limits=limits_of_size(verdict, cases, config.verdict.confidence),
    )
