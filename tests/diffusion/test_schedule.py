import pytest
import torch

from lungddpm.diffusion.schedule import add_noise, alphas_cumprod, cosine_betas


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
