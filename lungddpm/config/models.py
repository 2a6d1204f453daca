"""The configuration: the only place where its defaults and limits are written.

`config.yaml` and the overlays in `config/` hold values; these models hold names, types, units, defaults, limits and
the rules that span several keys. Strings are coerced ("4" -> 4), because `snakemake --config 'a={"b": 4}'` passes
every leaf as a string. `config/README.md` and `workflow/schemas/config.schema.json` are generated from here.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from lungddpm.config.sections import (
    GeneratorConfig,
    Grid,
    Name,
    PositiveFloat,
    PositiveInt,
    Range,
    Section,
    Size3,
    TrainedSettings,
    is_trained,
)
from lungddpm.config.split_file import read_split
from lungddpm.core.arms import BASELINE, Arm
from lungddpm.core.cohorts import ALL, SHARED, Cohort
from lungddpm.core.errors import ConfigError
from lungddpm.core.roles import INTERNAL, ROLES
from lungddpm.core.values import merge_values

Share = Annotated[float, Field(gt=0, lt=1)]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A user's path, in which `~` is the home folder, as in a shell."""


def _sources() -> ModuleType:
    """The contract of sources, imported at run time: rooms import only earlier rooms, and the plug-ins import their
    sections from here."""
    return importlib.import_module("lungddpm.sources")


def _generators() -> ModuleType:
    """The contract of generators, likewise."""
    return importlib.import_module("lungddpm.generators")


