"""The conclusion from the instrument check: the answer stands, or this run cannot tell, and what would change that."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.core.text import format_hours, plural
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.verdict.design import TRAIN_SEGMENTER, Costs, hours_of_design, sufficient_designs
from lungddpm.verdict.families import (
    asked_arms,
    design_of_run,
    has_too_few_cases,
    relevant_difference,
    replicates_in_words,
)
from lungddpm.verdict.instrument import (
    ALIKE,
    COMPLETE,
    CONVERGED,
    DISTINCT,
    ENOUGH,
    FAILED,
    GENERATOR,
    MEMORISED,
    NAMED,
    NOT_MEASURED,
    NULL,
    POSITIVE,
    SHORT,
    UNSEEN,
)

ANSWER = "the answer"
STANDS, CANNOT_TELL = "stands", "cannot tell"
_OF_ANY = {UNSEEN, CONVERGED, COMPLETE, DISTINCT}
_NEEDED = {
    "better": _OF_ANY | {NULL, ALIKE, NAMED},
    "worse": _OF_ANY | {NULL, ALIKE, NAMED, GENERATOR},
    "no difference shown": _OF_ANY | {POSITIVE, ENOUGH, GENERATOR},
}
"""The checks that an answer needs: a gain must be more than chance, a gain that was not found must have been findable,
and a defect of this generator does not make synthetic CT useless. The other outcomes answer nothing."""
MANY = 3
"""More generators or arms than this are counted, not named: the checks name them."""
_REASONS = {
    UNSEEN: "test patients also have other roles",
    POSITIVE: "it misses the gain from more real data",
    NULL: "it reports a difference for an arm that adds nothing",
    CONVERGED: "the segmenters of {subject} were still learning",
    GENERATOR: "{subject} {is_or_are} not calibrated",
    ENOUGH: "it is too small",
    COMPLETE: "runs or cases are missing",
    DISTINCT: "runs are copies of others",
    ALIKE: "the runs of one arm scatter more than others",
    NAMED: "the primary arm was chosen afterwards",
}
_MORE_REPLICATES = "more replicates"
_REMEDIES = {
    UNSEEN: "test patients with no other role",
    POSITIVE: f"fewer real cases, so that more data make a difference, or {_MORE_REPLICATES}",
    NULL: _MORE_REPLICATES,
    GENERATOR: "samples of {subject} within the limits (longer training, or another seed)",
    COMPLETE: "the missing runs (start the same 'lungddpm run' again)",
    DISTINCT: "separate trainings instead of copies",
    ALIKE: _MORE_REPLICATES,
    NAMED: "a new run with the primary arm chosen beforehand",
}


def doubted_arms(checks: pd.DataFrame, verdict: pd.DataFrame, config: Config) -> dict[str, list[dict]]:
    """The failed checks that affect each arm that the run is about; arms whose answer stands are left out.

    Args:
        checks: of `instrument_table`.
        verdict: rows of `verdict.csv`.
        config: of the run.
    """
    rows = verdict[(verdict["metric"] == deciding_measure().column)].set_index("arm")["verdict"]
    failed = checks[checks["status"] == FAILED].to_dict("records")
    doubted = {}
    for name in asked_arms(config):
        arm, outcome = Arm.parse(name), rows.get(name, "not measured")
        bearing = [check for check in failed if _affects(check, arm, outcome)]
        if bearing or outcome not in _NEEDED:
            doubted[name] = bearing
    return doubted


def _affects(check: dict, arm: Arm, outcome: str) -> bool:
    """Whether a failed check casts doubt on that outcome of an arm."""
    if check["check"] not in _NEEDED.get(outcome, _REASONS):
        return False
    if check["check"] in (GENERATOR, COMPLETE):
        return check["subject"] in ("", arm.name, arm.baseline.name, arm.generator)
    if check["check"] in (POSITIVE, NULL):
        return Arm.parse(check["subject"]).baseline == arm.baseline
    if check["check"] == CONVERGED:
        # Segmenters that still learn end below what their data teach: where the better ones do, the true difference is
        # larger than the one found.
        better = {"better": arm.name, "worse": arm.baseline.name}.get(outcome)
        return check["subject"] in ("", arm.name, arm.baseline.name) and check["subject"] != better
    # For the others, the subject is the arm that showed it most.
    return True


def answer_row(
    checks: pd.DataFrame, verdict: pd.DataFrame, components: pd.DataFrame, config: Config, costs: Costs | None
) -> dict[str, object]:
    """The last row of `instrument.csv`: whether the answer stands, and if not, what a run would need to tell.

    Args:
        checks: of `instrument_table`.
        verdict: rows of `verdict.csv`.
        components: rows of `variance_components.csv`.
        config: of the run.
        costs: of the run, from its own times; None if unknown.
    """
    asked, doubted = asked_arms(config), doubted_arms(checks, verdict, config)
    unknown = _short(checks[checks["status"] == NOT_MEASURED])
    not_known = f" Not measured: {', '.join(unknown)}." if unknown else ""
    row: dict[str, object] = {"check": ANSWER, "subject": "", "measure": "", "status": STANDS}
    if not asked:
        return row | {"sentence": "No arm has synthetic CT, so there is no question to answer."}
    if not doubted:
        failed = _short(checks[checks["status"] == FAILED])
        said = "no check that affects it failed" if failed or unknown else "all checks passed"
        others = f" Failed checks that do not affect it: {', '.join(failed)}." if failed else ""
        return row | {"sentence": f"The answer stands: {said}.{others}{not_known}"}
    firm = [name for name in asked if name not in doubted]
    stands = f"The answer stands for {', '.join(firm)}. " if firm else ""
    about = f"about {', '.join(doubted)}" if firm else "whether synthetic CT helps"
    bearing = [check for of_arm in doubted.values() for check in of_arm]
    reasons = _joined(_texts(_REASONS, bearing)) or "not all arms were measured"
    needed = _needs(bearing, components, config, costs)
    needs = f" It would need: {'; '.join(needed)}." if needed else ""
    return row | {
        "status": CANNOT_TELL,
        "sentence": f"{stands}This run cannot tell {about}: {reasons}.{needs}{not_known}",
    }


def _needs(bearing: list[dict], components: pd.DataFrame, config: Config, costs: Costs | None) -> list[str]:
    """What a run needs to pass these checks."""
    failed, needs = {check["check"] for check in bearing}, _texts(_REMEDIES, bearing)
    if CONVERGED in failed:
        needs = [_longer(config, costs), *needs]
    if ENOUGH in failed:
        # The design then gives the number of replicates.
        others = (text.removesuffix(f", or {_MORE_REPLICATES}") for text in needs if text != _MORE_REPLICATES)
        needs = [_bigger(components, config, costs), *others]
    return list(dict.fromkeys(needs))


def _longer(config: Config, costs: Costs | None) -> str:
    """Twice the steps of every segmenter, with the time that they add; how many suffice cannot be known beforehand."""
    text = f"longer training of all segmenters, such as segmentation.steps: {2 * config.segmentation.steps}"
    hours = costs.hours_of.get(TRAIN_SEGMENTER) if costs else None
    return text if hours is None else f"{text} ({format_hours(hours)} more, by this run's times)"


def _texts(templates: Mapping[str, str], bearing: list[dict]) -> list[str]:
    """A text per check that has a template, about all its subjects."""
    subjects: dict[str, dict[str, None]] = {}
    for check in bearing:
        subjects.setdefault(check["check"], {})[check["subject"]] = None
    return [
        templates[name].format(subject=_counted(name, of_check), is_or_are="is" if len(of_check) == 1 else "are")
        for name, of_check in subjects.items()
        if name in templates
    ]


def _counted(check: str, subjects: Collection[str]) -> str:
    """The subjects of a check by name or, if there are many, their number."""
    if len(subjects) <= MANY:
        return _joined(subjects)
    return plural(len(subjects), "generator" if check in (GENERATOR, MEMORISED) else "arm")


def _short(checks: pd.DataFrame) -> list[str]:
    """The names of checks, each with its subjects if the check has a row for each."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for check in checks.to_dict("records"):
        of_check = subjects.setdefault((check["check"], SHORT.get(check["measure"], check["check"])), [])
        if check["check"] in (CONVERGED, GENERATOR, MEMORISED) and check["subject"]:
            of_check.append(check["subject"])
    return [f"{name} of {_counted(check, named)}" if named else name for (check, name), named in subjects.items()]


def _bigger(components: pd.DataFrame, config: Config, costs: Costs | None) -> str:
    """Designs that detect the relevant difference, with the time of the whole benchmark."""
    relevant, found = relevant_difference(config), design_of_run(config, components)
    if found is None:
        few = has_too_few_cases(config, int(components["n_cases"].max()))
        return "more test cases with a nodule" if few else "at least three replicates"
    own, typical = found
    texts = []
    for one in sufficient_designs(own, typical, relevant, costs):
        cases = f"these {one.n_cases}" if one.n_cases == own.n_cases else str(one.n_cases)
        text = f"{replicates_in_words(one, config)} with {cases} test cases"
        if costs is not None:
            text += f" ({format_hours(hours_of_design(one, own, costs))} of jobs, by this run's times)"
        texts.append(text)
    return " or ".join(texts) or f"a larger design than is feasible for a difference of {relevant:.2g}"


def _joined(texts: Iterable[str]) -> str:
    *first, last = [*dict.fromkeys(texts)] or [""]
    return f"{', '.join(first)} and {last}" if first else last
