"""Which arms are tested together, in which order, and the design that follows."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.core.cases import internal, usable
from lungddpm.core.roles import TEST
from lungddpm.core.text import plural
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.verdict.design import Components, Costs, Design, costs_of_timing, typical_components
from lungddpm.verdict.published import published_gain
from lungddpm.verdict.statistics import minimum_cases

PRIMARY, QUESTION, CONTROLS = "primary arms", "arms with synthetic CT", "controls"
"""Families of arms: Holm's correction is made within each. Primary arms, if there are any, are
tested before the other arms with synthetic CT."""


def family_of(arm: Arm, config: Config) -> str:
    """`PRIMARY` or `QUESTION` for an arm that tests a generator, `CONTROLS` for any other."""
    if arm.name in config.primary_arms():
        return PRIMARY
    return CONTROLS if arm.is_control(config.arms.controls) else QUESTION


def gates_of(config: Config) -> dict[str, str]:
    """Family -> the family that must be decided first."""
    return {QUESTION: PRIMARY} if config.primary_arms() else {}


def external_family(family: str) -> str:
    """The family of comparisons on external test sets that a family of arms gives: apart from that of `source`."""
    return f"comparisons of {family} on external test sets"


def asked_arms(config: Config) -> list[str]:
    """The arms that the run is about: the primary ones, or else all that test a generator."""
    families = {arm.name: family_of(arm, config) for arm in config.arms.all()}
    return [
        name for name, family in families.items() if family == (PRIMARY if PRIMARY in families.values() else QUESTION)
    ]


def relevant_difference(config: Config) -> float:
    """The difference in the deciding measure that a run should detect: the config's, or the published gain."""
    given = config.verdict.relevant_difference
    return published_gain(deciding_measure().column) if given is None else given


def design_of(config: Config, n_cases: int) -> Design:
    """The design of a config with `n_cases` test cases that have a nodule."""
    folds, seeds = len(config.segmentation.folds), len(config.segmentation.seeds)
    n_independent, runs_each = (folds, seeds) if folds > 1 else (seeds, 1)
    n_compared = max(1, len(asked_arms(config)))
    arms = config.arms.all()
    n_baselines = len({arm.baseline for arm in arms})
    return Design(len(arms), n_compared, n_independent, n_cases, config.verdict.confidence, n_baselines, runs_each)


def design_of_run(config: Config, components: pd.DataFrame, test_sets: int = 1) -> tuple[Design, Components] | None:
    """The design of a run as carried out, and its variance components; None if they are not known.

    They are those of the arms that the run is about or, if none of these was measured, of all others.

    Args:
        config: of the run.
        components: rows of `variance_components.csv`.
        test_sets: number of test sets whose claims are corrected together.
    """
    arms = asked_arms(config)
    known = components[components["metric"] == deciding_measure().column].dropna(subset="run_sd")
    if known["arm"].isin(arms).any():
        known = known[known["arm"].isin(arms)]
    typical = typical_components(known, list(known["arm"]))
    if typical is None:
        return None
    design = design_of(config, int(known["n_cases"].max()))
    n_independent, n_compared = int(known["n_independent"].min()), design.n_compared * test_sets
    return replace(design, n_independent=n_independent, n_compared=n_compared), typical


def has_too_few_cases(config: Config, n_cases: int, test_sets: int = 1) -> bool:
    """Whether nothing can be decided with this number of test cases, whatever the replicates; see `design_of_run`."""
    design = design_of(config, n_cases)
    return n_cases < minimum_cases(design.n_compared * test_sets, design.confidence)


def replicates_in_words(design: Design, config: Config) -> str:
    """The number of independent replicates, in the words of the config: seeds, or folds."""
    if len(config.segmentation.folds) == 1:
        return plural(design.n_independent, "seed")
    folds = plural(design.n_independent, "fold")
    return f"{folds} of {design.runs_each} seeds each" if design.runs_each > 1 else f"{folds} (or seeds of one fold)"


def timed_costs(config: Config, timing: pd.DataFrame, all_cases: pd.DataFrame) -> Costs:
    """The costs of the config's design, from the times of a run.

    Args:
        config: arms and replicates to account for; the run may have had more or fewer.
        timing: rows of the run's `timing.csv`.
        all_cases: its `cases.tsv`.
    """
    n_test = len(usable(internal(all_cases), TEST))
    design = design_of(config, n_test)
    n_runs = design.n_arms * len(config.segmentation.replicates())
    sizes = design.n_independent, n_test, len(all_cases)
    return costs_of_timing(timing, n_runs, *sizes, stages_per_replicate(config))


def stages_per_replicate(config: Config) -> tuple[str, ...]:
    """Stages that are done once per replicate, for all arms together."""
    draws = ("synthesize", "compose_draw") if config.synthesis.draw_per_replicate else ()
    filters = ("filter_samples",) if config.arms.filtered else ()
    trainings = ("train_generator",) if config.synthesis.training_per_replicate else ()
    return ("label_fidelity", *filters, *draws, *trainings)
