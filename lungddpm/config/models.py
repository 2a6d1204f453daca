"""The configuration: the only place where a default or a limit of it is written.

`config.yaml` and the overlays in `config/` hold values; these models hold names, types, units, defaults, limits and
the rules that span several keys. Strings are coerced ("4" -> 4), because `snakemake --config 'a={"b": 4}'` passes
every leaf as a string. `config/README.md` and `workflow/schemas/config.schema.json` are generated from here.
"""

from __future__ import annotations

import itertools
import os
import pkgutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lungddpm.core.arms import BASELINE, Arm
from lungddpm.core.errors import ConfigError
from lungddpm.core.roles import ROLES

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]
Range = tuple[float, float]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Orientation = Literal["published", "ras"]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path of the user's, in which `~` is the home folder, as in a shell."""


def _modules(package: str) -> set[str]:
    return {module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / package)])}


def _check_known(name: str, known: set[str], key: str) -> None:
    if name not in known:
        raise ValueError(f"{key}: there is no '{name}'; known are {', '.join(sorted(known))}")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Phantom(_Section):
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
    """Fewest and most nodules a patient; with none, a patient can only be a reference that gets placed ones."""
    nodule_diameter_mm: tuple[PositiveFloat, PositiveFloat] = (8.0, 30.0)
    """Smallest and largest nodule diameter in mm."""
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


class Source(_Section):
    """Where the scans come from."""

    kind: Name = "phantom"
    """`phantom` (built in), `lidc` (DICOM + LIDC XML) or `nifti` (folders `images/` and `labels/`)."""
    path: UserPath | None = None
    """Folder of the data set; the phantom cohort makes its own and ignores this. A relative path starts in the working
    directory of the run, `~` is your home folder."""
    phantom: Phantom = Phantom()

    @model_validator(mode="after")
    def _known(self) -> Source:
        _check_known(self.kind, _modules("sources"), "source.kind")
        if self.kind != "phantom" and self.path is None:
            raise ValueError(f"source.path is needed for source.kind '{self.kind}'")
        return self


class Roles(_Section):
    """Which patients do what. A number below 1 is a share of all patients, 1 or more a count, a list names patients."""

    discovery: Share | PositiveInt | list[str] = 0.5
    """Patients who train the denoiser and, as real data, the segmenter."""
    reference: Share | PositiveInt | list[str] = 0.2
    """Patients whose CT fills what a layout leaves open in synthetic CT."""
    test: Share | PositiveInt | list[str] = 0.3
    """Patients on whom the segmenters are compared."""
    allow_shared_patients: bool = False
    """Let one patient have several roles. The verdict then means nothing but that the pipeline runs."""

    @field_validator(*ROLES, mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        for patient in value if isinstance(value, list) else ():
            if not isinstance(patient, str):
                raise ValueError(
                    f"a patient is read as {patient!r}, not as text: YAML takes some ids for numbers, dates, or yes "
                    'and no. Quote patient ids, as in ["0010"]'
                )
        return value

    @model_validator(mode="after")
    def _disjoint(self) -> Roles:
        named = self.named()
        for role, patients in named.items():
            if not patients:
                raise ValueError(f"roles.{role} names no patient")
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
        """Patients of each role; shares are rounded so that together they take what they add up to.

        Args:
            n_patients: usable patients of the source.
        """
        named = {role: len(patients) for role, patients in self.named().items()}
        values = {role: getattr(self, role) for role in ROLES if role not in named}
        shares = {role: value * n_patients for role, value in values.items() if value < 1}
        whole = {role: int(share) for role, share in shares.items()}
        # Largest remainder (Hamilton): plain rounding of 0.5, 0.2, 0.3 of 3 patients would ask for 4.
        left = round(sum(shares.values())) - sum(whole.values())
        by_remainder = sorted(shares, key=lambda role: whole[role] - shares[role])
        counts = values | {role: whole[role] + (role in by_remainder[:left]) for role in shares}
        if self.allow_shared_patients:
            counts = {role: max(count, 1) for role, count in counts.items()}
        return {role: (counts | named)[role] for role in ROLES}


class Grid(_Section):
    """The model grid: what every CT and layout is resampled to."""

    size: Size3 = (64, 64, 64)
    """Voxels along x (left to right), y (posterior to anterior), z (feet to head)."""
    extent: Literal["full", "lungs"] = "full"
    """`full`: the whole field of view (as published); `lungs`: the lungs' bounding box plus `margin_mm`."""
    margin_mm: Annotated[float, Field(ge=0)] = 10.0
    """Margin around the lungs for `extent: lungs`, in mm."""
    window_hu: Range = (-1024.0, 600.0)
    """HU range that maps linearly to the model's [-1, 1]; values outside are clipped."""

    @model_validator(mode="after")
    def _window(self) -> Grid:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"grid.window_hu: the lower bound comes first, got {self.window_hu}")
        return self


