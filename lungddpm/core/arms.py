"""The grammar of arm names, in one place: parsing and formatting."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from lungddpm.core.errors import ConfigError

BASELINE = "real"
"""The real cases alone, which all other arms with the same real cases are compared with; also the word for real cases
in names."""
_NUMBER = r"(?P<{0}>[1-9][0-9]*)?"
_NAME = re.compile(
    rf"real{_NUMBER.format('n_real')}"
    r"(?:(?P<repeated>\+real)|\+(?P<added>[A-Za-z0-9_]+)(?P<filtered>\.filtered)?@(?P<dose>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?))?"
    rf"|synthetic{_NUMBER.format('n_alone')}:(?P<alone>[A-Za-z0-9_]+)"
)


@dataclass(frozen=True)
class Arm:
    """A training set: `real`, `real+real`, `real+<generator>@<dose>`, `real+<generator>.filtered@<dose>` or
    `synthetic:<generator>`; with fewer real cases than there are, `real4`, `real4+real`, `real4+<generator>@<dose>`,
    and so on."""

    real: bool
    """Whether it trains on the real cases; every arm validates on them."""
    added: str | None
    """A generator, `real` for the real cases again, or None."""
    dose: float
    """How much is added, as a multiple of the real cases: 1 if the name has no dose, 0 if nothing is added."""
    real_cases: int | None = None
    """Number of real cases; None for all. Arms with the same number have the same cases."""
    filtered: bool = False
    """Whether only samples whose nodules the segmenters of its `baseline` find are used (`arms.filter`)."""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm of a name.

        A dose may be written in several ways (`@1`, `@1.0`); `name` is the canonical one.

        Raises:
            ConfigError: not the name of an arm.
        """
        found = _NAME.fullmatch(text)
        dose = float(found["dose"] or 1) if found else 0.0
        if not found or BASELINE in (found["added"], found["alone"]) or not 0 < dose < math.inf:
            raise ConfigError(
                f"arm '{text}'",
                "is not the name of an arm",
                "Names are real, real+real, real+<generator>@<dose>, real+<generator>.filtered@<dose> and "
                "synthetic:<generator>, e.g. real+lung_ddpm@1.0; with 4 real cases real4, real4+real, and so on.",
            )
        number = found["n_real"] or found["n_alone"]
        real_cases = int(number) if number else None
        if found["alone"]:
            return cls(False, found["alone"], 1.0, real_cases)
        if added := BASELINE if found["repeated"] else found["added"]:
            return cls(True, added, dose, real_cases, bool(found["filtered"]))
        return cls(True, None, 0.0, real_cases)

    @property
    def name(self) -> str:
        """Canonical name in folders, tables and on the command line, e.g. `real+lung_ddpm@1.0`; the dose is formatted
        like a JSON float."""
        number = "" if self.real_cases is None else str(self.real_cases)
        if not self.real:
            return f"synthetic{number}:{self.added}"
        if self.added is None:
            return f"{BASELINE}{number}"
        filtered = ".filtered" if self.filtered else ""
        added = BASELINE if self.added == BASELINE else f"{self.added}{filtered}@{float(self.dose)}"
        return f"{BASELINE}{number}+{added}"

    @property
    def generator(self) -> str | None:
        """The generator whose CT it is trained on, if any."""
        return None if self.added == BASELINE else self.added

    @property
    def baseline(self) -> Arm:
        """The arm to compare it with: its real cases alone."""
        return Arm(True, None, 0.0, self.real_cases)

    @property
    def recipe(self) -> Arm:
        """The same arm with all real cases, common to arms with different numbers of real cases."""
        return replace(self, real_cases=None)

    def is_control(self, controls: Collection[str]) -> bool:
        """Whether it tests no generator: `real` itself, the real cases again, or CT of a control generator.

        Args:
            controls: `arms.controls`.
        """
        return self.added is None or self.added in controls


def is_baseline(name: str) -> bool:
    """Whether an arm is one that others are compared with, by its name."""
    return Arm.parse(name).added is None
