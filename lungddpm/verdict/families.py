"""Which arms are tested together, and in which order."""

from __future__ import annotations

from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.verdict.design import Design
from lungddpm.verdict.published import published_gain

PRIMARY, QUESTION, CONTROLS = "primary arms", "arms with synthetic CT", "controls"
"""Families of arms: Holm's correction is made within each. Primary arms, if there are any, are
tested before the other arms with synthetic CT."""


def family_of(arm: Arm, config: Config) -> str:
    """`PRIMARY` or `QUESTION` for an arm that tests a generator, `CONTROLS` for any other."""
    if arm.name in config.primary_arms():
        return PRIMARY
    return CONTROLS if arm.is_control(config.arms.generators) else QUESTION


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
    replicates = folds if folds > 1 else seeds
    n_compared = max(1, len(asked_arms(config)))
    arms = config.arms.all()
    n_baselines = len({arm.baseline for arm in arms})
    return Design(len(arms), n_compared, replicates, n_cases, config.verdict.confidence, n_baselines)


def stages_per_replicate(config: Config) -> tuple[str, ...]:
    """Stages that are done once per replicate, for all arms together."""
    draws = ("synthesize", "compose_draw") if config.synthesis.draw_per_replicate else ()
    filters = ("filter_samples",) if config.arms.filtered else ()
    trainings = ("train_generator",) if config.synthesis.training_per_replicate else ()
    return ("label_fidelity", *filters, *draws, *trainings)
