"""How exact the samplers are, on data for which the best denoiser is known in closed form.

    python benchmarks/sampler_accuracy.py [orders|spread|seam ...]

The data are columns of voxels, normal with mean zero and a known covariance; their best denoiser is a Wiener filter, so
that every deviation is the sampler's. Three tables, in about two minutes on one core:

orders  largest error of a voxel against the exact probability flow, by steps, and the order at which it falls
spread  standard deviation of what is generated, as a share of the truth, by steps and by the data's own
seam    deviation from the exact conditional distribution given the pasted voxels (AAS), in its standard deviations:
        in the voxels beside the seam, in the third ones, and far from it; exact would be 1.00 everywhere
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tabulate import tabulate

from lungddpm.models.sampling import Predictor, Sampler, make_solver, sample_aas, sample_free
from lungddpm.models.schedule import alphas_cumprod, cosine_betas, spaced_timesteps

SAMPLERS: dict[str, tuple[Sampler, int]] = {
    "ddpm": ("ddpm", 2),
    "ddim": ("ddim", 2),
    "dpmsolver++ 2": ("dpmsolver++", 2),
    "dpmsolver++ 3": ("dpmsolver++", 3),
    "unipc 2": ("unipc", 2),
    "unipc 3": ("unipc", 3),
}
TIMESTEPS = 250


@dataclass(frozen=True)
class GaussianColumns:
    """Columns along D, normal with mean zero; columns are independent of one another.

    Attributes:
        covariance: (D, D) float64.
    """

    covariance: np.ndarray

    def draw(self, columns: int, generator: torch.Generator) -> torch.Tensor:
        """(1, 1, D, columns, 1) float32."""
        root = torch.from_numpy(np.linalg.cholesky(self.covariance))
        drawn = root @ torch.randn(len(root), columns, dtype=torch.float64, generator=generator)
        return drawn.float()[None, None, :, :, None]

    def best_denoiser(self, betas: torch.Tensor) -> Predictor:
        """The noise to expect given a noisy column: sigma (alpha^2 C + sigma^2)^-1 x."""
        signal = alphas_cumprod(betas)
        variances, axes = (torch.from_numpy(array) for array in np.linalg.eigh(self.covariance))

        def predict_noise(inputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            share = signal[int(timesteps[0])]
            gain = (1 - share).sqrt() / (share * variances + 1 - share)
            columns = inputs[0, 0].double().flatten(1)
            return (axes @ (gain[:, None] * (axes.T @ columns))).reshape(inputs[:, :1].shape)

        return predict_noise

    def conditional(self, given: torch.Tensor, is_given: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (n, columns) and standard deviation (n,) of the other n voxels, given these; of `given` as drawn."""
        known, unknown = np.flatnonzero(is_given), np.flatnonzero(~is_given)
        across = self.covariance[np.ix_(unknown, known)]
        weights = across @ np.linalg.inv(self.covariance[np.ix_(known, known)])
        remaining = np.diag(self.covariance)[unknown] - (weights * across).sum(axis=1)
        mean = torch.from_numpy(weights) @ given[0, 0, known, :, 0].double()
        return mean, torch.from_numpy(np.sqrt(remaining))


def correlated(kind: str, length: float, voxels: int = 48, spread: float = 0.25) -> GaussianColumns:
    """Stationary columns; `length` in voxels.

    `rough`: exponential correlation, as noise that a kernel has smoothed once; `smooth`: Gaussian correlation.
    """
    distance = np.abs(np.subtract.outer(np.arange(voxels), np.arange(voxels))) / length
    correlation = np.exp(-distance) if kind == "rough" else np.exp(-(distance**2) / 2)
    return GaussianColumns(spread**2 * (correlation + 1e-4 * np.eye(voxels)))


def flow_error(sampler: Sampler, order: int, steps: int, spread: float = 0.25, timesteps: int = 8000) -> float:
    """Largest error after a sampling, against the exact probability flow to the last level and the clean CT from there.

    With this many timesteps, those visited are almost evenly spaced, as the theory of the solvers assumes.
    """
    betas = cosine_betas(timesteps)
    signal = alphas_cumprod(betas)
    data = GaussianColumns(np.eye(1) * spread**2)
    condition = torch.ones(1, 1, 1, 16, 1)
    solver = make_solver(sampler, order, betas, steps)
    drawn = sample_free(data.best_denoiser(betas), solver, condition, [_seeded(3)])
    start = torch.randn(1, 1, 1, 16, 1, generator=_seeded(3))
    first, last = (signal[spaced_timesteps(signal, steps)[place]] for place in (0, -1))
    variance_first, variance_last = (share * spread**2 + 1 - share for share in (first, last))
    end = start.double() * (variance_last / variance_first).sqrt()
    return (drawn - end * last.sqrt() * spread**2 / variance_last).abs().max().item()


