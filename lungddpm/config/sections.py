"""Sections of the configuration shared by generators and the models behind them, and the part of it that one gets.

A plug-in in `lungddpm/generators/` builds its own settings from these classes; `config.models` puts the settings of all
plug-ins together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeGuard, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lungddpm.core.cohorts import SHARED, Cohort

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Size3 = tuple[PositiveInt, PositiveInt, PositiveInt]
Range = tuple[float, float]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Orientation = Literal["published", "ras"]
Padding = Literal["zeros", "replicate"]
Norm = Literal["volume", "voxel"]
TimeConditioning = Literal["shift", "scale_shift"]
Background = Literal["reference", "generated"]
Hint = Literal["none", "slice", "volume"]
Intensities = Literal["corrected", "published"]


Layer = Literal["lung", "nodule", "vessel"]


def _check_classes(classes: list[Layer]) -> list[Layer]:
    if classes not in (["lung", "nodule"], ["lung", "nodule", "vessel"]):
        raise ValueError("classes is [lung, nodule] or [lung, nodule, vessel]")
    return classes


Classes = Annotated[list[Layer], AfterValidator(_check_classes)]

SHARED_RUN = "main"
"""Replaces the run's name in seeds that do not depend on a training: layouts are the same for all generators, whatever
their runs are called."""


class Section(BaseModel):
    """A mapping of keys; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Grid(Section):
    """The model grid, to which every CT and layout is resampled."""

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


class Denoiser(Section):
    """The published 3-D U-Net; its defaults give the published network."""

    base_channels: PositiveInt = 64
    """Channels of the first level."""
    multipliers: Annotated[list[PositiveInt], Field(min_length=2)] = [1, 1, 2, 3, 4]
    """Channels of each level as multiples of `base_channels`; each level but the last halves the grid."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; must divide every level's channels."""
    attention: bool = True
    """Self-attention at feature maps 16 voxels wide and in the middle; must be off for training on crops, unless
    sampling uses the same crops."""
    padding: Padding = "zeros"
    """Padding of convolutions: `zeros`, as published, or the outermost voxels (`replicate`)."""
    norm: Norm = "volume"
    """Normalisation over groups of channels of the whole `volume`, as published, or over all channels of a `voxel`. A
    network trained on crops behaves the same on whole volumes only with `replicate` and `voxel`."""
    time_conditioning: TimeConditioning = "shift"
    """How the noise level enters each residual block: `shift` adds a function of it to the features, as published;
    `scale_shift` also scales the normalised features by one (adaptive normalisation, Dhariwal & Nichol 2021), which a
    short training learns sooner."""
    wavelet: bool = False
    """Work on the eight Haar sub-bands of the CT, each of half the edge, and transform back (WDM): needs a fraction of
    the memory and operations. WDM has `multipliers: [1, 2, 2, 4, 4]`."""

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
        return 2 ** (len(self.multipliers) - 1 + self.wavelet)

    @property
    def halvings(self) -> str:
        """The layers that halve the grid, in words."""
        return f"{len(self.multipliers)} denoiser levels{' and the wavelet transform' if self.wavelet else ''}"


class Training(Section):
    """Training of the network; the defaults are the published recipe."""

    steps: PositiveInt = 100_000
    """Optimizer steps."""
    loss: Literal["l1", "l2"] = "l1"
    """Loss: mean absolute error (`l1`, as published) or mean squared error (`l2`)."""
    lesion_weight: PositiveFloat = 1.0
    """Weight of a nodule voxel in the loss relative to other voxels (published: 1; MAISI-v2: 100); the weights of a
    batch have mean 1."""
    batch_size: PositiveInt = 1
    """Volumes (or crops) per forward pass."""
    accumulation: PositiveInt = 2
    """Forward passes per optimizer step; per process if several share the training."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of Adam."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` decays to zero over `steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Warm-up steps of the learning rate; a shorter training never reaches the peak. 0 as published."""
    gradient_clip: PositiveFloat | None = None
    """Largest gradient norm; null: no clipping (as published)."""
    crop: PositiveInt | None = None
    """Edge of random cubic crops in voxels; null trains on whole volumes (as published)."""
    augmentation: Literal["none", "mild", "standard"] = "none"
    """`none`: as published; `mild`: left-right flips in half of the samples, slight changes of HU; `standard`: also
    slight rotation, scaling and shifts in half of them, which blurs, and dims small nodules on coarse grids."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the weights."""
    ema_every: PositiveInt = 10
    """Steps between updates of the average."""
    ema_start: Annotated[int, Field(ge=0)] = 2000
    """Before this step the average is a plain copy."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on a GPU that supports it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the network (torch.compile): minutes at the start, faster steps."""
    save_every: PositiveInt = 1000
    """Steps between saved states, from which an interrupted training resumes."""
    sample_every: PositiveInt = 5000
    """Steps between grids of samples; one is always drawn at the end."""