def _is_number(text: str) -> bool:
    """Whether a text is a number: Snakemake's --config passes every value as text."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_known(name: str, known: set[str], key: str) -> None:
    if name not in known:
        raise ValueError(f"{key}: there is no '{name}'; available: {', '.join(sorted(known))}")


class _SourceKeys(Section):
    """Where the scans come from."""

    key: ClassVar[str] = "source."
    """Dotted path of the section, for messages that lack it."""
    kind: Name = "phantom"
    path: UserPath | None = None
    """Folder of the data set; a simulated source makes its own and ignores this. Relative paths start in the working
    directory of the run; `~` is your home folder."""

    @model_validator(mode="after")
    def _known(self) -> _SourceKeys:
        _check_known(self.kind, set(_sources().names()), f"{self.key}kind")
        if not self.is_simulated and self.path is None:
            raise ValueError(f"{self.key}path is needed for {self.key}kind '{self.kind}'")
        return self

    @property
    def declared(self) -> Any:
        """The declaration of the module of this kind: a `lungddpm.sources.Source`."""
        return _sources().source_of(self.kind)

    @property
    def settings(self) -> Any:
        """The section of this kind of source; None if it has none."""
        return getattr(self, self.kind, None)

    @property
    def is_simulated(self) -> bool:
        """Whether the patients are simulated."""
        return self.declared.simulate is not None

    @property
    def caveat(self) -> str:
        """A caveat about this source for the report, depending on its settings; mostly empty."""
        return getattr(self.settings, "caveat", "")

    def without_folder(self) -> Self:
        """The same with only the name of its folder, which may reveal who ran it and where."""
        return self.model_copy(update={"path": None if self.path is None else Path(self.path.name)})

    def reading(self, kind: str | None = None) -> tuple[Section, ...]:
        """The settings for reading scans, as passed to a source's functions: one section, or none.

        Args:
            kind: of the source; by default this one.
        """
        declared = _sources().source_of(kind or self.kind)
        reads_by_settings = declared.settings is not None and declared.simulate is None
        return (getattr(self, declared.name),) if reads_by_settings else ()


def _source_section() -> type[Section]:
    """`_SourceKeys` and one section for each module in `lungddpm/sources/` that has settings."""
    declared = [_sources().source_of(name) for name in _sources().names()]
    kinds = "; ".join(f"`{each.name}`: {each.title}" for each in declared)
    kind = Field(default=_SourceKeys.model_fields["kind"].default, description=f"Type of data source. {kinds}.")
    fields: dict[str, Any] = {"kind": (Name, kind)}
    for each in declared:
        if each.settings is not None:
            fields[each.name] = (each.settings, each.settings())
    return create_model("Source", __base__=_SourceKeys, __doc__=_SourceKeys.__doc__, **fields)


if TYPE_CHECKING:

    class Source(_SourceKeys):
        """See below: the fields are known once the modules are."""

else:
    Source = _source_section()


class ExternalTest(Source):
    """A further data set whose patients are used for testing only; its keys are those of `source`, and one more."""

    key: ClassVar[str] = ""
    kind: Name
    distinct_patients: bool = False
    """Its patients are other people than those of the other data sets, even where ids are the same: their ids get the
    name of this data set in front, as in `task06:001`. Without it, an id that two data sets have ends the run."""

    @model_validator(mode="after")
    def _measured(self) -> ExternalTest:
        if self.is_simulated:
            raise ValueError(
                f"kind '{self.kind}' is simulated: run 'lungddpm simulate' first and read its output folder"
            )
        return self


Members = Annotated[
    Share | PositiveInt | list[str],
    WithJsonSchema(
        {
            "anyOf": [
                {"exclusiveMaximum": 1, "exclusiveMinimum": 0, "type": "number"},
                {"minimum": 1, "type": "integer"},
                {"items": {"type": "string"}, "type": "array"},
                {"format": "path", "type": "string"},
            ]
        }
    ),
]
"""Patients of a role. A split file is read where the config is, and becomes a list."""


class Roles(Section):
    """Which patients do what. A number below 1 is a share of all patients, 1 or more a count, a list names patients. A
    string is the path of a split file: one patient per line, or a table (.csv, .tsv) with the columns `patient_id` and
    `role`, of which each role takes its own rows. Relative paths start in the working directory."""

    discovery: Members = 0.5
    """Patients who train the generator and, as real data, the segmenter."""
    reference: Members = 0.2
    """Patients whose CT fills the voxels of synthetic CT that the layout leaves open."""
    test: Members = 0.3
    """Patients on which the segmenters are compared."""
    allow_shared_patients: bool = False
    """Allow a patient to have several roles. The verdict then only shows that the pipeline runs."""

    @field_validator(*ROLES, mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        for patient in value if isinstance(value, list) else ():
            if not isinstance(patient, str):
                raise ValueError(
                    f"a patient id is read as {patient!r}, not as text: YAML takes some ids for numbers, dates, or yes "
                    'and no. Quote patient ids, as in ["0010"]'
                )
        if isinstance(value, str) and not _is_number(value):
            return read_split(Path(os.path.expanduser(value)), str(info.field_name))
        return value

    @model_validator(mode="after")
    def _disjoint(self) -> Roles:
        named = self.named()
        for role, patients in named.items():
            if not patients:
                raise ValueError(f"roles.{role} is empty")
            if twice := [patient for patient, times in Counter(patients).items() if times > 1]:
                raise ValueError(f"roles.{role} names patient {twice[0]} twice")
        shares = [value for role in ROLES if isinstance(value := getattr(self, role), float)]
        if sum(shares) > 1 + 1e-9 and not self.allow_shared_patients:
            raise ValueError(f"the shares of roles add up to {sum(shares):g}, which is more than all patients")
        if not self.allow_shared_patients:
            for first, second in itertools.combinations(named, 2):
                if shared := set(named[first]) & set(named[second]):
                    raise ValueError(f"patient {sorted(shared)[0]} is in roles.{first} and in roles.{second}")
        return self

    def named(self) -> dict[str, list[str]]:
        """The patients of each role that is a list."""
        return {role: value for role in ROLES if isinstance(value := getattr(self, role), list)}

    def counts(self, n_patients: int) -> dict[str, int]:
        """Number of patients of each role; shares are rounded so that their total is preserved.

        Args:
            n_patients: usable patients of the source.
        """
        named = {role: len(patients) for role, patients in self.named().items()}
        values = {role: getattr(self, role) for role in ROLES if role not in named}
        shares = {role: value * n_patients for role, value in values.items() if value < 1}
        whole = {role: int(share) for role, share in shares.items()}
        # Largest remainder (Hamilton): plain rounding of 0.5, 0.2, 0.3 of 3 patients would need 4.
        left = round(sum(shares.values())) - sum(whole.values())
        by_remainder = sorted(shares, key=lambda role: whole[role] - shares[role])
        counts = values | {role: whole[role] + (role in by_remainder[:left]) for role in shares}
        if self.allow_shared_patients:
            counts = {role: max(count, 1) for role, count in counts.items()}
        return {role: (counts | named)[role] for role in ROLES}


class LayoutLimits(Section):
    """Limits for the layout of a scan; a case outside them is excluded, and the reason gives the figure."""

    lung_litres: Range = (1.0, 12.0)
    """Smallest and largest volume of both lungs together, in litres."""
    smaller_lung_share: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    """Smallest share of the lung volume in the smaller lung."""
    end_slice_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest lung area on the first or last slice, as a share of the largest axial area; above it the lungs are cut
    off."""
    vessel_share: Range = (0.003, 0.3)
    """Smallest and largest share of vessels in the lung volume."""
    nodule_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Smallest share of all nodule voxels that are in the lungs or touch them."""
    lung_hu: Range = (-1010.0, -250.0)
    """Lowest and highest median of the lungs in HU; beyond them the CT is not in Hounsfield units."""
    tissue_hu: Range = (-250.0, 400.0)
    """Lowest and highest level of the soft tissue around the lungs in HU, with or without contrast; likewise."""

    @model_validator(mode="after")
    def _ranges(self) -> LayoutLimits:
        for name in ("lung_litres", "vessel_share", "lung_hu", "tissue_hu"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"layouts.limits.{name}: the lower bound comes first, got {low:g}, {high:g}")
        return self


class Layouts(Section):
    """From CT and readers' contours to label volumes."""

    consensus_by: Literal["vote", "staple"] = "vote"
    """How readers' masks are combined into one nodule: `vote` counts the readers of each voxel; `staple` estimates the
    reliability of each reader and from it the probability that a voxel is nodule (Warfield et al. 2004)."""
    consensus: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a nodule's readers who must have marked a voxel for it to count; with `staple`, the probability that it
    must reach."""
    minimum_readers: Annotated[int, Field(ge=1, le=4)] = 1
    """Nodules marked by fewer distinct readers are left out."""
    lungs: Literal["classical", "lungmask", "totalsegmentator"] = "classical"
    """`classical` (built in, no weights), or the network of that package, which must be installed with its weights."""
    limits: LayoutLimits = LayoutLimits()


class Synthesis(Section):
    """Layouts that synthetic CT is made from."""

    place_nodules: bool = True
    """Place plausible nodules (from the discovery cases) in references that have none; otherwise these are not used."""
    jitter_repeats: bool = True
    """Shift and scale the nodules of a reference from its second use on; otherwise only the noise differs."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.33)
    """Smallest and largest factor on the diameter of placed or jittered nodules."""
    shift_mm: Annotated[float, Field(ge=0)] = 15.0
    """Largest shift of a jittered nodule in mm."""
    draw_per_replicate: bool = True
    """Every replicate trains on its own draw of samples: own layouts, own noise, own order of references. The verdict
    then covers variation between draws. The cost of sampling is multiplied by the number of replicates. Samples of
    `arms.external` are always shared."""
    training_per_replicate: bool = False
    """Also train the generators once per replicate, so that the verdict covers variation between these trainings;
    needs `draw_per_replicate`."""

    def decides_layouts(self) -> dict[str, Any]:
        """The keys that determine the layout of a sample, as JSON-like values; the number of draws is not among
        them."""
        return self.model_dump(mode="json", exclude={"draw_per_replicate", "training_per_replicate"})

    @model_validator(mode="after")
    def _draws(self) -> Synthesis:
        if self.training_per_replicate and not self.draw_per_replicate:
            raise ValueError(
                "synthesis.training_per_replicate needs synthesis.draw_per_replicate: true, because each training has "
                "its own samples"
            )
        return self

    @model_validator(mode="after")
    def _scale(self) -> Synthesis:
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"synthesis.scale: the smaller factor comes first, got {self.scale[0]:g}, {self.scale[1]:g}"
            )
        return self