def order_of(errors: Sequence[float], steps: Sequence[int]) -> float:
    """The power of the steps at which errors fall: the slope between logarithms, by least squares."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def spread_share(sampler: Sampler, order: int, steps: int, spread: float, timesteps: int = TIMESTEPS) -> float:
    """Standard deviation of generated independent voxels, as a share of the truth."""
    betas = cosine_betas(timesteps)
    data = GaussianColumns(np.eye(1) * spread**2)
    condition = torch.ones(1, 1, 1, 128, 128)
    solver = make_solver(sampler, order, betas, steps)
    drawn = sample_free(data.best_denoiser(betas), solver, condition, [_seeded(1)])
    start = torch.randn(1, 1, 1, 128, 128, generator=_seeded(1))
    # Of a solver without noise of its own, the share is the same for each voxel; no need to estimate it.
    exact = sampler != "ddpm"
    return (drawn.std() / (start.std() if exact else 1.0) / spread).item()


def seam_deviation(
    data: GaussianColumns, sampler: Sampler, order: int, steps: int, resampling: int = 1, columns: int = 2048
) -> tuple[float, float, float]:
    """Root mean square deviation from the exact conditional mean, in conditional standard deviations.

    The first and last quarter of each column are pasted from columns of the same data, the rest is generated.

    Returns:
        In the voxels beside the seam, in the third ones, and in the middle half of what is generated.
    """
    voxels = len(data.covariance)
    betas = cosine_betas(TIMESTEPS)
    is_open = np.ones(voxels, bool)
    is_open[voxels // 4 : -(voxels // 4)] = False
    condition = torch.from_numpy(np.where(is_open, -1.0, 1.0)).float()[None, None, :, None, None]
    reference = data.draw(columns, _seeded(0))
    condition = condition.expand(1, 1, voxels, columns, 1)
    solver = make_solver(sampler, order, betas, steps)
    drawn = sample_aas(data.best_denoiser(betas), solver, condition, reference, [_seeded(1)], resampling)
    mean, deviation = data.conditional(reference, is_open)
    errors = (drawn[0, 0, ~is_open, :, 0] - mean) / deviation[:, None]
    by_voxel = errors.square().mean(dim=1)
    inside = by_voxel[len(by_voxel) // 4 : -(len(by_voxel) // 4)]
    return tuple(part.mean().sqrt().item() for part in (by_voxel[[0, -1]], by_voxel[[2, -3]], inside))


def orders_table() -> str:
    """Errors by steps, and their order."""
    steps = (20, 40, 80, 160)
    rows = []
    for name, (sampler, order) in SAMPLERS.items():
        if sampler != "ddpm":  # its noise follows no flow
            errors = [flow_error(sampler, order, count) for count in steps]
            rows.append([name, *(f"{error:.1e}" for error in errors), f"{order_of(errors, steps):.1f}"])
    return tabulate(rows, ["sampler", *(f"{count} steps" for count in steps), "order"])


def spread_table() -> str:
    """Generated spread by steps and by the data's own."""
    spreads = (0.03, 0.05, 0.1, 0.15, 0.25)
    rows = [
        [name, steps, *(f"{spread_share(sampler, order, steps, spread):.3f}" for spread in spreads)]
        for name, (sampler, order) in SAMPLERS.items()
        for steps in ((20, 50, 250) if sampler == "ddpm" else (10, 20, 50))
    ]
    return tabulate(rows, ["sampler", "steps", *(f"data {spread}" for spread in spreads)], disable_numparse=True)


def seam_table() -> str:
    """Deviation at the seam by sampler and resampling."""
    kinds = {"rough, 6 voxels": correlated("rough", 6), "smooth, 2 voxels": correlated("smooth", 2)}
    rows = []
    for name, (sampler, order) in SAMPLERS.items():
        for steps in (20, 50, 250) if sampler == "ddpm" else (20, 50):
            for resampling in (1, 2, 5):
                if steps * resampling > 500:
                    continue
                deviations = [seam_deviation(data, sampler, order, steps, resampling) for data in kinds.values()]
                shown = [" ".join(f"{value:.2f}" for value in deviation) for deviation in deviations]
                rows.append([name, steps, resampling, steps * resampling, *shown])
    headers = ["sampler", "steps", "resampling", "denoiser calls", *(f"{kind}: beside, third, far" for kind in kinds)]
    return tabulate(rows, headers, disable_numparse=True)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TABLES = {"orders": orders_table, "spread": spread_table, "seam": seam_table}


def main() -> int:
    """Print the tables named as arguments, or all."""
    names = sys.argv[1:] or list(TABLES)
    if unknown := [name for name in names if name not in TABLES]:
        print(f"there is no table {unknown[0]}; known are {', '.join(TABLES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name in names:
        print(f"\n{name}\n\n{TABLES[name]()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
