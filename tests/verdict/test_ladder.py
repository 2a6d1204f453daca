"""The ladder: which cell a generator is in, by its settings, and the content of the table and the report."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError
from lungddpm.generators import GIVEN
from lungddpm.report.sections import generators_of, show_ladder
from lungddpm.verdict.ladder import LADDER_COLUMNS, cell_of, ladder_table, published_generators, stands_for
from lungddpm.verdict.published import published_figures

GENERATED = {"sampling": {"background": "generated"}}
RIVALS = {
    "pix2pix3d": GENERATED,
    "make_a_volume": {"kind": "latent_diffusion", **GENERATED},
    "gem_3d": {"kind": "latent_diffusion", "hint": "slice", **GENERATED},
    "pasted_latents": {"kind": "latent_diffusion", "hint": "slice"},
    "shown_latents": {"kind": "latent_diffusion", "hint": "volume", **GENERATED},
    "free_flow": {"kind": "rectified_flow", "weights_of": "rectified_flow", **GENERATED},
    "med_with_slice": {"kind": "med_ddpm", "weights_of": "lung_with_slice"},
    "lung_with_slice": {"kind": "lung_ddpm", "hint": "slice"},
    "shown_voxels": {"kind": "lung_ddpm", "hint": "volume", **GENERATED},
    "pasted_and_shown_voxels": {"kind": "lung_ddpm", "hint": "volume"},
    "pasted_and_shown_slice": {"kind": "lung_ddpm", "hint": "slice"},
    "free_voxels": {"kind": "lung_ddpm", "weights_of": "lung_ddpm", **GENERATED},
    "wavelet": {"kind": "lung_ddpm", "denoiser": {"wavelet": True}},
    "free_wavelet": {"kind": "med_ddpm", "weights_of": "wavelet"},
    "gan_with_slice": {"kind": "pix2pix3d", "hint": "slice", **GENERATED},
    "gan_with_volume": {"kind": "pix2pix3d", "hint": "volume", **GENERATED},
}
# Written down from the published table: what each method is given of the target.
CELLS = {
    "lung_ddpm": ("pixel diffusion", "layout+volume", "Lung-DDPM"),
    "med_ddpm": ("pixel diffusion", "layout", "Med-DDPM"),
    "pix2pix3d": ("one-pass GAN", "layout", "Pix2pix3D"),
    "make_a_volume": ("latent diffusion", "layout", "Make-A-Volume"),
    "gem_3d": ("latent diffusion", "layout+slice", "GEM-3D"),
    "pasted_latents": ("latent diffusion", "layout+volume", ""),
    "shown_latents": ("latent diffusion", "layout+volume", ""),
    "rectified_flow": ("rectified flow", "layout+volume", ""),
    "free_flow": ("rectified flow", "layout", ""),
    "med_with_slice": ("pixel diffusion", "layout+slice", ""),
    # Lung-DDPM pastes the volume and shows its network none of it, and its network is of voxels, as is Med-DDPM's.
    "shown_voxels": ("pixel diffusion", "layout+volume", ""),
    "pasted_and_shown_voxels": ("pixel diffusion", "layout+volume", ""),
    "pasted_and_shown_slice": ("pixel diffusion", "layout+volume", ""),
    "free_voxels": ("pixel diffusion", "layout", "Med-DDPM"),
    "wavelet": ("pixel diffusion", "layout+volume", ""),
    "free_wavelet": ("pixel diffusion", "layout", ""),
    "gan_with_slice": ("one-pass GAN", "layout+slice", ""),
    "gan_with_volume": ("one-pass GAN", "layout+volume", ""),
    "lefusion": ("nodule inpainting", "layout+volume", ""),
    "lung_ddpm_plus": ("pixel diffusion in crops", "layout+volume", "Lung-DDPM+"),
}


def config_of(names, **arms):
    return parse_config({"generators": RIVALS, "arms": {"generators": list(names), "controls": ["real"], **arms}})


@pytest.mark.parametrize("name", CELLS)
def test_the_cell_follows_from_what_a_generator_is_given(name):
    family, given, method = CELLS[name]
    config = config_of([name])
    assert cell_of(config, name) == (family, given)
    assert stands_for(config, name) == method


@pytest.mark.parametrize("name", ["reference", "paste_constant", "copy_paste", "reconstruct", "maisi"])
def test_controls_floors_and_folders_are_in_no_cell(name):
    config = config_of(["lung_ddpm"], controls=[name], external={"maisi": "x"})
    assert cell_of(config, name) is None
    assert stands_for(config, name) == ""


def test_conditions_are_those_of_the_published_table():
    figures = published_figures().query("table == 'image_quality'")
    published = dict(zip(figures["method"], figures["condition"], strict=True))
    ladder = ladder_table(config_of(["lung_ddpm"]), verdict_of({}))
    assert set(published.values()) == set(GIVEN)
    assert published.items() <= dict(zip(ladder["stands_for"], ladder["given"], strict=True)).items()


def test_the_first_of_several_stands_for_a_published_method():
    config = config_of(["make_a_volume", "med_ddpm", "lung_ddpm", "pasted_latents"])
    assert published_generators(config) == {
        "Make-A-Volume": "make_a_volume", "Med-DDPM": "med_ddpm", "Lung-DDPM": "lung_ddpm",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lefusion": {"hint": "slice"}}, "generators.lefusion.hint"),
        ({"lefusion": GENERATED}, "generators.lefusion.sampling.background"),
        ({"med_ddpm": {"sampling": {"background": "reference"}}}, "generators.med_ddpm.sampling.background"),
        ({"mine": {"kind": "reference", "hint": "slice"}}, "generators.mine.hint"),
    ],
)
def test_a_cell_that_a_generator_cannot_serve_is_refused(settings, where):
    with pytest.raises(ConfigError) as refused:
        parse_config({"generators": settings})
    assert f"{where}: " in str(refused.value)


def verdict_of(differences):
    rows = [
        {"arm": arm, "metric": "dice", "difference": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        for arm, value in differences.items()
    ]
    columns = ["arm", "metric", "difference", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns).assign(verdict="no difference shown")


def test_rows_hold_what_was_measured_of_the_largest_dose():
    config = config_of(["gem_3d", "lung_ddpm"], doses=[0.5, 1.0], real_cases=[3, "all"])
    verdict = verdict_of(
        {"real+gem_3d@0.5": 0.01, "real+gem_3d@1.0": 0.02, "real3+gem_3d@1.0": 0.03, "real+lung_ddpm@1.0": 0.04}
    )
    quality = pd.DataFrame(
        [
            {"generator": "gem_3d", "image": image, "region": region, "metric": "fid", "mean": mean}
            for image, region, mean in (
                ("synthetic", "lungs", 3.0), ("synthetic", "whole volume", 5.0), ("shifted references", "lungs", 7.0),
            )
        ]
    )  # fmt: skip
    fidelity = pd.DataFrame([{"generator": "gem_3d", "dice_mean": 0.6, "difference": -0.2}])
    ladder = ladder_table(config, verdict, quality, fidelity)
    assert list(ladder.columns) == LADDER_COLUMNS
    row = ladder.set_index("generator").loc["gem_3d"]
    assert row[["arm", "difference", "fid", "fid_lungs"]].tolist() == ["real+gem_3d@1.0", 0.02, 5.0, 3.0]
    assert row[["fidelity_dice", "fidelity_difference"]].tolist() == [0.6, -0.2]
    assert np.isnan(ladder.set_index("generator").loc["lung_ddpm", "fid"])
    empty = ladder[ladder["generator"] == ""].set_index("stands_for")["note"]
    assert set(empty.index) == {"HA-GAN", "Pix2pix3D", "Med-DDPM", "Make-A-Volume", "Lung-DDPM+"}
    assert "without a layout" in empty["HA-GAN"]
    assert set(empty.drop("HA-GAN")) == {"not in this run"}


def test_the_page_crosses_families_with_what_is_given():
    config = config_of(["make_a_volume", "gem_3d", "lung_ddpm", "wavelet"])
    quality = pd.DataFrame(
        [
            {"generator": name, "image": "synthetic", "region": region, "metric": "fid", "mean": mean}
            for name, region, mean in (
                ("gem_3d", "lungs", 0.4117), ("gem_3d", "whole volume", 10.42), ("lung_ddpm", "lungs", 0.0917),
            )
        ]
    )  # fmt: skip
    fidelity = pd.DataFrame(
        [("gem_3d", 0.0761, -0.3203), ("make_a_volume", 0.0541, np.nan)],
        columns=["generator", "dice_mean", "difference"],
    )
    ladder = ladder_table(config, verdict_of({"real+gem_3d@1.0": 0.02, "real+wavelet@1.0": -0.01}), quality, fidelity)
    crossed, listed, notes = show_ladder(ladder, "95 %")
    cells = {row[0]: dict(zip(crossed.heads, row, strict=True)) for row in crossed.rows}
    assert crossed.heads == ["family", "nothing", "layout", "layout + slice", "layout + volume"]
    # Image quality, label fidelity and the arm's difference, as far as measured.
    assert cells["latent diffusion"]["layout"].split("\n") == ["make_a_volume = Make-A-Volume", "fidelity 0.054"]
    assert cells["latent diffusion"]["layout + slice"].split("\n") == [
        "gem_3d = GEM-3D",
        "FID 10.4 whole volume, 0.412 lungs",
        "fidelity 0.076 (−0.320)",
        "difference +0.020",
    ]
    assert cells["latent diffusion"]["layout + volume"] == ""
    # Generators that share a cell are apart from each other.
    assert [entry.split("\n") for entry in cells["pixel diffusion"]["layout + volume"].split("\n\n")] == [
        ["lung_ddpm = Lung-DDPM", "FID 0.0917 lungs"],
        ["wavelet", "difference −0.010"],
    ]
    assert cells["pixel diffusion"]["layout"] == "(Med-DDPM: not in this run)"
    assert cells["unconditional GAN"]["nothing"] == "(HA-GAN: not in this run)"
    assert [row[listed.heads.index("generator")] for row in listed.rows] == [
        "make_a_volume", "gem_3d", "lung_ddpm", "wavelet",
    ]  # fmt: skip
    assert len(notes) == 1


def test_the_report_names_and_cites_a_network_of_wavelets():
    described = {name: texts for name, *texts in generators_of(config_of(["wavelet", "lung_ddpm"]))}
    assert described["wavelet"][0].startswith("Variant of lung_ddpm. ")
    assert described["wavelet"][0].endswith("its network works on wavelets")
    assert "arXiv 2402.19043" in described["wavelet"][1]
    assert "avelet" not in " ".join(described["lung_ddpm"])
    # Of weights that are another generator's.
    ((_, title, _),) = (row for row in generators_of(config_of(["free_wavelet"])) if row[0] == "free_wavelet")
    assert "wavelets" in title


def test_controls_without_weights_are_described():
    config = config_of(["lung_ddpm"], controls=["real", "reference", "copy_paste"])
    described = {name: title for name, title, _ in generators_of(config)}
    assert described.keys() == {"lung_ddpm", "reference", "copy_paste"}
    assert not any("wavelets" in title for title in described.values())