class SampleFilter(Section):
    """Filter for the samples of arms `real+<generator>.filtered@<dose>`, after FreeTumor's rule."""

    found: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest share of a sample's nodule voxels that the segmenters trained on the same real cases alone must find."""
    draws: Annotated[float, Field(ge=1)] = 2.0
    """Samples drawn and judged, as a multiple of the number that the arm takes (the first ones kept). If fewer are
    kept, the arm is smaller, and the tables report it."""


class Arms(Section):
    """The training sets to compare. `real` is always included; the others are named after what they add."""

    generators: list[Name] = ["lung_ddpm"]
    """Generators of synthetic CT: modules of `lungddpm/generators/`, variants of them in `generators`, or names in
    `external`; each gives an arm `real+<generator>@<dose>`."""
    doses: list[PositiveFloat] = [1.0]
    """Synthetic cases as a multiple of the real training cases."""
    real_cases: Annotated[list[PositiveInt | Literal["all"]], Field(min_length=1)] = ["all"]
    """Numbers of real training cases: all arms are made with each number and compared with the same real cases alone.
    `all` takes every usable discovery case; smaller numbers are nested subsets of whole patients, drawn with `seed` and
    the same for all arms."""
    generators_learn_from: Literal["same", "all"] = "same"
    """Training cases of the generators for arms with a subset of the real cases: the `same` subset, so that the arm
    gets no information from the others, or `all`, as with a generator trained elsewhere. This also applies to placed
    nodules and to the donors of copy_paste."""
    controls: list[Name] = ["real"]
    """`real` (the real cases again: arm `real+real`), or generators used as controls, at `control_dose`."""
    control_dose: PositiveFloat = 1.0
    """Dose of the control generators."""
    synthetic_only: list[Name] = []
    """Generators that also get an arm without real cases, with as many synthetic cases as there are real ones:
    `synthetic:<generator>`."""
    quality_only: list[Name] = []
    """Further generators, or names in `external`, that are only measured (image quality, label fidelity) and have no
    arm; they make as many samples as the largest of `doses` takes. External CT may have no nodules here. Meant for
    systems that draw without a layout, such as HA-GAN, and for variants that differ only in sampling."""
    filtered: list[Name] = []
    """Those of `generators` that also get arms `real+<generator>.filtered@<dose>`, with samples that pass `filter`."""
    filter: SampleFilter = SampleFilter()
    external: dict[Name, UserPath] = {}
    """Folders of synthetic CT from other systems, by name, e.g. `{maisi: /data/maisi}`; these names can be used like
    generators (docs/how-to/bring-your-own-synthetic-ct.md)."""

    @model_validator(mode="after")
    def _lists(self) -> Arms:
        for key in ("generators", "doses", "real_cases", "controls", "synthetic_only", "quality_only", "filtered"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"arms.{key} lists a value twice: {values}")
        if self.doses and not self.generators:
            raise ValueError("arms.doses is set, but arms.generators is empty: name a generator, or empty both")
        if self.generators and not self.doses:
            raise ValueError("arms.generators is set, but arms.doses is empty: name a dose, e.g. [1.0]")
        if taken := set(self.quality_only) & {*self.generators, *self.controls, *self.synthetic_only}:
            raise ValueError(f"arms.quality_only: {sorted(taken)[0]} already has an arm, which is measured as well")
        if others := set(self.filtered) - set(self.generators):
            raise ValueError(f"arms.filtered: {sorted(others)[0]} is not in arms.generators")
        if both := set(self.generators) & set(self.controls):
            raise ValueError(f"{sorted(both)[0]} is listed in arms.generators and in arms.controls: keep one")
        return self

    def check_names(self, generators: set[str]) -> None:
        """Check that the lists name generators of the config or of `external`.

        Raises:
            ValueError: they do not.
        """
        if taken := sorted(set(self.external) & {*generators, BASELINE}):
            raise ValueError(f"arms.external: the name {taken[0]} is taken, use another one")
        controls = [name for name in self.controls if name != BASELINE]
        lists = {"generators": self.generators, "controls": controls, "synthetic_only": self.synthetic_only}
        for key, names in {**lists, "quality_only": self.quality_only}.items():
            for name in names:
                _check_known(name, generators | set(self.external), f"arms.{key}")

    def doses_of(self) -> dict[str, list[float]]:
        """Generators in use and the doses of each in the arms, in ascending order; for those without an arm, the dose
        that is judged."""
        doses = {name: set(self.doses) for name in self.generators}
        doses |= {name: {self.control_dose} for name in self.controls if name != BASELINE}
        for name in self.synthetic_only:
            doses.setdefault(name, set()).add(1.0)
        doses |= {name: {max(self.doses, default=1.0)} for name in self.quality_only}
        return {name: sorted(values) for name, values in doses.items()}

    def largest_doses(self) -> dict[str, float]:
        """Generators in use and the largest dose of each in any arm."""
        return {name: doses[-1] for name, doses in self.doses_of().items()}

    def drawn_dose(self, arm: Arm) -> float:
        """Samples that are drawn for an arm, as a multiple of its real cases: more than its dose if it is filtered."""
        return round(arm.dose * self.filter.draws, 9) if arm.filtered else arm.dose

    def drawn_doses_of(self) -> dict[str, list[float]]:
        """Like `doses_of`, for the samples drawn: includes the candidates of filtered arms."""
        drawn: dict[str, set[float]] = {name: set(doses) for name, doses in self.doses_of().items()}
        for arm in self.all():
            if arm.generator is not None:
                drawn[arm.generator].add(self.drawn_dose(arm))
        return {name: sorted(doses) for name, doses in drawn.items()}

    def numbers(self) -> list[int | None]:
        """The numbers of real cases, in the order of the config; None is all."""
        return [None if number == ALL else int(number) for number in self.real_cases]

    def largest_number(self) -> int | None:
        """The largest number of real cases; None is all."""
        numbers = self.numbers()
        return None if None in numbers else max(number for number in numbers if number is not None)

    def numbers_of(self, generator: str) -> list[int | None]:
        """The numbers of real cases that a generator makes samples for: all, or the one that is judged if it has no
        arm."""
        return [self.largest_number()] if generator in self.quality_only else self.numbers()

    def all(self) -> list[Arm]:
        """All arms, grouped by number of real cases: `real` first, then those with synthetic CT, then the controls."""
        mixed = [Arm(True, name, dose) for name in self.generators for dose in self.doses]
        mixed += [Arm(True, name, dose, filtered=True) for name in self.filtered for dose in self.doses]
        alone = [Arm(False, name, 1.0) for name in self.synthetic_only]
        controls = [Arm(True, name, 1.0 if name == BASELINE else self.control_dose) for name in self.controls]
        recipes = [Arm(True, None, 0.0), *mixed, *alone, *controls]
        return [replace(recipe, real_cases=number) for number in self.numbers() for recipe in recipes]

    def planning(self) -> Arm:
        """The arm that nnU-Net's plans are made on: the real cases of the largest number."""
        return Arm(True, None, 0.0, self.largest_number())

    def names(self) -> list[str]:
        """Names of `all`, e.g. `["real", "real+lung_ddpm@1.0", "synthetic:lung_ddpm", "real+real"]`."""
        return [arm.name for arm in self.all()]