class LayoutLimits(_Section):
    """What a scan's layout has to keep within; outside it the case is excluded, with the figure as the reason."""

    lung_litres: Range = (1.0, 12.0)
    """Least and greatest volume of both lungs together, in litres."""
    smaller_lung_share: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    """Least share of the lung volume that the smaller lung holds."""
    end_slice_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest lung area on the first or last slice, as a share of the greatest axial area; above it lungs are cut."""
    vessel_share: Range = (0.003, 0.3)
    """Least and greatest share of the lung volume that vessels take."""
    nodule_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of all nodule voxels that lie in the lungs or touch them."""
    lung_hu: Range = (-1010.0, -250.0)
    """Lowest and highest median of the lungs in HU; beyond them the CT is not in Hounsfield units."""
    tissue_hu: Range = (-250.0, 400.0)
    """Lowest and highest level of the soft tissue around the lungs in HU, contrast included; the same holds."""

    @model_validator(mode="after")
    def _ranges(self) -> LayoutLimits:
        for name in ("lung_litres", "vessel_share", "lung_hu", "tissue_hu"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"layouts.limits.{name}: the lower bound comes first, got {low:g}, {high:g}")
        return self


class Layouts(_Section):
    """From CT and readers' contours to label volumes."""

    consensus: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a nodule's own readers who must have drawn a voxel for it to count."""
    minimum_readers: Annotated[int, Field(ge=1, le=4)] = 1
    """Nodules drawn by fewer distinct readers are left out."""
    lungs: Literal["classical", "lungmask", "totalsegmentator"] = "classical"
    """`classical` (built in, no weights), or the network of that package, to be installed with its weights."""
    limits: LayoutLimits = LayoutLimits()


class Synthesis(_Section):
    """Which layouts the synthetic CT is made from."""

    place_nodules: bool = True
    """Give references without a nodule new plausible ones (from the discovery cases); else they are not used."""
    jitter_repeats: bool = True
    """From the second time that a reference is used on, shift and scale its nodules; else only the noise differs."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.33)
    """Smallest and largest factor on the diameter of a nodule that is placed or jittered."""
    shift_mm: Annotated[float, Field(ge=0)] = 15.0
    """Largest shift of a jittered nodule in mm."""

    @model_validator(mode="after")
    def _scale(self) -> Synthesis:
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"synthesis.scale: the smaller factor comes first, got {self.scale[0]:g}, {self.scale[1]:g}"
            )
        return self


class Denoiser(_Section):
    """The published 3-D U-Net; its defaults give the published network."""

    base_channels: PositiveInt = 64
    """Channels of the first level."""
    multipliers: Annotated[list[PositiveInt], Field(min_length=2)] = [1, 1, 2, 3, 4]
    """Channels of each level as multiples of `base_channels`; each level but the last halves the grid."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; must divide every level's channels."""
    attention: bool = True
    """Self-attention where the feature map is 16 voxels wide and in the middle; off for training on crops, unless
    sampling sees the same crops."""

    @model_validator(mode="after")
    def _groups(self) -> Denoiser:
        for multiplier in self.multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide {self.base_channels} x {multiplier} channels"
                )
        return self

    @property
    def reduction(self) -> int:
        """How many times smaller the deepest feature map is than the grid."""
        return 2 ** (len(self.multipliers) - 1)


