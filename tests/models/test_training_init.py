"""Training that starts from given weights."""

import pytest
import torch
from made_up_trainings import train

from lungddpm.core.errors import InputError
from lungddpm.generators import lung_ddpm
from lungddpm.models import monitoring, training
from lungddpm.models.checkpoint import Metadata, read_metadata, save_network
from lungddpm.models.published_checkpoint import export_published, load_denoiser


@pytest.fixture
def weights(training_config, tmp_path, monkeypatch):
    """A denoiser trained here and as a published checkpoint."""
    monkeypatch.setattr(monitoring, "_GRID_CASES", 1)
    monkeypatch.setattr(lung_ddpm, "PREVIEW_STEPS", 2)
    config = training_config(seed=5)
    denoiser = training.initial_network(config, lung_ddpm.recipe(config))
    torch.nn.init.normal_(denoiser.out[2].weight, std=0.1)
    ours, published = tmp_path / "given.safetensors", tmp_path / "given.pt"
    save_network(ours, denoiser, Metadata.of(config, 1, "config", "data", ["patient05"]))
    export_published(ours, published)
    return ours, published


def test_starts_from_ours_and_from_published_weights_alike(weights, training_config, tiny_cohort, tmp_path):
    config = training_config(steps=1, learning_rate=1e-12)
    for path in weights:
        train(config, tiny_cohort, tmp_path / path.suffix, "cpu", path)
        trained = load_denoiser(tmp_path / path.suffix / "model.safetensors", config).state_dict()
        for name, tensor in load_denoiser(path, config).state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-10)


def test_other_initial_weights_make_another_training(weights, training_config, tiny_cohort, tmp_path):
    config = training_config(steps=1)
    fingerprints = set()
    for path in (None, *weights):
        train(config, tiny_cohort, tmp_path / "run", "cpu", path)
        fingerprints.add(read_metadata(tmp_path / "run/model.safetensors").config_fingerprint)
    assert len(fingerprints) == 3


def test_patients_of_initial_weights_count_as_trained_on(weights, training_config, tiny_cohort, tmp_path, caplog):
    """Those of a first training are in the network that starts from it, whether or not the table still has them."""
    config, own = training_config(steps=1), {"patient00", "patient01", "patient02"}
    ours, published = weights
    train(config, tiny_cohort, tmp_path / "second", "cpu", ours)
    train(config, tiny_cohort, tmp_path / "third", "cpu", tmp_path / "second/model.safetensors")
    for name in ("second", "third"):
        assert read_metadata(tmp_path / name / "model.safetensors").trained_on == sorted(own | {"patient05"})
    assert "does not record" not in caplog.text
    train(config, tiny_cohort, tmp_path / "from published", "cpu", published)
    assert read_metadata(tmp_path / "from published/model.safetensors").trained_on == sorted(own)
    assert "given.pt does not record the patients" in caplog.text


def test_initial_weights_that_do_not_fit(weights, training_config, tiny_cohort, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        train(training_config(), tiny_cohort, tmp_path / "run", "cpu", tmp_path / "nothing.pt")
    content = torch.load(weights[1], weights_only=True)
    del content["ema"]["denoise_fn.out.2.bias"]
    torch.save(content, weights[1])
    with pytest.raises(InputError, match="key denoise_fn.out.2.bias is missing"):
        train(training_config(), tiny_cohort, tmp_path / "run", "cpu", weights[1])
