"""Does a denoiser that was trained on crops see whole volumes as it saw crops? Its bias by noise level and field size.

    python benchmarks/field_size_bias.py --configfile config.yaml --cases results/cases/cases.tsv \
        --weights results/models/lung_ddpm/main/all/model.safetensors

Noise of known levels is added to real CT; the denoiser then implies the clean CT in one step. Printed is its mean error
over lung voxels (vessels with them, nodules without), in HU, on whole volumes and on crops around random voxels of the
layout. On fields of the size that it was trained on, an unbiased denoiser has an error near 0; one that has learned
from the zeros beyond its crops has not, where there are fewer of them. `signal / noise` is that of the level.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lungddpm.config.loading import load_config
from lungddpm.config.sections import GeneratorConfig
from lungddpm.core import cases
from lungddpm.core.labels import Label
from lungddpm.core.roles import DISCOVERY, REFERENCE
from lungddpm.core.volume import to_model_range
from lungddpm.models.data import draw_crop
from lungddpm.models.denoiser import UNet, condition_channels
from lungddpm.models.prediction import clean_of
from lungddpm.models.published_checkpoint import load_denoiser
from lungddpm.models.recipe import INSIDE
from lungddpm.models.schedule import alphas_cumprod, cosine_betas

SHARES_OF_TIMESTEPS = (0.02, 0.1, 0.24, 0.4, 0.56, 0.72, 0.84, 0.92)
CROPS_PER_CASE = 8


def main() -> None:
    """Print a row per level and a column per role and field."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", type=Path, nargs="+", default=[Path("config.yaml")])
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--generator", default="lung_ddpm")
    parser.add_argument("--edges", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--patients", type=int, default=4, help="of each role")
    options = parser.parse_args()
    config = load_config(*options.configfile).for_training(options.generator)
    denoiser = load_denoiser(options.weights, config)
    rows = []
    for role in (DISCOVERY, REFERENCE):
        volumes = list(read_volumes(options.cases, role, options.patients))
        fields = {"whole": volumes, **{f"{edge}^3": list(crops(volumes, edge)) for edge in options.edges}}
        for name, chosen in fields.items():
            rows += [{"field": f"{role}, {name}", **row} for row in biases(denoiser, config, chosen)]
    table = pd.DataFrame(rows)
    print(table.pivot(index="signal / noise", columns="field", values="error")[table["field"].unique()].to_markdown())


def read_volumes(table: Path, role: str, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """CT in HU and layout of the first usable cases of a role, both (z, y, x)."""
    for _, row in cases.usable(cases.read_cases(table), role).head(number).iterrows():
        ct, layout = cases.folder_of(table, row).read()
        yield ct.array.transpose(2, 1, 0), layout.array.transpose(2, 1, 0)


def crops(volumes: list[tuple[np.ndarray, np.ndarray]], edge: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Crops as training draws them."""
    generator = torch.Generator().manual_seed(0)
    for hu, layout in volumes:
        for _ in range(CROPS_PER_CASE):
            box = draw_crop(layout, edge, INSIDE, generator)
            yield hu[box], layout[box]


def biases(
    denoiser: UNet, config: GeneratorConfig, fields: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, float]]:
    """The mean error in HU at each level."""
    settings, window = config.settings, config.grid.window_hu
    variances = alphas_cumprod(cosine_betas(settings.timesteps))
    hu_per_unit = (window[1] - window[0]) / 2
    for share in SHARES_OF_TIMESTEPS:
        timestep = round(share * settings.timesteps)
        signal, sigma = variances[timestep].sqrt().item(), (1 - variances[timestep]).sqrt().item()
        generator, errors = torch.Generator().manual_seed(timestep), []
        for hu, layout in fields:
            clean = torch.from_numpy(to_model_range(hu, window))[None, None]
            condition = torch.from_numpy(condition_channels(layout.transpose(2, 1, 0), settings.classes))[None]
            state = signal * clean + sigma * torch.randn(clean.shape, generator=generator)
            with torch.inference_mode():
                predicted = denoiser(torch.cat([state, condition], dim=1), torch.tensor([timestep]))
            implied = clean_of(settings.prediction, state, predicted, signal, sigma).clamp(-1, 1)
            lungs = torch.from_numpy((layout == Label.LUNG) | (layout == Label.VESSEL))
            if lungs.any():
                errors.append((implied - clean)[0, 0][lungs].mean().item() * hu_per_unit)
        yield {"signal / noise": round(signal / sigma, 2), "error": round(float(np.mean(errors)), 1)}


if __name__ == "__main__":
    main()