class Training(_Section):
    """Training of the denoiser; the defaults are the published recipe."""

    steps: PositiveInt = 100_000
    """Optimizer steps."""
    batch_size: PositiveInt = 1
    """Volumes (or crops) a forward pass."""
    accumulation: PositiveInt = 2
    """Forward passes an optimizer step, on each process where several share the training."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of Adam."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` decays to zero over `steps`."""
    gradient_clip: PositiveFloat | None = None
    """Largest gradient norm; null does not clip (as published)."""
    crop: PositiveInt | None = None
    """Edge of random cubic crops in voxels; null trains on whole volumes (as published)."""
    augmentation: Literal["none", "mild", "standard"] = "none"
    """`none`: as published; `mild`: left and right swapped in half of the samples, HU changed a little; `standard`:
    half of them turned, scaled and shifted a little as well, which blurs, and dims small nodules on coarse grids."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the weights."""
    ema_every: PositiveInt = 10
    """Steps between updates of the average."""
    ema_start: Annotated[int, Field(ge=0)] = 2000
    """The average is a plain copy before this step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Compute activations once more in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the denoiser (torch.compile): minutes at the start, faster steps."""
    save_every: PositiveInt = 1000
    """Steps between saved states, from which an interrupted training goes on."""
    sample_every: PositiveInt = 5000
    """Steps between grids of samples; one is drawn at the end in any case."""


class Sampling(_Section):
    """From noise to CT: solver, steps, and anatomically aware sampling (AAS)."""

    sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] = "ddpm"
    """`ddpm`: ancestral, as published; `ddim`: first order; `dpmsolver++`, `unipc`: multistep, 20 steps will do."""
    order: Annotated[int, Field(ge=2, le=3)] = 2
    """Order of `dpmsolver++` and `unipc`; the other samplers have none."""
    steps: PositiveInt = 250
    """Noise levels visited, at most `diffusion.timesteps`; as published, `ddpm` visits all."""
    resampling: PositiveInt = 1
    """Times that the noise levels are visited, two at a time, with fresh noise in between (RePaint): n times the cost
    for a better seam between what is generated and what the reference fills."""
    aas: Literal["corrected", "published"] = "corrected"
    """`published` pastes the reference one noise level late and leaves its noise in the background."""
    intensities: Literal["corrected", "published"] = "corrected"
    """How the reference is scaled for the denoiser: `corrected` by `grid.window_hu`, as in training; `published` each
    axial slice by its own minimum and maximum, for published weights only."""
    times: Literal["corrected", "published"] = "corrected"
    """`published`: the denoiser is told its times on a scale of 1000 whatever `diffusion.timesteps` (Lung-DDPM+)."""
    levels: Literal["corrected", "published"] = "corrected"
    """`corrected`: timesteps even in the log signal-to-noise ratio, to the clean CT; `published`: even in time, with
    fractions, where sampling ends at timestep 0; dynamic thresholding (Lung-DDPM+, sampler `dpmsolver++`)."""
    batch_size: PositiveInt = 1
    """Volumes sampled at once on a GPU; a CPU takes them one by one, so that they do not depend on one another."""

    @model_validator(mode="after")
    def _resampling(self) -> Sampling:
        if self.resampling > 1 and self.aas == "published":
            raise ValueError("resampling above 1 needs aas: corrected")
        return self

    @model_validator(mode="after")
    def _levels(self) -> Sampling:
        if self.levels == "published" and self.sampler != "dpmsolver++":
            raise ValueError("levels: published needs sampler: dpmsolver++")
        return self


