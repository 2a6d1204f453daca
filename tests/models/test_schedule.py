import pytest
import torch

from lungddpm.models.schedule import add_noise, alphas_cumprod, cosine_betas, spaced_timesteps

# From the golden file.
GOLDEN_BETAS = {
    250: {0: 0.00019426879732842295, 125: 0.012621723518779437, 248: 0.749990286182701, 249: 0.999},
    1000: {0: 4.128422482196914e-05, 500: 0.003155691441585118, 998: 0.7499993929011878, 999: 0.999},
}


@pytest.mark.parametrize("timesteps", [250, 1000])
def test_betas_meet_the_golden_values(timesteps):
    betas = cosine_betas(timesteps)
    assert {place: betas[place].item() for place in GOLDEN_BETAS[timesteps]} == pytest.approx(GOLDEN_BETAS[timesteps])


@pytest.mark.parametrize("timesteps", [250, 1000])
def test_betas_equal_the_golden_ones(golden, timesteps):
    torch.testing.assert_close(cosine_betas(timesteps), golden[f"betas_{timesteps}"], rtol=0, atol=1e-12)


def test_golden_loss(golden, golden_denoiser):
    signal = alphas_cumprod(cosine_betas(250))
    timesteps = torch.tensor([7, 201])
    noisy = add_noise(golden["x0"], golden["noise"], timesteps, signal)
    condition = golden["layout"].float() * 2 - 1
    predicted = golden_denoiser(torch.cat([noisy, condition], dim=1), timesteps)
    loss = (predicted - golden["noise"]).abs().mean().double()
    torch.testing.assert_close(loss, golden["loss_l1"], rtol=0, atol=1e-5)


def test_noisy_ct_keeps_unit_variance():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 1, 24, 24, 24, generator=generator)
    timesteps = torch.tensor([0, 80, 160, 249])
    noisy = add_noise(clean, noise, timesteps, alphas_cumprod(cosine_betas(250)))
    torch.testing.assert_close(noisy.var(dim=(1, 2, 3, 4)), torch.ones(4), rtol=0.05, atol=0)


@pytest.mark.parametrize("timesteps", [250, 1000])
def test_timesteps_are_evenly_spaced_in_log_snr(timesteps):
    signal = alphas_cumprod(cosine_betas(timesteps))
    log_snr = torch.log(signal / (1 - signal)) / 2
    visited = log_snr[spaced_timesteps(signal, 12)]
    assert visited[0] == pytest.approx(-5.1, abs=0.2)
    assert visited[-1] == log_snr[0]
    even = torch.linspace(visited[0], visited[-1], 12, dtype=torch.float64)
    # Timesteps are whole numbers; at the ends of 250, neighbours are 0.7 apart.
    torch.testing.assert_close(visited, even, rtol=0, atol=0.35)


@pytest.mark.parametrize("timesteps", [1, 2, 3, 20])
def test_few_timesteps_are_spaced_too(timesteps):
    signal = alphas_cumprod(cosine_betas(timesteps))
    for steps in range(1, timesteps + 1):
        visited = spaced_timesteps(signal, steps)
        assert visited == sorted(set(visited), reverse=True)
        assert len(visited) == min(steps, len(spaced_timesteps(signal, timesteps)))
