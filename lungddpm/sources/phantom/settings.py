"""The phantom's section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lungddpm.config.sections import PositiveFloat, PositiveInt, Section

Share = Annotated[float, Field(ge=0)]


class Textures(Section):
    """Relative frequency of the nodule textures. Layouts do not show the texture, so a generator has to guess it: with
    several textures in a small cohort, the mean HU of its nodules is largely random."""

    solid: Share = 0.6
    """About 30 HU."""
    part_solid: Share = 0.2
    """A solid core in ground glass."""
    ground_glass: Share = 0.2
    """About -600 HU, with vessels visible in it."""

    @model_validator(mode="after")
    def _some(self) -> Textures:
        if not self.solid + self.part_solid + self.ground_glass:
            raise ValueError("nodule_textures: at least one texture needs a share above 0")
        return self


class Phantom(Section):
    """The procedural thorax cohort. Used when `source.kind` is `phantom`."""

    patients: PositiveInt = 24
    """Number of patients, one CT series each."""
    matrix: Annotated[int, Field(ge=64, le=512)] = 160
    """Pixels along each side of an axial slice."""
    pixel_mm: PositiveFloat = 2.2
    """Mean pixel spacing in mm; individual patients differ by up to 5 %."""
    slice_mm: PositiveFloat = 3.0
    """Slice spacing and thickness in mm."""
    nodules: tuple[Annotated[int, Field(ge=0)], PositiveInt] = (1, 3)
    """Fewest and most nodules per patient; a patient without nodules can only be a reference with placed ones."""
    nodule_diameter_mm: tuple[PositiveFloat, PositiveFloat] = (8.0, 30.0)
    """Smallest and largest nodule diameter in mm."""
    nodule_textures: Textures = Textures()
    noise_hu: Annotated[float, Field(ge=0)] = 20.0
    """Standard deviation of the scanner noise in HU."""
    kernel: Literal["soft", "standard", "sharp"] = "standard"
    """Reconstruction kernel: with `sharp`, edges overshoot and noise is fine-grained; `soft` blurs both."""

    @model_validator(mode="after")
    def _ranges(self) -> Phantom:
        for name in ("nodules", "nodule_diameter_mm"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the smaller value comes first, got {low}, {high}")
        if self.matrix * self.pixel_mm < 300:
            raise ValueError(f"matrix x pixel_mm is {self.matrix * self.pixel_mm:g} mm, but a chest needs 300 or more")
        return self
