"""The phantom's section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lungddpm.config.sections import PositiveFloat, PositiveInt, Section

Share = Annotated[float, Field(ge=0)]


class Textures(Section):
    """How often nodules of each texture are drawn, relative to the others. What the layout does not show, a generator
    has to guess: with several textures in a small cohort, the mean HU of its nodules is a matter of luck."""

    solid: Share = 0.6
    """About 30 HU."""
    part_solid: Share = 0.2
    """A solid core in ground glass."""
    ground_glass: Share = 0.2
    """About -600 HU, with the vessels in it."""

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
    """Mean pixel spacing in mm; each patient's own differs by up to 5 %."""
    slice_mm: PositiveFloat = 3.0
    """Slice spacing and thickness in mm."""
    nodules: tuple[Annotated[int, Field(ge=0)], PositiveInt] = (1, 3)
    """Fewest and most nodules per patient; with none, a patient can only be a reference that gets placed ones."""
    nodule_diameter_mm: tuple[PositiveFloat, PositiveFloat] = (8.0, 30.0)
    """Smallest and largest nodule diameter in mm."""
    nodule_textures: Textures = Textures()
    noise_hu: Annotated[float, Field(ge=0)] = 20.0
    """Standard deviation of the scanner noise in HU."""
    kernel: Literal["soft", "standard", "sharp"] = "standard"
    """Reconstruction kernel: `sharp` edges overshoot and its noise is fine-grained, `soft` blurs both."""

    @model_validator(mode="after")
    def _ranges(self) -> Phantom:
        for name in ("nodules", "nodule_diameter_mm"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the smaller value comes first, got {low}, {high}")
        if self.matrix * self.pixel_mm < 300:
            raise ValueError(f"matrix x pixel_mm is {self.matrix * self.pixel_mm:g} mm, but a chest needs 300 or more")
        return self
