"""The names of arms, in one place: what the name of a training set stands for, and how it is written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from lungddpm.core.errors import ConfigError

BASELINE = "real"
"""The arm of the real cases alone, with which every other arm is compared; also the word for real cases in a name."""
_NAME = re.compile(
    r"(?P<baseline>real)"
    r"|(?P<repeated>real\+real)"
    r"|real\+(?P<added>[A-Za-z0-9_]+)@(?P<dose>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
    r"|synthetic:(?P<alone>[A-Za-z0-9_]+)"
)


@dataclass(frozen=True)
class Arm:
    """A training set: `real`, `real+real`, `real+<generator>@<dose>` or `synthetic:<generator>`."""

    real: bool
    """Whether it is trained on the real cases; every arm is validated on them."""
    added: str | None
    """A generator, `real` for the real cases once more, or None."""
    dose: float
    """How much is added, as a multiple of the real cases: 1 where the name has no dose, 0 where nothing is added."""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm of a name.

        A dose may be written in several ways (`@1`, `@1.0`); `name` has one of them.

        Raises:
            ConfigError: not the name of an arm.
        """
        found = _NAME.fullmatch(text)
        dose = float(found["dose"] or 1) if found else 0.0
        if not found or BASELINE in (found["added"], found["alone"]) or not 0 < dose < math.inf:
            raise ConfigError(
                f"arm '{text}'",
                "is not the name of an arm",
                "Names are real, real+real, real+<generator>@<dose> and synthetic:<generator>, e.g. "
                "real+lung_ddpm@1.0.",
            )
        if found["baseline"]:
            return cls(True, None, 0.0)
        if found["repeated"]:
            return cls(True, BASELINE, 1.0)
        return cls(found["alone"] is None, found["added"] or found["alone"], dose)

    @property
    def name(self) -> str:
        """As folders, tables and the command line have it, e.g. `real+lung_ddpm@1.0`; the dose is written as JSON
        writes a float."""
        if self.added is None:
            return BASELINE
        if not self.real:
            return f"synthetic:{self.added}"
        return f"{BASELINE}+{BASELINE}" if self.added == BASELINE else f"{BASELINE}+{self.added}@{float(self.dose)}"

    @property
    def generator(self) -> str | None:
        """The generator whose CT it is trained on, if any."""
        return None if self.added == BASELINE else self.added

    def is_control(self, generators: Collection[str]) -> bool:
        """Whether it tests none of these generators: `real` itself, the real cases once more, or a control generator.

        Args:
            generators: those that the run asks about (`arms.generators`).
        """
        return self.real and self.added not in generators