class Diffusion(_Section):
    """Lung-DDPM: denoiser, schedule, training, sampling."""

    run: Name = "main"
    """Name of the run: the folder under `results/diffusion/`, part of every sample's seed."""
    classes: list[Literal["lung", "nodule", "vessel"]] = ["lung", "nodule"]
    """Layout classes that condition the denoiser, in channel order. Without `vessel`, vessels count as lung."""
    timesteps: PositiveInt = 250
    """Noise levels T of the cosine schedule."""
    orientation: Orientation = "published"
    """How the denoiser sees the chest, in training and in sampling. `published`: turned in plane, as published weights
    do (an inference, see docs/explanation/diffusion.md); `ras`: as the grid lies, as weights of earlier versions do. It
    must be that of the weights; only weights of `published` can be exported."""
    denoiser: Denoiser = Denoiser()
    training: Training = Training()
    sampling: Sampling = Sampling()

    @property
    def nodule_centred(self) -> bool:
        """Whether the denoiser sees nothing but crops around nodules, in training and sampling alike (Lung-DDPM+)."""
        return self.classes == ["nodule"]

    def decides_weights(self, processes: int) -> dict[str, Any]:
        """The keys that decide the weights of a trained denoiser, as JSON-like values.

        `accumulation` counts the forward passes of all processes together: n take n times those of one.
        """
        only_how = {"gradient_checkpointing", "compile", "save_every", "sample_every"}
        decisive = self.model_dump(mode="json", exclude={"sampling": True, "training": only_how})
        decisive["training"]["accumulation"] *= processes
        return decisive

    @model_validator(mode="after")
    def _consistent(self) -> Diffusion:
        if not self.nodule_centred and self.classes not in (["lung", "nodule"], ["lung", "nodule", "vessel"]):
            raise ValueError("classes is [lung, nodule] or [lung, nodule, vessel]; lung_ddpm_plus has [nodule]")
        if self.sampling.steps > self.timesteps:
            raise ValueError(f"sampling.steps {self.sampling.steps} exceeds timesteps {self.timesteps}")
        crop = self.training.crop
        if crop is None:
            if self.nodule_centred:
                raise ValueError("classes [nodule] needs training.crop, the edge of the crops around nodules")
        else:
            if self.denoiser.attention and not self.nodule_centred:
                raise ValueError(
                    "training.crop needs denoiser.attention: false "
                    "(attention sits at a fixed map size, which crops do not have)"
                )
            if crop % self.denoiser.reduction:
                raise ValueError(f"training.crop {crop} is not divisible by {self.denoiser.reduction}")
        return self


class PlusDenoiser(Denoiser):
    """The published network of Lung-DDPM+ (39.0 million parameters): one level less than that of Lung-DDPM."""

    multipliers: Annotated[list[PositiveInt], Field(min_length=2)] = [1, 2, 3, 4]
    """Channels of each level as multiples of `base_channels`; each level but the last halves the crop."""


class PlusTraining(Training):
    """Training on crops around nodules; what is published of the recipe is that of Lung-DDPM."""

    crop: Annotated[int, Field(ge=8)] = 64
    """Edge of the cubic crops in voxels, each around a voxel of a nodule; sampling works on crops of this edge, too."""


class PlusSampling(Sampling):
    """From the inverted reference to CT: the solver, which inverts as well (the same number of steps once more)."""

    sampler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    """`ddim`: first order; `dpmsolver++` (as published), `unipc`: multistep."""
    order: Annotated[int, Field(ge=2, le=3)] = 3
    """Order of `dpmsolver++` and `unipc`."""
    steps: PositiveInt = 50
    """Noise levels visited, at most `timesteps`: on the way to the noise and on the way back."""
    resampling: Annotated[int, Field(ge=1, le=1)] = 1
    """There is none: fresh noise on the way would undo the inversion."""
    aas: Literal["corrected", "published"] = "corrected"
    """`published`: a crop starts from the reference's noise and is then drawn freely; `corrected`: voxels of the crop
    that do not count in the result keep to the reference at all noise levels."""


class LungDDPMPlus(Diffusion):
    """Lung-DDPM+: a denoiser of its own, for crops around nodules; the defaults are what is published."""

    run: Name = "plus"
    """Name of the run: its folder under `results/diffusion/`; another one than `diffusion.run`."""
    classes: list[Literal["nodule"]] = ["nodule"]
    """Layout classes that condition the denoiser: nodules alone."""
    denoiser: PlusDenoiser = PlusDenoiser()
    training: PlusTraining = PlusTraining()
    sampling: PlusSampling = PlusSampling()