class Solving(Section):
    """From noise to CT: solver and steps."""

    sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] = "ddpm"
    """`ddpm`: ancestral, as published; `ddim`: first order; `dpmsolver++`, `unipc`: multistep, 20 steps suffice."""
    order: Annotated[int, Field(ge=2, le=3)] = 2
    """Order of `dpmsolver++` and `unipc`; the other samplers have none."""
    steps: PositiveInt = 250
    """Noise levels visited, at most `timesteps`; as published, `ddpm` visits all."""
    intensities: Intensities = "corrected"
    """Scaling of the reference for the denoiser: `corrected` by `grid.window_hu`, as in training; `published` each
    axial slice by its own minimum and maximum, for published weights only."""
    times: Literal["corrected", "published"] = "corrected"
    """`published`: the denoiser gets timesteps on a scale of 1000 whatever `timesteps` is (Lung-DDPM+)."""
    levels: Literal["corrected", "published"] = "corrected"
    """`corrected`: timesteps evenly spaced in the log signal-to-noise ratio, down to the clean CT; `published`: evenly
    spaced in time, with fractions, ending at timestep 0; dynamic thresholding (Lung-DDPM+, sampler `dpmsolver++`)."""
    batch_size: PositiveInt = 1
    """Volumes sampled at once on a GPU; on a CPU one at a time, so that they do not depend on each other."""

    @model_validator(mode="after")
    def _levels(self) -> Solving:
        if self.levels == "published" and self.sampler != "dpmsolver++":
            raise ValueError("levels: published needs sampler: dpmsolver++")
        return self


class Sampling(Solving):
    """From noise to CT: solver, steps, and anatomically aware sampling (AAS)."""

    resampling: PositiveInt = 1
    """Number of visits to the noise levels, two at a time, with fresh noise in between (RePaint): n times the cost for
    a better seam between generated and reference voxels."""
    aas: Literal["corrected", "published"] = "corrected"
    """`published` pastes the reference one noise level late and leaves its noise in the background."""
    background: Background = "reference"
    """Content of the voxels that the layout leaves open: `reference`: its CT (AAS); `generated`: drawn by the network
    (no AAS)."""

    @model_validator(mode="after")
    def _resampling(self) -> Sampling:
        if self.resampling > 1 and self.aas == "published":
            raise ValueError("resampling above 1 needs aas: corrected")
        if self.background == "generated" and (self.resampling > 1 or self.aas == "published"):
            raise ValueError("resampling above 1 and aas: published need background: reference")
        return self


class GeneratorSettings(Section):
    """Settings of a generator without any of its own."""

    def decides_samples(self) -> dict[str, Any]:
        """The keys that determine a sample besides its inputs, weights and seed, as JSON-like values."""
        return self.model_dump(mode="json", exclude={"run": True, "training": True, "sampling": {"batch_size"}})

    def check_grid(self, grid: Grid) -> None:
        """Check that the generator supports a grid.

        Raises:
            ValueError: it cannot.
        """

    def check_weights(self, trained: TrainedSettings) -> None:
        """Check that it can use the weights of another generator, if it does.

        Raises:
            ValueError: it cannot.
        """


