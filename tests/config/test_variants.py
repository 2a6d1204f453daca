"""Variants: a second entry for one module, over the section of its kind."""

import json

import pytest

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError

VALUES = {
    "preset": "demo",
    "generators": {
        "latent_diffusion": {"hint": "slice", "autoencoder": {"steps": 900}},
        "free": {"kind": "latent_diffusion", "hint": "none", "sampling": {"background": "generated"}},
        "rectified_flow": {"training": {"crop": 16}, "denoiser": {"attention": False}},
        "flow_4": {"kind": "rectified_flow", "weights_of": "rectified_flow", "sampling": {"steps": 4}},
    },
    "arms": {"generators": ["latent_diffusion", "free", "flow_4"], "controls": ["real"]},
}


def over(**generators):
    return VALUES | {"generators": VALUES["generators"] | generators}


def test_a_variant_has_the_values_of_its_kind_where_it_gives_none():
    free = parse_config(VALUES).generators.free
    # 900 of the config, 24 channels of the preset, and its own.
    assert (free.autoencoder.steps, free.denoiser.base_channels) == (900, 24)
    assert (free.hint, free.sampling.background, free.sampling.steps) == ("none", "generated", 10)


def test_jobs_get_the_same_config_also_where_a_variant_goes_back_to_a_default():
    config = parse_config(VALUES)
    again = parse_config(json.loads(config.differences()))
    assert again.generators == config.generators
    assert again.generators.free.hint == "none"


def test_a_variant_is_trained_on_its_own_or_draws_with_the_weights_of_another():
    config = parse_config(VALUES)
    assert [each.name for each in config.trained_generators()] == ["latent_diffusion", "free", "rectified_flow"]
    assert config.for_training("free").model_folder == "models/free/main/all"
    flow = config.for_generator("flow_4")
    assert (flow.kind, flow.of_weights.name, flow.settings.sampling.steps) == ("rectified_flow", "rectified_flow", 4)
    # What the weights' metadata say, so that they are not refused.
    assert flow.decides_fit() == config.for_training("rectified_flow").decides_fit()
    with pytest.raises(ConfigError, match="'flow_4' is not trained"):
        config.for_training("flow_4")


def test_samples_of_variants_differ_in_their_record_and_their_seeds():
    config = parse_config(VALUES)
    ours, theirs = (config.for_generator(name).decides_samples() for name in ("free", "latent_diffusion"))
    assert ours["kind"] == "latent_diffusion"
    assert ours != theirs
    assert config.for_generator("flow_4").decides_samples()["weights_from"]["generator"] == "rectified_flow"


def test_a_variant_draws_in_its_own_precision():
    usual = VALUES["generators"]["flow_4"]
    half = parse_config(over(flow_4={**usual, "training": {"precision": "fp16"}}))
    assert (
        half.for_generator("flow_4").decides_samples() != parse_config(VALUES).for_generator("flow_4").decides_samples()
    )


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ({"gan": {"kind": "stylegan"}}, "there is no generator 'stylegan'; available: copy_paste"),
        ({"gan": {}}, "there is no generator 'gan'; available: copy_paste"),
        ({"flow_4": {"kind": "rectified_flow", "stpes": 3}}, r"generators\.flow_4\.stpes: there is no such key"),
        ({"real": {"kind": "lung_ddpm"}}, "'real' is not a valid name for a generator"),
        ({"a/b": {"kind": "lung_ddpm"}}, "'a/b' is not a valid name for a generator"),
        (
            {"flow_4": {"kind": "rectified_flow", "weights_of": "lung_ddpm"}},
            "weights_of: 'lung_ddpm' is neither rectified_flow nor a variant of it",
        ),
        (
            {"flow_4": {"kind": "rectified_flow", "weights_of": "flow_8"}},
            "weights_of: 'flow_8' is neither rectified_flow nor a variant of it",
        ),
        (
            {
                "flow_4": {"kind": "rectified_flow", "weights_of": "flow_8"},
                "flow_8": {"kind": "rectified_flow", "weights_of": "rectified_flow"},
            },
            "weights_of: 'flow_8' is not trained, it has the weights of rectified_flow",
        ),
        (
            {"flow_4": {"kind": "rectified_flow", "weights_of": "rectified_flow", "hint": "slice"}},
            "weights_of: 'rectified_flow' is trained with another hint",
        ),
    ],
)
def test_what_is_not_a_variant_is_refused(generators, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(over(**generators))


def test_a_name_of_a_variant_is_not_free_for_a_folder():
    arms = VALUES["arms"] | {"external": {"free": "/data/x"}}
    with pytest.raises(ConfigError, match="arms.external: the name free is taken"):
        parse_config(VALUES | {"arms": arms})


def test_what_is_judged_without_an_arm_is_drawn_but_not_trained_on():
    config = parse_config({"arms": {"quality_only": ["reference"], "doses": [0.5, 2.0], "controls": []}})
    assert config.arms.largest_doses() == {"lung_ddpm": 2.0, "reference": 2.0}
    assert config.arms.names() == ["real", "real+lung_ddpm@0.5", "real+lung_ddpm@2.0"]
    with pytest.raises(ConfigError, match="arms.quality_only: lung_ddpm already has an arm"):
        parse_config({"arms": {"quality_only": ["lung_ddpm"]}})


def test_filtered_arms_are_beside_those_without_the_filter():
    config = parse_config({"arms": {"filtered": ["lung_ddpm"], "doses": [0.1, 1.0], "filter": {"draws": 3}}})
    names = ["real+lung_ddpm.filtered@0.1", "real+lung_ddpm.filtered@1.0"]
    assert [arm.name for arm in config.arms.all() if arm.filtered] == names
    assert config.arms.drawn_doses_of()["lung_ddpm"] == [0.1, 0.3, 1.0, 3.0]
    assert config.arms.doses_of()["lung_ddpm"] == [0.1, 1.0]
    assert parse_config({"arms": {"filtered": ["lung_ddpm"]}, "verdict": {"primary": names[1]}}).primary_arms() == [
        "real+lung_ddpm.filtered@1.0"
    ]
    with pytest.raises(ConfigError, match=r"arms\.filtered: med_ddpm is not in arms\.generators"):
        parse_config({"arms": {"filtered": ["med_ddpm"]}})