class Arms(_Section):
    """The training sets that are compared. `real` is always there; the others are named after what they add."""

    generators: list[Name] = ["lung_ddpm"]
    """Generators of synthetic CT, modules of `lungddpm/generators/` or names in `external`; each gives an arm
    `real+<generator>@<dose>`."""
    doses: list[PositiveFloat] = [1.0]
    """Synthetic cases as a multiple of the real training cases."""
    controls: list[Name] = ["real"]
    """`real` (the real cases once more: arm `real+real`), or generators used as controls, at `control_dose`."""
    control_dose: PositiveFloat = 1.0
    """Dose of the control generators."""
    synthetic_only: list[Name] = []
    """Generators that are also trained on alone, with as many synthetic cases as there are real ones: arm
    `synthetic:<generator>`."""
    external: dict[Name, UserPath] = {}
    """Folders of synthetic CT that other systems made, by name, e.g. `{maisi: /data/maisi}`; the names may stand where
    generators do (docs/how-to/bring-your-own-synthetic-ct.md)."""

    @model_validator(mode="after")
    def _known(self) -> Arms:
        modules = _modules("generators") - {"external"}
        if taken := sorted(set(self.external) & {*modules, "external", BASELINE}):
            raise ValueError(f"arms.external: the name {taken[0]} is taken, use another one")
        controls = [name for name in self.controls if name != BASELINE]
        lists = {"generators": self.generators, "controls": controls, "synthetic_only": self.synthetic_only}
        for key, names in lists.items():
            for name in names:
                _check_known(name, modules | set(self.external), f"arms.{key}")
        for key in ("generators", "doses", "controls", "synthetic_only"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"arms.{key} lists a value twice: {values}")
        if self.doses and not self.generators:
            raise ValueError("arms.doses is set, but arms.generators is empty: name a generator, or empty both")
        if self.generators and not self.doses:
            raise ValueError("arms.generators is set, but arms.doses is empty: name a dose, e.g. [1.0]")
        if both := set(self.generators) & set(self.controls):
            raise ValueError(f"{sorted(both)[0]} is listed in arms.generators and in arms.controls: keep one")
        return self

    def doses_of(self) -> dict[str, list[float]]:
        """Generators in use and the doses that the arms take of each, in ascending order."""
        doses = {name: set(self.doses) for name in self.generators}
        doses |= {name: {self.control_dose} for name in self.controls if name != BASELINE}
        for name in self.synthetic_only:
            doses.setdefault(name, set()).add(1.0)
        return {name: sorted(values) for name, values in doses.items()}

    def largest_doses(self) -> dict[str, float]:
        """Generators in use and the largest dose that any arm takes of each."""
        return {name: doses[-1] for name, doses in self.doses_of().items()}

    def all(self) -> list[Arm]:
        """All arms, `real` first, then those with synthetic CT, then the controls."""
        mixed = [Arm(True, name, dose) for name in self.generators for dose in self.doses]
        alone = [Arm(False, name, 1.0) for name in self.synthetic_only]
        controls = [Arm(True, name, 1.0 if name == BASELINE else self.control_dose) for name in self.controls]
        return [Arm(True, None, 0.0), *mixed, *alone, *controls]

    def names(self) -> list[str]:
        """Names of `all`, e.g. `["real", "real+lung_ddpm@1.0", "synthetic:lung_ddpm", "real+real"]`."""
        return [arm.name for arm in self.all()]


class Network(_Section):
    """A smaller nnU-Net than the planned one: for small grids and for CPUs."""

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
                f"as {len(self.features)} stages need"
            )
        if all(edge == reduction for edge in self.patch):
            raise ValueError(
                f"segmentation.network.patch {list(self.patch)} shrinks to one voxel in {len(self.features)} stages, "
                "which instance normalisation cannot take; enlarge it or drop a stage"
            )
        return self