class Network(Section):
    """A smaller nnU-Net than the planned one, for small grids and CPUs."""

    patch: Size3 = (32, 32, 32)
    """Patch size in voxels, in the order of `grid.size` (x, y, z)."""
    features: Annotated[list[PositiveInt], Field(min_length=2)] = [8, 16, 32, 64]
    """Channels of each stage; each stage but the first halves the patch."""

    @model_validator(mode="after")
    def _divisible(self) -> Network:
        reduction = 2 ** (len(self.features) - 1)
        if any(edge % reduction for edge in self.patch):
            raise ValueError(
                f"segmentation.network.patch {list(self.patch)} is not divisible by {reduction}, "
                f"as required by {len(self.features)} stages"
            )
        if all(edge == reduction for edge in self.patch):
            raise ValueError(
                f"segmentation.network.patch {list(self.patch)} shrinks to one voxel in {len(self.features)} stages, "
                "which instance normalisation does not support; enlarge it or drop a stage"
            )
        return self


class Segmentation(Section):
    """nnU-Net: every arm gets the plans made on `real` and the same number of optimizer steps."""

    network: Network | None = None
    """Patch and features; null uses nnU-Net's plan (`3d_fullres`)."""
    batch_size: Annotated[int, Field(ge=2)] = 2
    """Patches per optimizer step."""
    steps: PositiveInt = 250_000
    """Optimizer steps in every arm (nnU-Net's default: 1000 epochs of 250)."""
    save_every: PositiveInt = 250
    """Steps between saved states; also the length of an nnU-Net epoch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd`: nnU-Net's default (Nesterov momentum, polynomial decay); `adamw`: learns within hundreds of steps."""
    learning_rate: PositiveFloat = 1e-2
    """Initial learning rate, decayed polynomially to zero."""
    foreground_prior: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Nodule probability that the untrained network predicts for every voxel, e.g. 0.01 (as for the focal loss, Lin et
    al. 2017), which saves the hundreds of steps needed to learn that nodules are rare. null: nnU-Net's default."""
    augmentation: Literal["nnunet", "mirror", "left_right", "none"] = "nnunet"
    """`nnunet`: all of nnU-Net's. The others need fewer steps. `mirror`: mirroring along all axes; `left_right`: along
    the left-right axis only; `none`: as nnU-Net's `nnUNetTrainerNoDA`."""
    test_time_mirroring: bool = True
    """Average each prediction with those of its mirrored copies, as nnU-Net does, along the axes that `augmentation`
    mirrors: up to 8 times the work."""
    n_folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds into which the real training cases are split, by patient and balanced by nodule volume."""
    folds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2, 3, 4]
    """Folds to train; a replicate is a fold with a seed."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Seeds to train in every fold."""

    @model_validator(mode="after")
    def _folds(self) -> Segmentation:
        if max(self.folds) >= self.n_folds:
            raise ValueError(f"segmentation.folds names fold {max(self.folds)}, but n_folds is {self.n_folds}")
        for key in ("folds", "seeds"):
            if len(set(getattr(self, key))) != len(getattr(self, key)):
                raise ValueError(f"segmentation.{key} lists a value twice")
        if self.steps % self.save_every:
            raise ValueError(
                f"segmentation.steps {self.steps} is not a multiple of segmentation.save_every {self.save_every}"
            )
        return self

    @property
    def predictions_per_case(self) -> int:
        """Copies of a case that are predicted, itself included."""
        mirrored_axes = {"nnunet": 3, "mirror": 3, "left_right": 1, "none": 0}[self.augmentation]
        return 2**mirrored_axes if self.test_time_mirroring else 1

    def replicates(self) -> list[str]:
        """Names of all replicates, e.g. `fold0_seed0`."""
        return [self.replicate_name(fold, seed) for fold in self.folds for seed in self.seeds]

    @staticmethod
    def replicate_name(fold: int | str, seed: int | str) -> str:
        """Name of a replicate and of its folder."""
        return f"fold{fold}_seed{seed}"


