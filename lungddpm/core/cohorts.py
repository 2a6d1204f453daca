"""Numbers of real cases, and the names of the synthetic cohorts that belong to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lungddpm.core.cases import usable
from lungddpm.core.errors import ConfigError
from lungddpm.core.files import seeded_order
from lungddpm.core.roles import DISCOVERY

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"
"""Means all usable discovery cases, in the config, in tables and in folder names."""
PATTERN = r"(?:all|real[1-9][0-9]*)(?:-fold[0-9]+_seed[0-9]+)?"
"""Every name of a cohort, as a regular expression."""
_NAME = re.compile(r"(?:all|real(?P<number>[1-9][0-9]*))(?:-(?P<replicate>fold[0-9]+_seed[0-9]+))?")


@dataclass(frozen=True)
class Cohort:
    """The samples of a generator that belong together, or the training behind them."""

    real_cases: int | None = None
    """Number of real cases that the generator learned from, and that a dose is a multiple of; None for all."""
    replicate: str | None = None
    """The only replicate that trains on this draw; None if all replicates share it."""

    @classmethod
    def parse(cls, text: str) -> Cohort:
        """The cohort of a name.

        Raises:
            ConfigError: not the name of a cohort.
        """
        if (found := _NAME.fullmatch(text)) is None:
            raise ConfigError(
                f"cohort '{text}'", "is not the name of a cohort", "Names are all, real4, all-fold0_seed1, and so on."
            )
        return cls(int(found["number"]) if found["number"] else None, found["replicate"])

    @property
    def name(self) -> str:
        """The name in folders and on the command line, e.g. `all`, `real4`, `real4-fold0_seed1`."""
        cases = ALL if self.real_cases is None else f"real{self.real_cases}"
        return cases if self.replicate is None else f"{cases}-{self.replicate}"


SHARED = Cohort()
"""Of all real cases, for all replicates."""


def count_real_cases(number: int | None, available: int) -> int:
    """The number of real cases for a number in the config; None is all.

    Raises:
        ConfigError: the number is not below the number of cases; it would be a second name for `all`.
    """
    if number is None:
        return available
    if number >= available:
        raise ConfigError(
            "arms.real_cases",
            f"names {number}, but there are {available} usable discovery cases",
            "Use smaller numbers, `all` for all of them, or give more patients the role discovery.",
        )
    return number


def training_cases(table: pd.DataFrame, number: int | None, seed: int) -> pd.DataFrame:
    """The first `number` usable discovery cases of a case table, in a seeded order of patients.

    Smaller numbers give subsets of larger ones, and the cases of a patient stay together as far as the number allows.

    Args:
        table: all cases.
        number: how many; None: all.
        seed: root of the draw.

    Returns:
        Rows in table order.

    Raises:
        ConfigError: there are not more cases than that.
    """
    discovery = usable(table, DISCOVERY)
    count = count_real_cases(number, len(discovery))
    if number is None:
        return discovery
    rank = {patient: place for place, patient in enumerate(seeded_order(discovery["patient_id"], seed, "real cases"))}
    chosen = discovery["patient_id"].map(rank).sort_values(kind="stable").index[:count]
    return discovery.loc[discovery.index.isin(chosen)]