class Segmentation(_Section):
    """nnU-Net: every arm gets the plans made on `real` and the same number of optimizer steps."""

    network: Network | None = None
    """Patch and features; null takes what nnU-Net plans (`3d_fullres`)."""
    batch_size: Annotated[int, Field(ge=2)] = 2
    """Patches an optimizer step."""
    steps: PositiveInt = 250_000
    """Optimizer steps in every arm (nnU-Net's default: 1000 epochs of 250)."""
    save_every: PositiveInt = 250
    """Steps between saved states; also the length of what nnU-Net calls an epoch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd`: nnU-Net's own (Nesterov momentum, polynomial decay); `adamw`: learns in hundreds of steps."""
    learning_rate: PositiveFloat = 1e-2
    """Initial learning rate, decayed polynomially to zero."""
    n_folds: Annotated[int, Field(ge=2)] = 5
    """The real training cases are split, by patient, into this many folds."""
    folds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2, 3, 4]
    """Folds that are trained; a replicate is a fold with a seed."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Seeds that are trained in every fold."""

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

    def replicates(self) -> list[str]:
        """Names of all replicates, e.g. `fold0_seed0`."""
        return [self.replicate_name(fold, seed) for fold in self.folds for seed in self.seeds]

    @staticmethod
    def replicate_name(fold: int | str, seed: int | str) -> str:
        """Name of a replicate, which is also that of its folder."""
        return f"fold{fold}_seed{seed}"


class ImageQuality(_Section):
    """How synthetic CT is compared with real CT; FID and MMD need a feature network."""

    weights: Literal["hub"] | UserPath | None = None
    """The public file `resnet_50.pth` of MedicalNet; `hub` takes it from Hugging Face; null takes a network with random
    weights, whose distances tell sets apart but compare with no publication."""


class Calibration(_Section):
    """Limits of the calibration check: how far the HU of a generator's samples may be from those of their references,
    on average over samples. Outside them the check fails, and the page says so first."""

    lungs_hu: PositiveFloat = 10.0
    """Largest mean difference in the lungs, nodules left out, in HU, to either side."""
    vessels_hu: PositiveFloat | None = None
    """The same in the vessels; null shows it without a limit, as denoisers that are not told where the vessels are
    (`diffusion.classes`) draw them elsewhere."""
    nodules_hu: PositiveFloat = 40.0
    """The same in the nodules, of samples with the reference's own layout."""
    spread_ratio: Range = (0.9, 1.1)
    """Smallest and largest ratio of the standard deviations of HU in the lungs, nodules left out: samples over
    references."""

    @model_validator(mode="after")
    def _spread(self) -> Calibration:
        low, high = self.spread_ratio
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"spread_ratio: 1 must lie between the two, got {low:g}, {high:g}")
        return self


class Verdict(_Section):
    """Statistics of the comparison, and what its page warns of."""

    bootstraps: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples (replicate, then case); they describe, they do not decide."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals; an arm is better or worse where p, corrected for all arms, is below 1 - it."""
    calibration: Calibration = Calibration()


class Workflow(_Section):
    """How the work is cut into jobs and processes. Results depend only on the processes that train a denoiser."""

    case_shards: PositiveInt = 4
    """Jobs that share the preparation of cases; never more than there are scans."""
    synthesis_shards: PositiveInt = 2
    """Jobs per generator that share its synthesis; each loads the model once. Never more than there are samples."""
    denoiser_gpus: PositiveInt = 1
    """GPUs of a node that share the training of a denoiser, in one job and a process each. n processes take n times
    `training.accumulation` forward passes a step: divide that by n to keep the recipe."""
    denoiser_nodes: PositiveInt = 1
    """Nodes that share it, with `denoiser_gpus` each; more than one needs Slurm."""

    def prepare_jobs(self, scans: int) -> int:
        """Jobs that share the preparation of so many scans; at least one, which says why there is none."""
        return max(1, min(self.case_shards, scans))

    def synthesize_jobs(self, samples: int) -> int:
        """Jobs that share the synthesis of so many samples; at least one."""
        return max(1, min(self.synthesis_shards, samples))

    @property
    def denoiser_processes(self) -> int:
        """Processes that share the training of a denoiser."""
        return self.denoiser_gpus * self.denoiser_nodes