class ImageQuality(Section):
    """Comparison of synthetic with real CT; FID and MMD need a feature network."""

    weights: Literal["hub"] | UserPath | None = None
    """MedicalNet's public file `resnet_50.pth`; `hub` fetches it from Hugging Face; null uses a network with random
    weights, whose distances separate sets but are not comparable with any publication."""


class LabelFidelity(Section):
    """How well the segmenters of `real` find the nodules of synthetic CT, compared with those of the real
    references."""

    samples: PositiveInt = 50
    """Samples of each generator judged by every replicate: the first ones of its plan, and the same number of
    references (more if the samples were made from others)."""


class Calibration(Section):
    """Limits of the calibration check: how far the HU of a generator's samples may deviate from those of their
    references, on average over samples. Outside them the check fails, which the report shows at the top."""

    lungs_hu: PositiveFloat = 10.0
    """Largest absolute mean difference in the lungs, without nodules, in HU."""
    vessels_hu: PositiveFloat | None = None
    """The same in the vessels; null reports it without a limit, because generators that are not given the vessels
    (`classes`) draw them elsewhere."""
    nodules_hu: PositiveFloat = 40.0
    """The same in the nodules, for samples with the reference's own layout."""
    spread_ratio: Range = (0.9, 1.1)
    """Smallest and largest ratio of the standard deviations of HU in the lungs, without nodules: samples over
    references."""
    nodules_spread_ratio: Range = (0.7, 1.4)
    """The same in the nodules, for samples with the reference's own layout. Wider, because a sample has few nodule
    voxels: it is meant to detect nodules that are speckled or constant although their mean is right."""

    @model_validator(mode="after")
    def _spread(self) -> Calibration:
        for name in ("spread_ratio", "nodules_spread_ratio"):
            low, high = getattr(self, name)
            if not 0 <= low <= 1 <= high:
                raise ValueError(f"{name}: 1 must be between the two limits, got {low:g}, {high:g}")
        return self


