"""The golden denoiser: its weights are a formula of the key names (see the design page)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lungddpm.diffusion.denoiser import UNet


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
def golden_denoiser(reference_folder: Path) -> UNet:
    """The published network at 32^3 and base 32, with the golden weights."""
    shapes = json.loads((reference_folder / "lung_ddpm_32_c32_state_keys.json").read_text())
    weights = {}
    for key, shape in shapes.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if len(shape) > 1:
            weights[key] = drawn / drawn[0].numel() ** 0.5
        else:
            weights[key] = 1 + 0.1 * drawn if key.endswith("weight") else 0.1 * drawn
    denoiser = UNet(3, 32, [1, 1, 2, 3, 4], 32, attention_factor=2)
    denoiser.load_state_dict(weights)
    return denoiser.eval().requires_grad_(False)