class Config(_Section):
    """Everything that decides what a run computes."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Root of every random number in the run."""
    source: Source = Source()
    roles: Roles = Roles()
    grid: Grid = Grid()
    layouts: Layouts = Layouts()
    diffusion: Diffusion = Diffusion()
    lung_ddpm_plus: LungDDPMPlus | None = None
    """The denoiser that the generator `lung_ddpm_plus` needs; `{}` is the published one, null none."""
    synthesis: Synthesis = Synthesis()
    arms: Arms = Arms()
    segmentation: Segmentation = Segmentation()
    image_quality: ImageQuality = ImageQuality()
    verdict: Verdict = Verdict()
    workflow: Workflow = Workflow()

    @model_validator(mode="after")
    def _grid_fits(self) -> Config:
        for section, diffusion in self.denoisers().items():
            reduction, crop = diffusion.denoiser.reduction, diffusion.training.crop
            if crop is not None and crop > min(self.grid.size):
                raise ValueError(f"{section}.training.crop {crop} is larger than grid.size {list(self.grid.size)}")
            if diffusion.nodule_centred:
                continue  # it never sees the whole grid
            if any(edge % reduction for edge in self.grid.size):
                raise ValueError(
                    f"grid.size {list(self.grid.size)} is not divisible by {reduction}, "
                    f"as {len(diffusion.denoiser.multipliers)} denoiser levels need"
                )
            if diffusion.denoiser.attention and len(set(self.grid.size)) != 1:
                raise ValueError(f"{section}.denoiser.attention needs a cubic grid.size (it sits at 16 voxels an edge)")
        network = self.segmentation.network
        if network is not None and any(p > g for p, g in zip(network.patch, self.grid.size, strict=True)):
            raise ValueError(f"segmentation.network.patch {list(network.patch)} is larger than grid.size")
        return self

    @model_validator(mode="after")
    def _runs(self) -> Config:
        if self.lung_ddpm_plus is not None and self.lung_ddpm_plus.run == self.diffusion.run:
            raise ValueError(f"diffusion.run and lung_ddpm_plus.run are both '{self.diffusion.run}': rename one")
        return self

    def without_folders(self) -> Config:
        """The same for results: of the user's folders, which may tell who ran it and where, only the names."""
        external = {name: Path(folder.name) for name, folder in self.arms.external.items()}
        path = None if self.source.path is None else Path(self.source.path.name)
        weights = self.image_quality.weights
        weights = Path(weights.name) if isinstance(weights, Path) else weights
        return self.model_copy(
            update={
                "source": self.source.model_copy(update={"path": path}),
                "image_quality": self.image_quality.model_copy(update={"weights": weights}),
                "arms": self.arms.model_copy(update={"external": external}),
            }
        )

    def denoisers(self) -> dict[str, Diffusion]:
        """What describes a denoiser, by the name of its section."""
        plus = {} if self.lung_ddpm_plus is None else {"lung_ddpm_plus": self.lung_ddpm_plus}
        return {"diffusion": self.diffusion, **plus}

    def for_denoiser(self, section: str) -> Config:
        """The config of one denoiser: the same with its section in the place of `diffusion`.

        Raises:
            ConfigError: there is no such section, or it is not set; or `diffusion` has the classes of Lung-DDPM+.
        """
        denoisers = self.denoisers()
        if section not in denoisers:
            remedy = "Known are diffusion and lung_ddpm_plus; 'lung_ddpm_plus: {}' takes what is published."
            raise ConfigError("config", f"no section '{section}' describes a denoiser", remedy)
        if section == "diffusion" and self.diffusion.nodule_centred:
            raise ConfigError(
                "diffusion.classes", "[nodule] does not suit a denoiser of whole volumes", "Use lung_ddpm_plus for it."
            )
        return self.model_copy(update={"diffusion": denoisers[section], "lung_ddpm_plus": None})