class Instrument(Section):
    """Limits of the instrument check, shown above the answers: whether the run can detect a gain that exists. The
    limits of HU are in `calibration`."""

    loss_fall: Share = 0.1
    """Largest share of the fall of a segmenter's training loss in the last third of its steps, beyond scatter. It
    decides only where the standard error of the validation Dice is above `validation_rise`."""
    validation_rise: Share = 0.03
    """Largest rise of Dice on the validation patches in the last third of the steps, beyond scatter; above it,
    segmenters are compared while still learning."""
    seam_ratio: Range = (0.8, 1.25)
    """Smallest and largest step at the border of the lungs, as a multiple of that of the references. (On the phantom
    cohort, constant lungs have 1.27, other patients' lungs 0.78.)"""
    label_fidelity: Share = 0.8
    """Smallest Dice of the segmenters of `real` on a generator's samples, as a share of that on the references' CT."""
    label_fidelity_ceiling: Share = 0.3
    """Smallest Dice of these segmenters on the references' CT. Below it they are too poor to judge a generator, and the
    check is not measured."""
    training_distance: Share = 0.7
    """Smallest distance of a generator's samples to the nearest training case, in the lungs, as a share of that of real
    cases; applies to the medians and to the smallest distances. (An image without any texture, which remembers nothing,
    has 0.71 of the distance of independent noise.)"""

    @model_validator(mode="after")
    def _seam(self) -> Instrument:
        low, high = self.seam_ratio
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"seam_ratio: 1 must be between the two, got {low:g}, {high:g}")
        return self


class Verdict(Section):
    """Statistics of the comparison, and thresholds for warnings."""

    bootstraps: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples (replicates, then cases); descriptive only."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals; an arm is better or worse if its p, corrected within its family, is
    below 1 minus it."""
    relevant_difference: Share | None = None
    """The smallest difference in Dice, the deciding measure, that matters to you: a run reports whether it can detect
    it. null uses the published gain, 0.032 (lungddpm/verdict/published.csv)."""
    primary: str | list[str] = []
    """The arm that the run is about, or several, e.g. `real+lung_ddpm@1.0`: tested first, at the full level. The other
    arms with synthetic CT are tested only if every primary arm was decided. Choose it before the run."""
    calibration: Calibration = Calibration()
    instrument: Instrument = Instrument()


class Workflow(Section):
    """How the work is split into jobs and processes. Results depend only on the number of processes that share a
    training."""

    case_shards: PositiveInt = 4
    """Jobs that share the preparation of cases; at most one per scan."""
    synthesis_shards: PositiveInt = 2
    """Jobs per generator that share its synthesis; each loads the model once. At most one per sample."""
    training_gpus: PositiveInt = 1
    """GPUs of a node that share the training of a generator, in one job with a process each. n processes make n times
    `training.accumulation` forward passes per step: divide that by n to keep the recipe."""
    training_nodes: PositiveInt = 1
    """Nodes that share a training, with `training_gpus` each; more than one needs Slurm."""

    def prepare_jobs(self, scans: int) -> int:
        """Jobs that share the preparation of `n_scans` scans; at least one, which reports if there are none."""
        return max(1, min(self.case_shards, scans))

    def synthesize_jobs(self, samples: int) -> int:
        """Jobs that share the synthesis of `n_samples` samples; at least one."""
        return max(1, min(self.synthesis_shards, samples))

    @property
    def training_processes(self) -> int:
        """Processes that share the training of a generator."""
        return self.training_gpus * self.training_nodes


class _Variants(Section):
    """Settings of the generators by name. Any other name is a variant of one of them: `kind` names that generator,
    whose section provides the keys that the variant does not set. `weights_of` names a generator of that kind whose
    weights the variant uses; without it, a variant of a trained generator is trained itself."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _over_their_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = ", ".join(cls.model_fields)
        for name in values.keys() - cls.model_fields.keys():
            given = values[name]
            kind = given.get("kind") if isinstance(given, dict) else None
            if kind not in cls.model_fields:
                raise ValueError(
                    f"there is no generator '{name if kind is None else kind}'; available: {known}. For a variant, "
                    f"name one of them: {name}: {{kind: ...}}"
                )
            if name == BASELINE or re.fullmatch(r"[A-Za-z0-9_]+", name) is None:
                raise ValueError(
                    f"'{name}' is not a valid name for a generator: use letters, digits and _, but not '{BASELINE}'"
                )
            values = {**values, name: merge_values(values.get(kind) or {}, given)}
        return values

    def variants(self) -> dict[str, Any]:
        """The settings of the variants, by name."""
        return dict(self.__pydantic_extra__ or {})


def _typed(generic: Any, *arguments: Any) -> Any:
    """A generic type whose arguments are known only at run time."""
    return generic[arguments]


def _generators_section() -> type[Section]:
    """One section for each plug-in in `lungddpm/generators/` with its settings and their defaults, and the keys of
    variants."""
    fields: dict[str, Any] = {}
    of_variants: list[Any] = []
    for name in _generators().names():
        plugin = _generators().plugin(name)
        fields[name] = (plugin.settings, Field(default=plugin.settings(), description=plugin.title))
        keys: dict[str, Any] = {"kind": (_typed(Literal, name), ...), "weights_of": (Name | None, None)}
        of_variants.append(create_model(f"{name}_variant", __base__=plugin.settings, **keys))
    schema = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": list(fields)}}}
    one_of_them = _typed(Annotated, reduce(or_, of_variants), Field(discriminator="kind"), WithJsonSchema(schema))
    _Variants.__annotations__["__pydantic_extra__"] = _typed(dict, str, one_of_them)
    return create_model("Generators", __base__=_Variants, __doc__=_Variants.__doc__, **fields)


if TYPE_CHECKING:

    class Generators(_Variants):
        """See below: the fields are known once the plug-ins are."""

else:
    Generators = _generators_section()


def _name_of_arm(text: str) -> str:
    try:
        return Arm.parse(text).name
    except ConfigError:
        return text


