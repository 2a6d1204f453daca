"""Adversarial training: losses computed by hand, which step changes which network, and training on one case."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_trainings import train, train_interrupted
from safetensors.torch import load_file
from torch import nn

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.generators import pix2pix3d, plugin
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.adversarial import (
    AdversarialOptimization,
    Discriminators,
    TranslationObjective,
    Translator,
    adversarial_loss,
    feature_distance,
)
from lungddpm.models.data import TrainingData
from lungddpm.models.denoiser import turned
from lungddpm.models.objectives import WeightedError
from lungddpm.models.optimization import start_optimization
from lungddpm.models.recipe import Batch
from lungddpm.models.training import initial_network
from lungddpm.operations.estimate import made_up as noise_with_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def make_config(seed=1, **changes):
    """A GAN that trains on the tiny cohort within a second; keywords change `training`."""
    training = {
        "steps": 6, "learning_rate": 1e-3, "precision": "fp32", "accumulation": 2, "batch_size": 1, "ema_decay": 0.5,
        "ema_every": 2, "ema_start": 3, "save_every": 2, "sample_every": 4, "gradient_clip": 1.0,
    }  # fmt: skip
    settings = {
        "classes": ["lung", "nodule", "vessel"],
        "network": {"widths": [4, 4, 4, 4, 4, 4], "norm_groups": 2},
        "discriminator": {"channels": 4, "layers": 1},
        "training": {**training, **changes},
    }
    values = {"seed": seed, "grid": {"size": [16, 16, 16]}, "generators": {"pix2pix3d": settings}}
    return parse_config(values).for_training("pix2pix3d")


@pytest.fixture(scope="module")
def uninterrupted(tiny_cohort, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    train(make_config(), tiny_cohort, output, "cpu")
    return output


def volume(*values):
    return torch.tensor(values).view(1, 1, 1, 1, len(values))


def scales(*of_each):
    """Features of discriminators: a list of layers for each, of which the last are the logits."""
    return [[volume(*layer) for layer in layers] for layers in of_each]


def test_least_squares_of_given_logits():
    judged = scales([[9.0], [0.5, -1.0]], [[9.0], [3.0]])
    # ((.5 - 1)^2 + (-1 - 1)^2) / 2 = 2.125 and (3 - 1)^2 = 4; (.25 + 1) / 2 = .625 and 9.
    assert adversarial_loss(judged, taken_for_real=True).item() == pytest.approx((2.125 + 4) / 2)
    assert adversarial_loss(judged, taken_for_real=False).item() == pytest.approx((0.625 + 9) / 2)


def test_feature_distance_by_hand():
    drawn = scales([[1.0, 3.0], [2.0], [70.0]], [[0.0], [4.0], [80.0]])
    real = scales([[0.0, 0.0], [2.5], [0.0]], [[1.0], [1.0], [0.0]])
    # Layers of the first scale: 2 and .5; of the second: 1 and 3. Four times their means, 1.25 and 2; the logits apart.
    assert feature_distance(drawn, real).item() == pytest.approx((4 * 1.25 + 4 * 2) / 2)
    assert feature_distance(drawn, drawn).item() == 0


class Halves(nn.Module):
    """An opponent whose feature is half of the CT, and whose logit is its double; of one scale."""

    def forward(self, volumes):
        return [[volumes[:, :1] / 2, volumes[:, :1] * 2]]


def test_the_losses_of_a_batch_by_hand():
    condition = torch.cat([volume(1.0, -1.0), volume(-1.0, 1.0)], dim=1)  # lung, nodule
    batch = Batch(volume(0.5, -0.5), condition, volume(0.1, 0.3), torch.zeros(1))
    objective = TranslationObjective(WeightedError("l1", 3.0, 1), reconstruction=100.0, feature_matching=10.0)
    loss, drawn = objective.loss(lambda inputs: inputs[:, :1] * 2, batch, Halves())
    assert drawn.flatten().tolist() == pytest.approx([0.2, 0.6])  # the noise doubled
    adversarial = ((0.4 - 1) ** 2 + (1.2 - 1) ** 2) / 2
    matching = 4 * (0.15 + 0.55) / 2
    reconstruction = (0.3 + 3 * 1.1) / (1 + 3)
    assert loss.item() == pytest.approx(adversarial + 10 * matching + 100 * reconstruction)
    judged = objective.opponent_loss(Halves(), batch, drawn)
    real, made = (0 + 4) / 2, (0.4**2 + 1.2**2) / 2  # logits 1 and -1 against 1; .4 and 1.2 against 0
    assert judged.item() == pytest.approx((real + made) / 2)


class Knows(nn.Module):
    """An opponent whose logit is the hint, its last channel."""

    def forward(self, volumes):
        return [[volumes[:, :1], volumes[:, -1:]]]


def test_the_hint_is_an_input_of_both_networks_and_not_of_the_error():
    condition = torch.cat([volume(1.0, -1.0), volume(-1.0, 1.0)], dim=1)
    batch = Batch(volume(0.0, 0.0), condition, volume(0.1, 0.3), torch.zeros(1), volume(0.5, 0.25))
    objective = TranslationObjective(WeightedError("l1", 3.0, 1), reconstruction=1.0, feature_matching=0.0)
    loss, drawn = objective.loss(lambda inputs: inputs[:, -1:] * 2, batch, Knows())
    assert drawn.flatten().tolist() == pytest.approx([1.0, 0.5])  # the hint doubled
    fooled, error = (0.5**2 + 0.75**2) / 2, (1.0 + 3 * 0.5) / (1 + 3)
    assert loss.item() == pytest.approx(fooled + error)
    shown = (0.5**2 + 0.75**2) / 2, (0.5**2 + 0.25**2) / 2  # against 1 beside the real CT, 0 beside the drawn one
    assert objective.opponent_loss(Knows(), batch, drawn).item() == pytest.approx(sum(shown) / 2)


def test_the_second_discriminator_sees_the_mean_of_neighbours():
    judge = Discriminators(2, 4, 1)
    volumes = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    fine, coarse = judge(volumes)
    pooled = torch.stack(  # of 3^3 voxels around every second one, fewer at the faces
        [
            volumes[0, :, max(z - 1, 0) : z + 2, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean(dim=(1, 2, 3))
            for z in range(0, 16, 2)
            for y in range(0, 16, 2)
            for x in range(0, 16, 2)
        ],
        dim=1,
    ).view(1, 2, 8, 8, 8)
    torch.testing.assert_close(coarse[0], judge.of_scale[1](pooled)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fine[-1], judge.of_scale[0](volumes)[-1])
    assert fine[-1].shape[2:] == (6, 6, 6)
    assert coarse[-1].shape[2:] == (2, 2, 2)


def test_a_discriminator_judges_a_volume_whatever_is_beside_it():
    judge = Discriminators(2, 4, 1)
    volumes = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    for together, alone in zip(judge(volumes), judge(volumes[1:]), strict=True):
        torch.testing.assert_close(together[-1][1:], alone[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("edge", [16, 32, 48, 64, 80, 96, 128])
def test_as_many_layers_fit_as_monai_can_compute(edge):
    def fits(layers):
        with torch.device("meta"):
            judge, volumes = Discriminators(1, 1, layers), torch.zeros(1, 1, edge, edge, edge)
        try:
            return all(min(scale[-1].shape) > 0 for scale in judge(volumes))
        except (RuntimeError, ValueError):
            return False

    most = pix2pix3d.most_layers(edge)
    assert fits(most)
    assert not fits(most + 1)


def test_the_network_sees_the_chest_as_the_config_says():
    networks = [Translator(3, [4] * 6, 2, orientation).eval() for orientation in ("ras", "published")]
    networks[1].load_state_dict(networks[0].state_dict())
    inputs = torch.randn(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(networks[1](inputs), turned(networks[0](turned(inputs))))
        assert networks[0](1e3 * inputs).abs().max() <= 1


def made_up(data=None, **changes):
    """The optimization of a GAN on given cases, or on one of noise with every label."""
    config = make_config(**changes)
    recipe, _ = plugin("pix2pix3d").training(config)
    accelerator = make_accelerator("cpu", "fp32", config.settings.training.accumulation)
    return start_optimization(
        config, recipe, initial_network(config, recipe), data or noise_with_labels(config), accelerator
    )


def weights_of(network):
    return copy.deepcopy(network.state_dict())


def differ(before, after):
    return [not torch.equal(before[name], after[name]) for name in before]


def test_each_step_of_one_leaves_the_other_unchanged(monkeypatch):
    optimization = made_up(accumulation=1)
    assert isinstance(optimization, AdversarialOptimization)
    networks = {"network": optimization.model, "opponent": optimization.opponent.network}
    learners = {"network": optimization.learner, "opponent": optimization.opponent}
    moved = {}
    for name, learner in learners.items():
        learn = learner.learn

        def watched(loss, name=name, learn=learn):
            before = {each: weights_of(network) for each, network in networks.items()}
            learn(loss)
            moved[name] = {each: differ(before[each], weights_of(network)) for each, network in networks.items()}
            other = networks["opponent" if name == "network" else "network"]
            moved[name]["gradients"] = [parameter.grad is not None for parameter in other.parameters()]

        monkeypatch.setattr(learner, "learn", watched)
    optimization.take_step(0)
    assert list(moved) == ["network", "opponent"]
    for name, other in (("network", "opponent"), ("opponent", "network")):
        assert np.mean(moved[name][name]) > 0.7  # a bias before a norm may stay
        assert not any(moved[name][other])
        assert not any(moved[name]["gradients"])
    assert all(parameter.requires_grad for parameter in optimization.opponent.network.parameters())


def test_both_follow_the_published_adam_and_the_schedule():
    optimization = made_up(warmup_steps=4)
    optimization.take_step(1)
    for learner in optimization.learners:
        (group,) = learner.optimizer.param_groups
        assert group["betas"] == (0.5, 0.999)
        assert group["lr"] == pytest.approx(1e-3 * 2 / 4)


@pytest.mark.parametrize("spoiled", ["weights", "moments"])
def test_a_state_with_a_damaged_opponent_is_not_finite(spoiled):
    optimization = made_up(accumulation=1)
    optimization.take_step(0)
    assert optimization.is_finite()
    opponent = optimization.opponent
    if spoiled == "weights":
        next(opponent.network.parameters()).data[0] = float("nan")
    else:
        next(iter(opponent.optimizer.state.values()))["exp_avg"].fill_(float("inf"))
    assert not optimization.is_finite()


def test_a_gan_whose_loss_is_nan_stops_with_the_last_good_state(tiny_cohort, tmp_path, monkeypatch):
    take_step = AdversarialOptimization.take_step

    def poisoned(self, step, *rest):
        if step == 3:  # by way of the opponent, whose verdict reaches the network's loss
            next(self.opponent.network.parameters()).data.fill_(float("nan"))
        return take_step(self, step, *rest)

    monkeypatch.setattr(AdversarialOptimization, "take_step", poisoned)
    with pytest.raises(InputError, match=r"no longer finite at step 4.*step-00000002\.pt"):
        train(make_config(), tiny_cohort, tmp_path, "cpu")
    state = torch.load(tmp_path / "state/step-00000002.pt", weights_only=True)
    networks = [*state["model"].values(), *state["average"].values(), *state["opponent"].values()]
    assert all(tensor.isfinite().all() for tensor in networks)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_interrupted_training_ends_bit_identical(uninterrupted, tiny_cohort, tmp_path, monkeypatch):
    train_interrupted(monkeypatch, AdversarialOptimization, 3, make_config(), tiny_cohort, tmp_path, "cpu")
    ends = [load_file(output / "model.safetensors") for output in (uninterrupted, tmp_path)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    states = [
        torch.load(output / "state/step-00000006.pt", weights_only=True)["opponent"]
        for output in (uninterrupted, tmp_path)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    histories = [pd.read_csv(output / "history.csv")["loss"] for output in (uninterrupted, tmp_path)]
    assert histories[0].equals(histories[1])


def test_one_case_is_memorised():
    layout = np.zeros((1, 16, 16, 16), np.uint8)
    layout[:, 2:14, 2:14, 2:14] = Label.LUNG
    layout[:, 6:10, 6:10, 6:10] = Label.NODULE
    hu = (np.choose(layout, [0, -800, 0, 0]) + 10 * np.arange(16).reshape(1, 16, 1, 1)).astype(np.int16)
    optimization = made_up(TrainingData(["only"], hu, layout), steps=60, accumulation=1, learning_rate=5e-3)
    for step in range(60):
        optimization.take_step(step)
    batch = optimization.samples.batch(0)
    noise = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        drawn = optimization.average(torch.cat([noise, batch.condition], dim=1))
    error = (drawn - batch.clean).abs().mean()
    of_mean_image = (batch.clean - batch.clean.mean()).abs().mean()
    assert error < 0.1 * of_mean_image