class TrainedSettings(GeneratorSettings):
    """Settings of a generator that is trained."""

    run: Name = "main"
    """Name of the run: a folder under `results/models/<generator>/`, part of every sample's seed."""
    classes: Classes = ["lung", "nodule"]
    """Layout classes that condition the network, in channel order. Without `vessel`, vessels count as lung."""
    orientation: Orientation = "published"
    """Orientation of the chest for the network, in training and sampling. `published`: rotated in plane, as for the
    published weights (inferred, see docs/explanation/diffusion.md); `ras`: that of the grid, as in earlier versions. It
    must match the weights; only weights of `published` can be exported."""
    training: Training = Training()

    def decides_samples(self) -> dict[str, Any]:
        return {**super().decides_samples(), "training.precision": self.training.precision}

    def decides_weights(self, processes: int) -> dict[str, Any]:
        """The keys that determine the weights of the trained network, as JSON-like values.

        `accumulation` counts the forward passes of all processes together: n take n times those of one.
        """
        only_how = {"gradient_checkpointing", "compile", "save_every", "sample_every"}
        decisive = self.model_dump(mode="json", exclude={"sampling": True, "training": only_how})
        decisive["training"]["accumulation"] *= processes
        return decisive

    def decides_fit(self) -> dict[str, Any]:
        """The keys that must match between weights and their use, as JSON-like values; nested ones by dotted path."""
        return self.model_dump(mode="json", include={"classes", "orientation"})

    def drawn_size(self, grid: Grid) -> Size3:
        """Voxels along x, y, z that the network processes at once when drawing."""
        return grid.size

    def check_grid(self, grid: Grid) -> None:
        crop = self.training.crop
        if crop is not None and crop > min(grid.size):
            raise ValueError(f"training.crop {crop} is larger than grid.size {list(grid.size)}")


class HintedSettings(TrainedSettings):
    """Settings of a generator whose network may see a part of the reference."""

    hint: Hint = "none"
    """What the network is given of the reference besides the layout, as an additional channel. `none`: nothing, as
    published; `slice`: one axial slice at mid-height of the labelled voxels, including the region to draw (as in
    GEM-3D);
    `volume`: everything except the labelled voxels."""

    def decides_fit(self) -> dict[str, Any]:
        return super().decides_fit() | {"hint": self.hint}

    def decides_weights(self, processes: int) -> dict[str, Any]:
        decisive = super().decides_weights(processes)
        if self.hint == "none":
            # Trainings that began before this key existed continue.
            del decisive["hint"]
        return decisive


class UNetSettings(HintedSettings):
    """Settings of a generator whose network is the published U-Net."""

    denoiser: Denoiser = Denoiser()

    @model_validator(mode="after")
    def _crop(self) -> UNetSettings:
        crop = self.training.crop
        if crop is not None and crop % self.denoiser.reduction:
            raise ValueError(
                f"training.crop {crop} is not divisible by {self.denoiser.reduction}, "
                f"as required by {self.denoiser.halvings}"
            )
        return self

    def decides_fit(self) -> dict[str, Any]:
        denoiser = self.denoiser.model_dump(mode="json")
        return super().decides_fit() | {f"denoiser.{key}": it for key, it in denoiser.items()}

    def check_grid(self, grid: Grid) -> None:
        super().check_grid(grid)
        crop, reduction, drawn = self.training.crop, self.denoiser.reduction, self.drawn_size(grid)
        if any(edge % reduction for edge in drawn):
            raise ValueError(
                f"grid.size {list(grid.size)} is not divisible by {reduction}, as required by {self.denoiser.halvings}"
            )
        if self.denoiser.attention and len(set(drawn)) != 1:
            raise ValueError("denoiser.attention needs a cubic grid.size (it acts at 16 voxels per edge)")
        if self.denoiser.attention and crop is not None and drawn != (crop,) * 3:
            raise ValueError(
                "training.crop needs denoiser.attention: false "
                "(attention acts at a fixed feature map size, which crops do not have)"
            )


class DiffusionSettings(UNetSettings):
    """Settings of a diffusion model: network, schedule, training, sampling."""

    timesteps: PositiveInt = 250
    """Noise levels T of the cosine schedule."""
    prediction: Literal["epsilon", "v", "clean"] = "epsilon"
    """Prediction target: the noise (`epsilon`, as published), the velocity (`v`) or the CT itself (`clean`). With
    `epsilon`, a small error at the noisiest levels shifts the brightness of a whole volume."""
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _steps(self) -> DiffusionSettings:
        if self.sampling.steps > self.timesteps:
            raise ValueError(f"sampling.steps {self.sampling.steps} exceeds timesteps {self.timesteps}")
        return self

    def decides_fit(self) -> dict[str, Any]:
        return {"timesteps": self.timesteps, "prediction": self.prediction, **super().decides_fit()}


_SMALLEST_JUDGED = 6


