"""The samples to draw: their references, layouts and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from lungddpm.config.models import Config
from lungddpm.config.sections import SHARED_RUN
from lungddpm.core import cases
from lungddpm.core.cohorts import SHARED, Cohort, count_real_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import seed_from, seeded_order
from lungddpm.core.roles import DISCOVERY, REFERENCE
from lungddpm.generators import OWN, PLACED


@dataclass(frozen=True)
class PlannedSample:
    """One entry of the plan.

    Attributes:
        sample_id: its name and folder.
        reference: row of the case table.
        repeat: number of earlier uses of the reference.
        seed: for all random numbers in the CT. The same for variants that use the same weights (`weights_of`).
        layout_origin: `OWN`, `PLACED`, `JITTERED` or `ADDED`.
        layout_seed: for all random numbers in the layout; None for `OWN`. The same for all generators of a run, so that
            generators with the same `LAYOUTS` get the same layouts.
    """

    sample_id: str
    reference: pd.Series
    repeat: int
    seed: int
    layout_origin: str
    layout_seed: int | None


def samples_wanted(
    config: Config, generator: str, table: pd.DataFrame, dose: float | None = None, cohort: Cohort = SHARED
) -> int:
    """Number of samples for a dose (by default the largest): the dose times the real cases of the cohort, rounded.

    Raises:
        ConfigError: no arm uses the generator, the dose is not positive, or there are not enough real cases.
    """
    doses = config.arms.largest_doses()
    if generator not in doses:
        raise ConfigError("arms", f"no arm uses the generator '{generator}'", f"In use: {', '.join(doses)}.")
    if dose is None:
        dose = doses[generator]
    if not 0 < dose < math.inf:
        raise ConfigError(
            "--dose", f"{dose:g} is not a positive number", f"The largest in config is {doses[generator]}."
        )
    available = len(cases.usable(table, DISCOVERY))
    return round(dose * count_real_cases(cohort.real_cases, available))


def plan_samples(
    config: Config, generator: str, table: pd.DataFrame, dose: float | None = None, cohort: Cohort = SHARED
) -> list[PlannedSample]:
    """The samples of a dose (by default the largest), in order; a smaller dose is the first ones of a larger one.

    References are used in turn until there are `samples_wanted`: in table order or, in a draw for one replicate, in an
    order of that draw. Those with nodules get layouts according to the generator's `LAYOUTS`, those without get placed
    nodules; without `synthesis.place_nodules`, and for generators that only draw own layouts, they are left out.
    Without `synthesis.jitter_repeats`, the layout does not change between uses.

    A draw has its own order, layouts and noise, independent of the number of real cases: different numbers only differ
    in the training of the generator and the number of samples per dose.

    Args:
        config: doses, root seed, `synthesis`, and the generator's own settings.
        generator: a plug-in that the config uses.
        table: all cases.
        dose: as a multiple of the real training cases.
        cohort: number of real training cases, and the replicate of the draw.

    Raises:
        ConfigError: see `samples_wanted`.
        InputError: there is no reference to use.
    """
    number = samples_wanted(config, generator, table, dose, cohort)
    first, again = config.plugin_of(generator).layouts
    noise = config.for_generator(generator, cohort).noise_from
    if not number:
        return []
    references = _references(config, generator, table, needs_nodule=first == again == OWN)
    draw: list[str] = []
    if cohort.replicate is not None:
        draw = [cohort.replicate]
        by_name = {reference["case_id"]: reference for reference in references}
        references = [by_name[name] for name in seeded_order(by_name, config.seed, f"references {cohort.replicate}")]
    plan = []
    for index in range(number):
        repeat, place = divmod(index, len(references))
        reference, case_id = references[place], references[place]["case_id"]
        varies = repeat > 0 and config.synthesis.jitter_repeats
        origin = PLACED if reference["n_nodules"] == 0 else again if varies else first
        # Without jitter, all repeats use the layout of the first.
        layout_seed = seed_from(config.seed, SHARED_RUN, "layout", case_id, repeat if varies else 0, *draw)
        plan.append(
            PlannedSample(
                # An arm contains the samples of all draws, so each has its own name.
                sample_id="_".join([case_id, *draw, f"s{repeat:03d}"]),
                reference=reference,
                repeat=repeat,
                seed=seed_from(config.seed, noise.run, noise.name, case_id, repeat, *draw),
                layout_origin=origin,
                layout_seed=None if origin == OWN else layout_seed,
            )
        )
    return plan


def _references(config: Config, generator: str, table: pd.DataFrame, needs_nodule: bool) -> list[pd.Series]:
    """The references to use, in table order."""
    usable = cases.usable(table, REFERENCE)
    if with_nodule := needs_nodule or not config.synthesis.place_nodules:
        usable = usable[usable["n_nodules"] > 0]
    if usable.empty:
        raise InputError(
            cases.CASES,
            f"has no usable reference case{' with a nodule' if with_nodule else ''} for the generator '{generator}'",
            "Give more patients the role reference.",
        )
    return [row for _, row in usable.iterrows()]
