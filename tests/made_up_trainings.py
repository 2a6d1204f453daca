"""The golden denoiser: its weights are a formula of the key names (see the design page)."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lungddpm.cli import app
from lungddpm.config.loading import parse_config
from lungddpm.config.sections import DiffusionSettings, GeneratorConfig, TrainedSettings
from lungddpm.core.labels import Label
from lungddpm.generators import Generator, Task, plugin
from lungddpm.models.denoiser import UNet
from lungddpm.models.training import run_train


@pytest.fixture(scope="session")
def reference_folder(shared_data: Path) -> Path:
    """Folder of the golden numbers; skips the test where it is absent."""
    folder = shared_data.parent / "reference"
    if not folder.is_dir():
        pytest.skip(f"golden numbers not found in {folder}")
    return folder


@pytest.fixture(scope="session")
def golden(reference_folder: Path) -> dict[str, torch.Tensor]:
    """All golden arrays."""
    with np.load(reference_folder / "lung_ddpm_golden.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


@pytest.fixture(scope="session")
def golden_denoiser() -> UNet:
    """The published network at 32^3 and base 32, with the golden weights."""
    denoiser = UNet(3, 32, [1, 1, 2, 3, 4], 32, attention_factor=2)
    weights = {}
    for key, fresh in denoiser.state_dict().items():
        drawn = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if drawn.dim() > 1:
            weights[key] = drawn / drawn[0].numel() ** 0.5
        else:
            weights[key] = 1 + 0.1 * drawn if key.endswith("weight") else 0.1 * drawn
    denoiser.load_state_dict(weights)
    return denoiser.eval().requires_grad_(False)


def train(config: GeneratorConfig[TrainedSettings], *arguments, **options) -> None:
    """`run_train` as the command does it."""
    run_train(config, *plugin(config.kind).training(config), *arguments, **options)


def train_interrupted(monkeypatch, owner: type, step: int, *arguments) -> None:
    """`train`, stopped when `owner` would take this step, and started again."""
    take_step = owner.take_step

    def stopping(self, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        return take_step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "take_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)
    torch.manual_seed(99)  # nothing may depend on the global generator
    train(*arguments)


@pytest.fixture(scope="session")
def training_config() -> Callable[..., GeneratorConfig[DiffusionSettings]]:
    """Makes a config that trains on the tiny cohort within a second; keywords change `training`."""

    def make(seed: int = 1, **changes) -> GeneratorConfig[DiffusionSettings]:
        settings = {
            "steps": 6, "batch_size": 2, "accumulation": 2, "learning_rate": 2e-3, "learning_rate_schedule": "cosine",
            "gradient_clip": 1.0, "crop": 8, "ema_decay": 0.5, "ema_every": 2, "ema_start": 3, "precision": "fp32",
            "save_every": 2, "sample_every": 4,
        }  # fmt: skip
        diffusion = {
            "classes": ["lung", "nodule", "vessel"],
            "timesteps": 20,
            "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
            "training": {**settings, **changes},
            "sampling": {"steps": 20},
        }
        values = {"seed": seed, "grid": {"size": [16, 16, 16]}, "generators": {"lung_ddpm": diffusion}}
        return parse_config(values).for_training("lung_ddpm")

    return make


@pytest.fixture(scope="session")
def write_config() -> Callable[[Path, GeneratorConfig[DiffusionSettings]], None]:
    """Writes a config file that has one generator's part of it."""

    def write(path: Path, config: GeneratorConfig[DiffusionSettings]) -> None:
        settings, grid = (section.model_dump(mode="json") for section in (config.settings, config.grid))
        path.write_text(json.dumps({"seed": config.seed, "grid": grid, "generators": {config.name: settings}}))

    return write


def run_command(*arguments: object) -> str:
    """What a command of `lungddpm` prints; it has to succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def train_by_command(generator: str, config: Path, cohort: Path, folder: Path) -> Path:
    """The folder of a training by the command, on one thread."""
    where = ["--cases", cohort, "--output", folder, "--device", "cpu", "--threads", "1"]
    run_command("train", "--generator", generator, "--configfile", config, *where)
    return folder


def sees(generator: Generator, task: Task) -> list[bool]:
    """Whether what is drawn depends on the slice of the hint, on the open voxels outside it, on the voxels to draw."""
    named = task.layout.array != Label.BACKGROUND
    levels = np.flatnonzero(named.any(axis=(0, 1)))
    middle = (levels[0] + levels[-1]) // 2
    in_slice, outside, inside = (task.reference.array.copy() for _ in range(3))
    in_slice[:, :, middle] += 90
    outside[~named] += 90
    inside[named] += 90
    for array in (outside, inside):
        array[:, :, middle] = task.reference.array[:, :, middle]
    (drawn,) = generator.make([task])
    others = (Task(task.reference.like(other), task.layout, task.seed) for other in (in_slice, outside, inside))
    return [not np.array_equal(drawn, generator.make([other])[0]) for other in others]