class Autoencoder(Section):
    """The autoencoder whose latents a latent diffusion model draws; trained first, on CT alone."""

    channels: Annotated[list[PositiveInt], Field(min_length=2)] = [32, 64]
    """Channels of each level; each but the last halves the grid. On a grid of 128 voxels per edge, a latent of three
    levels is 11 mm wide: most nodules vanish."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    residual_blocks: PositiveInt = 1
    """Per level, in the encoder and in the decoder."""
    norm_groups: PositiveInt = 32
    """Groups of every GroupNorm; must divide all `channels`."""
    padding: Padding = "zeros"
    """See `denoiser.padding`."""
    norm: Norm = "volume"
    """See `denoiser.norm`."""
    steps: PositiveInt = 20_000
    """How many of `training.steps` train the autoencoder, which comes first; the others train the denoiser."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of those steps. The other keys of `training` apply to both; average, warm-up and decay restart
    with the denoiser."""
    crop: PositiveInt | None = None
    """Edge of random cubic crops in voxels, anywhere in the volume; null trains on whole volumes."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-7
    """Weight of the KL divergence of the latents from a standard normal distribution, summed over a sample; the mean
    absolute error has weight 1."""
    adversarial_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the adversarial loss of a patch discriminator (least squares)."""
    adversarial_from: Annotated[int, Field(ge=0)] = 2000
    """First step with this discriminator; from `steps` on there is none."""

    @property
    def reduction(self) -> int:
        """Factor by which latents are smaller than the grid."""
        return 2 ** (len(self.channels) - 1)

    @model_validator(mode="after")
    def _channels(self) -> Autoencoder:
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} does not divide {channels} channels")
        if self.latent_channels > self.reduction**3:
            raise ValueError(
                f"latent_channels {self.latent_channels} exceeds {self.reduction**3}, the voxels of a latent: it would "
                "compress nothing"
            )
        return self


class LatentDenoiser(Denoiser):
    """The published 3-D U-Net, but for latents."""

    wavelet: bool = False
    """Must be off: the transform is for voxels, and the autoencoder has already reduced them."""


class LatentSettings(UNetSettings):
    """Settings of a diffusion model that draws the latents of an autoencoder."""

    denoiser: LatentDenoiser = LatentDenoiser()
    orientation: Literal["ras"] = "ras"
    """That of the grid: there are no published weights that need another one."""
    autoencoder: Autoencoder = Autoencoder()
    timesteps: PositiveInt = 250
    """Noise levels T of the cosine schedule."""
    prediction: Literal["epsilon", "v", "clean"] = "v"
    """Prediction target, see `lung_ddpm.prediction`."""

    @model_validator(mode="after")
    def _latents(self) -> LatentSettings:
        crop, own, reduction = self.training.crop, self.autoencoder.crop, self.autoencoder.reduction
        if self.denoiser.wavelet:
            raise ValueError("denoiser.wavelet is for voxels, but the autoencoder has already reduced them")
        if self.autoencoder.steps >= self.training.steps:
            raise ValueError(
                f"autoencoder.steps {self.autoencoder.steps} leave none of training.steps {self.training.steps} to the "
                "denoiser"
            )
        if crop is not None and crop % (reduction * self.denoiser.reduction):
            raise ValueError(f"training.crop {crop} is not divisible by {reduction * self.denoiser.reduction}")
        if own is not None and own % reduction:
            raise ValueError(f"autoencoder.crop {own} is not divisible by {reduction}")
        return self

    def phases(self) -> tuple[Training, Training]:
        """How the autoencoder is trained, and then the denoiser."""
        own = {name: getattr(self.autoencoder, name) for name in ("steps", "learning_rate", "crop")}
        left = self.training.steps - self.autoencoder.steps
        return self.training.model_copy(update=own), self.training.model_copy(update={"steps": left})

    def decides_fit(self) -> dict[str, Any]:
        trained_only = {"steps", "learning_rate", "crop", "kl_weight", "adversarial_weight", "adversarial_from"}
        autoencoder = self.autoencoder.model_dump(mode="json", exclude=trained_only)
        return {
            "timesteps": self.timesteps,
            "prediction": self.prediction,
            **super().decides_fit(),
            **{f"autoencoder.{key}": value for key, value in autoencoder.items()},
        }

    def check_grid(self, grid: Grid) -> None:
        super().check_grid(grid)
        reduction, crop = self.autoencoder.reduction * self.denoiser.reduction, self.autoencoder.crop
        if any(edge % reduction for edge in grid.size):
            raise ValueError(
                f"grid.size {list(grid.size)} is not divisible by {reduction}, as required by the autoencoder "
                f"and {len(self.denoiser.multipliers)} denoiser levels"
            )
        if crop is not None and crop > min(grid.size):
            raise ValueError(f"autoencoder.crop {crop} is larger than grid.size {list(grid.size)}")
        if (crop or min(grid.size)) < _SMALLEST_JUDGED:
            raise ValueError(f"the autoencoder's discriminator needs at least {_SMALLEST_JUDGED} voxels per edge")


S = TypeVar("S", bound=GeneratorSettings, covariant=True)


@dataclass(frozen=True)
class GeneratorConfig(Generic[S]):
    """The part of the configuration that a generator gets.

    Attributes:
        name: its section in `generators`; see `kind`.
        settings: its own settings.
        grid: the grid of all cases.
        seed: root of every random number.
        weights_from: the other generator whose weights it uses, if any.
        trained_for: the number of real cases it learns from, and its replicate, if it is trained for one only.
    """

    name: str
    settings: S
    grid: Grid
    seed: int
    weights_from: GeneratorConfig[Any] | None = None
    trained_for: Cohort = SHARED

    @property
    def kind(self) -> str:
        """Its module in `lungddpm/generators/`; for a variant this differs from its name."""
        kind: str = getattr(self.settings, "kind", self.name)
        return kind

    @property
    def of_weights(self) -> GeneratorConfig[Any]:
        """The config of the generator whose weights it uses: its own, or another's.

        Raises:
            ValueError: it uses none.
        """
        if self.weights_from is not None:
            return self.weights_from
        if not isinstance(self.settings, TrainedSettings):
            raise ValueError(f"{self.name} draws without weights")
        return self

    @property
    def noise_from(self) -> GeneratorConfig[Any]:
        """The config whose name and run enter the seeds of samples: its own, or that of the generator in `weights_of`,
        so that the two draw from the same noise."""
        return self if getattr(self.settings, "weights_of", None) is None else self.of_weights

    @property
    def run(self) -> str:
        """The name that enters its seeds: that of its run; a training for one replicate has its own seeds."""
        if not isinstance(self.settings, TrainedSettings):
            return SHARED_RUN
        own = "" if self.trained_for.replicate is None else f"-{self.trained_for.replicate}"
        return f"{self.settings.run}{own}"

    @property
    def model_folder(self) -> str:
        """Folder of the trained model within the results of a run."""
        run = self.settings.run if isinstance(self.settings, TrainedSettings) else SHARED_RUN
        return f"models/{self.name}/{run}/{self.trained_for.name}"

    def decides_samples(self) -> dict[str, Any]:
        """Everything that determines a sample besides its inputs, weights and seed, as JSON-like values."""
        own = self.settings.decides_samples()
        if self.weights_from is None:
            return own
        trained = self.weights_from.settings
        of_weights = {"generator": self.weights_from.name, **trained.decides_fit()}
        if not isinstance(self.settings, TrainedSettings):
            of_weights["training.precision"] = trained.training.precision
        return {**own, "weights_from": of_weights}

    def decides_fit(self: GeneratorConfig[TrainedSettings]) -> dict[str, Any]:
        """The settings that weights were trained for, by dotted key, as JSON-like values: their use must match all of
        them."""
        grid = self.grid.model_dump(mode="json", include={"size", "extent", "window_hu"})
        of_weights = self.of_weights.name
        return {"generator": of_weights, **self.settings.decides_fit(), **{f"grid.{k}": v for k, v in grid.items()}}

    def dump(self) -> dict[str, Any]:
        """All of it as JSON-like values."""
        settings, grid = (section.model_dump(mode="json") for section in (self.settings, self.grid))
        return {"generator": self.name, "settings": settings, "grid": grid, "seed": self.seed}


def is_trained(config: GeneratorConfig[GeneratorSettings]) -> TypeGuard[GeneratorConfig[TrainedSettings]]:
    """Whether the generator is trained itself and does not use the weights of another one."""
    return isinstance(config.settings, TrainedSettings) and config.weights_from is None