class Config(Section):
    """Everything that determines what a run computes."""

    preset: Literal["demo", "published"] = "published"
    """Values of the keys that are not set. `published`: the defaults on this page, i.e. the published recipe. `demo`:
    the phantom cohort on a laptop (`lungddpm/config/presets/demo.yaml`)."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Root seed of all random numbers in the run."""
    source: Source = Source()
    external_tests: dict[Name, ExternalTest] = {}
    """External test sets by name, e.g. `{task06: {kind: images, path: /data/Task06_Lung}}`, each with the keys of
    `source`, and `distinct_patients: true` where its patients are other people even if ids are the same. All their
    patients are used for testing only; each set has its own verdict beside that of `source`
    (docs/how-to/test-on-an-external-cohort.md)."""
    roles: Roles = Roles()
    grid: Grid = Grid()
    layouts: Layouts = Layouts()
    generators: Generators = Generators()
    synthesis: Synthesis = Synthesis()
    arms: Arms = Arms()
    segmentation: Segmentation = Segmentation()
    image_quality: ImageQuality = ImageQuality()
    label_fidelity: LabelFidelity = LabelFidelity()
    verdict: Verdict = Verdict()
    workflow: Workflow = Workflow()

    @field_validator("source", "external_tests", mode="before")
    @classmethod
    def _no_list(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError(
                "must be a mapping, not a list. `source` is one data set; name further ones, for testing only, as in "
                "external_tests: {clinic: {kind: images, path: DIR}}"
            )
        return value

    @field_validator("external_tests")
    @classmethod
    def _names_of_tests(cls, value: dict[str, ExternalTest]) -> dict[str, ExternalTest]:
        if len({name.casefold() for name in [*value, INTERNAL]}) <= len(value):
            raise ValueError(f"names must differ by more than capitals, and '{INTERNAL}' is reserved for `source`")
        return value

    @model_validator(mode="after")
    def _arms_name_generators(self) -> Config:
        self.arms.check_names({name for name, _ in self.generators})
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> Config:
        for name in self.generators_in_use():
            self._check(name)
        network = self.segmentation.network
        if network is not None and any(p > g for p, g in zip(network.patch, self.grid.size, strict=True)):
            raise ValueError(f"segmentation.network.patch {list(network.patch)} is larger than grid.size")
        return self

    @model_validator(mode="after")
    def _primary_is_an_arm(self) -> Config:
        asked = [arm.name for arm in self.arms.all() if not arm.is_control(self.arms.controls)]
        if unknown := [name for name in self.primary_arms() if name not in asked]:
            known = f"those are {', '.join(asked)}" if asked else "there is none"
            raise ValueError(f"verdict.primary: '{unknown[0]}' is not an arm with synthetic CT of this config; {known}")
        return self

    def primary_arms(self) -> list[str]:
        """Names of the arms of `verdict.primary`, with doses spelled as in `arms.names()`; invalid names are kept."""
        given = self.verdict.primary
        return list(dict.fromkeys(map(_name_of_arm, [given] if isinstance(given, str) else given)))

    def differences(self) -> str:
        """All values that are not defaults, as JSON; without the preset, so they are relative to `published`."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={"preset"})
        # In full: a missing key of a variant would be taken from the section of its kind.
        for name, settings in self.generators.variants().items():
            values["generators"][name] = settings.model_dump(mode="json")
        return json.dumps(values, separators=(",", ":"))

    def without_folders(self) -> Config:
        """The same for results, with only the names of the user's folders, as paths may reveal who ran it and where."""
        external = {name: Path(folder.name) for name, folder in self.arms.external.items()}
        weights = self.image_quality.weights
        weights = Path(weights.name) if isinstance(weights, Path) else weights
        return self.model_copy(
            update={
                "source": self.source.without_folder(),
                "external_tests": {name: each.without_folder() for name, each in self.external_tests.items()},
                "image_quality": self.image_quality.model_copy(update={"weights": weights}),
                "arms": self.arms.model_copy(update={"external": external}),
            }
        )

    def data_sets(self) -> dict[str, Source]:
        """All data sets by the name that the column `data_set` has, that of `source` first."""
        return {INTERNAL: self.source, **self.external_tests}

    def generators_in_use(self) -> list[str]:
        """Plug-ins named by the arms, and those whose weights they use."""
        names = [name for name in self.arms.largest_doses() if name not in self.arms.external]
        owners = [owner for name in names if (owner := self.weights_owner(name)) is not None]
        return list(dict.fromkeys([*names, *owners]))

    def kind_of(self, generator: str) -> str:
        """The module of a generator: for a variant its `kind`, else the name itself."""
        kind: str = getattr(getattr(self.generators, generator, None), "kind", generator)
        return kind

    def plugin_of(self, generator: str) -> Any:
        """The declaration of a generator's module: a `lungddpm.generators.Plugin`.

        Raises:
            ConfigError: there is no such generator.
        """
        return _generators().plugin(self.kind_of(generator))

    def weights_owner(self, generator: str) -> str | None:
        """The generator whose weights a generator uses: itself, if it is trained; None if it needs none.

        Raises:
            ConfigError: there is no such generator.
        """
        declared, settings = self.plugin_of(generator), getattr(self.generators, generator)
        shared: str | None = getattr(settings, "weights_of", None)
        if shared is not None:
            return shared
        return generator if declared.recipe is not None else declared.weights_of

    def draws(self, generator: str) -> list[str | None]:
        """The replicates with their own draw of a generator's samples; [None] if all share one."""
        if generator in self.arms.external or not self.synthesis.draw_per_replicate:
            return [None]
        return [*self.segmentation.replicates()]

    def has_own_draws(self, generator: str | None) -> bool:
        """Whether each replicate of an arm with a generator trains on samples of its own; none has, without one."""
        return generator is not None and self.draws(generator) != [None]

    def cohorts(self, generator: str, real_cases: int | None) -> list[Cohort]:
        """The synthetic cohorts of a generator for a number of real cases, one per draw."""
        return [Cohort(real_cases, replicate) for replicate in self.draws(generator)]

    def training_of(self, cohort: Cohort) -> Cohort:
        """The training behind a cohort's samples; placed nodules come from the same cases."""
        return Cohort(
            cohort.real_cases if self.arms.generators_learn_from == "same" else None,
            cohort.replicate if self.synthesis.training_per_replicate else None,
        )

    def trainings(self, generator: str) -> list[Cohort]:
        """Every training of a generator, starting with the one on the most real cases for the first replicate; those of
        fewer real cases only if one with its weights has an arm."""
        plugins = [name for name in self.arms.largest_doses() if name not in self.arms.external]
        numbers: dict[int | None, None] = {self.arms.largest_number(): None}
        for name in plugins:
            if self.weights_owner(name) == generator:
                numbers |= dict.fromkeys(self.arms.numbers_of(name))
        replicates = self.segmentation.replicates() if self.synthesis.draw_per_replicate else [None]
        cohorts = [Cohort(number, replicate) for number in numbers for replicate in replicates]
        return list(dict.fromkeys(map(self.training_of, cohorts)))

    def for_generator(self, name: str, cohort: Cohort = SHARED) -> GeneratorConfig[Any]:
        """The part of this config that a generator gets.

        Args:
            name: of the generator.
            cohort: the cohort that it makes or is trained for.

        Raises:
            ConfigError: there is no such generator, or it does not support this grid.
        """
        try:
            self._check(name)
        except ValueError as error:
            raise ConfigError("config", str(error), "See config/README.md.") from None
        owner = self.weights_owner(name)
        weights_from = self.for_generator(owner, cohort) if owner not in (None, name) else None
        settings, trained_for = getattr(self.generators, name), self.training_of(cohort)
        return GeneratorConfig(name, settings, self.grid, self.seed, weights_from, trained_for)

    def for_training(self, name: str, cohort: Cohort = SHARED) -> GeneratorConfig[TrainedSettings]:
        """The same for a generator that is trained.

        Raises:
            ConfigError: see `for_generator`, or it is not trained.
        """
        config = self.for_generator(name, cohort)
        if is_trained(config):
            return config
        known = [each for each, _ in self.generators if self.weights_owner(each) == each]
        raise ConfigError("--generator", f"'{name}' is not trained", f"Trained generators: {', '.join(known)}.")

    def trained_generators(self) -> list[GeneratorConfig[TrainedSettings]]:
        """The trained generators among those in use, each for the first of `trainings`."""
        each = [self.for_generator(name, self.trainings(name)[0]) for name in self.generators_in_use()]
        return [config for config in each if is_trained(config)]

    def only_trained_generator(self) -> str:
        """The name of the trained generator in use, if it is the only one.

        Raises:
            ConfigError: there is none, or there are several.
        """
        names = [each.name for each in self.trained_generators()]
        if len(names) == 1:
            return names[0]
        remedy = f"Name one of {', '.join(names)}." if names else "Name one."
        raise ConfigError(
            "--generator", f"is required, as the arms use {len(names) or 'no'} trained generators", remedy
        )

    def _check(self, name: str) -> None:
        """Check that a generator can work with the config.

        Raises:
            ConfigError: there is no such generator.
            ValueError: it cannot.
        """
        owner, settings = self.weights_owner(name), getattr(self.generators, name)
        try:
            settings.check_grid(self.grid)
            if owner not in (None, name):
                self._check_weights(name, owner)
        except ValueError as error:
            raise ValueError(f"generators.{name}: {error}") from None

    def _check_weights(self, name: str, owner: str) -> None:
        """Check that a generator can use the weights of another one."""
        wanted, settings = self.plugin_of(name).weights_of, getattr(self.generators, name)
        if owner not in {each for each, _ in self.generators} or self.kind_of(owner) != wanted:
            raise ValueError(f"weights_of: '{owner}' is neither {wanted} nor a variant of it")
        if self.weights_owner(owner) != owner:
            raise ValueError(f"weights_of: '{owner}' is not trained, it has the weights of {self.weights_owner(owner)}")
        trained = getattr(self.generators, owner)
        settings.check_weights(trained)
        if isinstance(settings, TrainedSettings):
            own, others = settings.decides_fit(), trained.decides_fit()
            if differ := sorted(key for key in own.keys() | others.keys() if own.get(key) != others.get(key)):
                raise ValueError(f"weights_of: '{owner}' is trained with another {', '.join(differ)}")
