"""The configuration: what is accepted, what is refused, and what is generated from it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lungddpm.config.loading import load_config, parse_config, read_values
from lungddpm.config.reference import json_schema, markdown_reference
from lungddpm.core.errors import ConfigError

OVERLAYS = ["lidc", "paper"]


def leaves(values, prefix=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_default_config_is_the_phantom_demo(repository):
    config = load_config(repository / "config.yaml")
    assert config.source.kind == "phantom"
    assert config.arms.names() == ["real", "real+lung_ddpm@0.5", "real+lung_ddpm@1.0", "real+real"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_are_valid_with_a_path(repository, tmp_path, overlay):
    mine = tmp_path / "mine.yaml"
    mine.write_text("source: {path: /data/LIDC-IDRI}\n")
    config = load_config(repository / "config.yaml", repository / f"config/{overlay}.yaml", mine)
    assert (config.grid.size, config.diffusion.denoiser.base_channels) == ((128, 128, 128), 64)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_of_the_demo_leaks_into_an_overlay(repository, overlay):
    # The demo's values lie underneath every overlay: a small learning rate forgotten here would be silent.
    demo = set(leaves(yaml.safe_load((repository / "config.yaml").read_text())))
    values = yaml.safe_load((repository / f"config/{overlay}.yaml").read_text())
    of_the_source = {path for path in demo if path[:2] == ("source", "phantom")}
    covered = set(leaves(values)) | {("seed",)} | of_the_source
    replaced = {path for path in demo if path[:2] == ("segmentation", "network")}
    assert values["segmentation"]["network"] is None
    assert demo - covered - replaced == set()


def test_strings_from_the_command_line_are_coerced():
    config = parse_config({"grid": {"size": ["32", "32", "32"]}, "segmentation": {"steps": "500"}})
    assert (config.grid.size, config.segmentation.steps) == ((32, 32, 32), 500)


def test_lists_are_replaced_and_mappings_merged(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("arms: {doses: [0.5, 1.0]}\ngrid: {size: [32, 32, 32], extent: lungs}\n")
    second.write_text("arms: {doses: [2.0]}\ngrid: {margin_mm: 5}\n")
    config = load_config(first, second)
    assert config.arms.doses == [2.0]
    assert (config.grid.extent, config.grid.margin_mm, config.grid.size) == ("lungs", 5.0, (32, 32, 32))


def test_json_text_stands_for_a_file(tmp_path):
    first = tmp_path / "a.yaml"
    first.write_text("arms: {doses: [0.5, 1.0]}\nseed: 3\n")
    config = load_config(first, '{"arms": {"doses": [2.0]}, "source": {"kind": "lidc", "path": "/data//scans"}}')
    assert (config.seed, config.arms.doses, str(config.source.path)) == (3, [2.0], "/data/scans")
    for text, problem in (('{"grdi": 1}', "grdi: there is no such key"), ('{"seed": 1', "cannot be read as YAML")):
        with pytest.raises(ConfigError, match=f"^--config: {problem}"):
            load_config(text)


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_what_is_not_a_default_is_the_whole_config(repository, overlay):
    # Jobs get no more than that.
    files = [repository / "config.yaml", *([repository / f"config/{overlay}.yaml"] if overlay else [])]
    config = load_config(*files, '{"source": {"path": "/data/scans"}}')
    assert load_config(config.model_dump_json(exclude_defaults=True)) == config


FAULTS = {
    "typo": ({"grdi": {}}, "grdi: there is no such key"),
    "nested typo": ({"diffusion": {"training": {"stpes": 3}}}, "diffusion.training.stpes"),
    "wrong type": ({"segmentation": {"steps": "many"}}, "segmentation.steps"),
    "unknown source": ({"source": {"kind": "pacs"}}, "there is no 'pacs'"),
    "source without path": ({"source": {"kind": "lidc"}}, "source.path"),
    "unknown generator": ({"arms": {"generators": ["gan"]}}, "there is no 'gan'"),
    "patch not divisible": ({"segmentation": {"network": {"patch": [30, 32, 32]}}}, "not divisible by 8"),
    "patch larger than grid": ({"segmentation": {"network": {"patch": [128, 128, 128]}}}, "larger than grid.size"),
    "grid not divisible": ({"grid": {"size": [40, 40, 40]}}, "not divisible by 16"),
    "dose without generator": ({"arms": {"generators": [], "doses": [1.0]}}, "arms.generators is empty"),
    "generator without dose": ({"arms": {"doses": []}}, "arms.doses is empty"),
    "no test patients": ({"roles": {"test": 0}}, "roles.test"),
    "empty list of patients": ({"roles": {"test": []}}, "roles.test names no patient"),
    "patient in two roles": ({"roles": {"test": ["a"], "discovery": ["a", "b"]}}, "patient a is in roles.discovery"),
    "patient that YAML takes for a number": (yaml.safe_load("roles: {test: [0010, b]}"), "read as 8, not as text"),
    "patient that YAML takes for a date": (
        yaml.safe_load("roles: {test: [2020-01-02]}"),
        'Quote patient ids, as in ["0',
    ),
    "patient that YAML takes for yes": (
        yaml.safe_load("roles: {reference: [no]}"),
        "roles.reference: a patient is read",
    ),
    "shares above all": ({"roles": {"discovery": 0.8, "test": 0.5, "reference": 0.2}}, "more than all patients"),
    "groups do not divide": ({"diffusion": {"denoiser": {"base_channels": 20}}}, "does not divide"),
    "crop with attention": ({"diffusion": {"training": {"crop": 32}}}, "attention: false"),
    "more steps than timesteps": ({"diffusion": {"timesteps": 20}}, "steps 250 exceeds timesteps 20"),
    "resampling as published": ({"diffusion": {"sampling": {"aas": "published", "resampling": 2}}}, "aas: corrected"),
    "fold that does not exist": ({"segmentation": {"folds": [5]}}, "names fold 5"),
    "steps between saves": ({"segmentation": {"steps": 100, "save_every": 30}}, "not a multiple"),
    "plus without crop": ({"lung_ddpm_plus": {"training": {"crop": None}}}, "lung_ddpm_plus.training.crop"),
    "plus with a small crop": ({"lung_ddpm_plus": {"training": {"crop": 4}}}, "lung_ddpm_plus.training.crop"),
    "plus larger than grid": (
        {"lung_ddpm_plus": {"training": {"crop": 128}}},
        "lung_ddpm_plus.training.crop 128 is larger than grid.size",
    ),
    "plus by an ancestral sampler": (
        {"lung_ddpm_plus": {"sampling": {"sampler": "ddpm"}}},
        "lung_ddpm_plus.sampling.sampler",
    ),
    "plus with resampling": ({"lung_ddpm_plus": {"sampling": {"resampling": 2}}}, "lung_ddpm_plus.sampling.resampling"),
    "plus with lungs": ({"lung_ddpm_plus": {"classes": ["lung", "nodule"]}}, "lung_ddpm_plus.classes"),
    "plus without classes": ({"lung_ddpm_plus": {"classes": []}}, "lung_ddpm_plus: classes is"),
    "two runs of one name": ({"lung_ddpm_plus": {"run": "main"}}, "are both 'main'"),
    "published levels of another sampler": (
        {"diffusion": {"sampling": {"levels": "published"}}},
        "levels: published needs",
    ),
    "nodules alone without crop": ({"diffusion": {"classes": ["nodule"]}}, "diffusion: classes [nodule] needs"),
    "window upside down": ({"grid": {"window_hu": [600, -1024]}}, "lower bound comes first"),
}


def test_paths_of_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(
        {
            "source": {"kind": "lidc", "path": "~/scans"},
            "arms": {"external": {"maisi": "~/maisi"}},
            "image_quality": {"weights": "~/resnet_50.pth"},
        }
    )
    assert config.source.path == tmp_path / "scans"
    assert config.arms.external == {"maisi": tmp_path / "maisi"}
    assert config.image_quality.weights == tmp_path / "resnet_50.pth"
    assert parse_config({"source": {"path": "~nobody-of-this-name/x"}}).source.path == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize(("values", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(values, message):
    with pytest.raises(ConfigError, match="my.yaml") as caught:
        parse_config(values, "my.yaml")
    assert message in str(caught.value)


def test_a_denoiser_has_a_config_of_its_own():
    config = parse_config({"diffusion": {"timesteps": 1000}, "lung_ddpm_plus": {"sampling": {"steps": "20"}}})
    assert config.for_denoiser("diffusion").diffusion.timesteps == 1000
    plus = config.for_denoiser("lung_ddpm_plus")
    assert (plus.diffusion.run, plus.diffusion.timesteps, plus.diffusion.sampling.steps) == ("plus", 250, 20)
    assert (plus.diffusion.sampling.sampler, plus.diffusion.sampling.order) == ("dpmsolver++", 3)
    assert plus.seed == config.seed
    # As the weights' metadata keep it.
    assert parse_config(plus.model_dump(mode="json")).diffusion.model_dump() == plus.diffusion.model_dump()


@pytest.mark.parametrize(
    ("values", "section"),
    [
        ({}, "lung_ddpm_plus"),
        ({}, "grid"),
        ({"diffusion": {"classes": ["nodule"], "training": {"crop": 64}}}, "diffusion"),
    ],
)
def test_sections_that_describe_no_denoiser_are_refused(values, section):
    with pytest.raises(ConfigError, match="lung_ddpm_plus"):
        parse_config(values).for_denoiser(section)


def test_shared_patients_need_the_switch():
    shared = {"discovery": ["a"], "reference": ["a"], "test": ["a"]}
    with pytest.raises(ConfigError, match="patient a"):
        parse_config({"roles": shared})
    assert parse_config({"roles": {**shared, "allow_shared_patients": True}}).roles.test == ["a"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\ngrid: {size: [32, 32, 32]}\nseed: 2\n", "has the key seed twice, in line 1 and in line 3"),
        ("grid:\n  margin_mm: 1\n  margin_mm: 1\n", "has the key grid.margin_mm twice, in line 2 and in line 3"),
        ("seed: 1\n'seed': 1\n", "has the key seed twice, in line 1 and in line 2"),
        ("arms: {external: {1: a, '1': b}}\n", "has the key arms.external.1 twice, in line 1 and in line 1"),
        (
            "arms:\n  external:\n    yes: a\n    true: b\n",
            "has the key arms.external.true twice, in line 3 and in line 4",
        ),
        ("a: &a {seed: 1}\nb: {<<: *a, <<: *a}\n", "has the key b.<< twice, in line 2 and in line 2"),
        ("roles: {test: [{a: 1, a: 2}]}\n", "has the key roles.test.a twice"),
        ('{\n\t"seed": 1,\n\t"seed": 2\n}\n', "has the key seed twice, in line 2 and in line 3"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, text, says):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        # An override of what a merge key brings, and the same key in different places, are not repeated keys.
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a, y: 4}\n", {"b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 4}}),
        ("b: {<<: [&x {x: 1}, {x: 2, y: 3}], z: 4}\n", {"b": {"x": 1, "y": 3, "z": 4}}),
        ("b: &b [{x: 1}, {x: 2}]\nc: *b\n", {"b": [{"x": 1}, {"x": 2}], "c": [{"x": 1}, {"x": 2}]}),
        ('{\t"b": 1e-3,\n\t"c": "a\\tb"}', {"b": 0.001, "c": "a\tb"}),
        ("", {}),
    ],
)
def test_yaml_and_json_are_read_as_they_are_meant(tmp_path, text, values):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    read = read_values(path)
    assert {key: read[key] for key in values} == values


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\x00"])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path)


def test_missing_config(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_arm_names_and_doses():
    arms = {"generators": ["lung_ddpm"], "doses": [0.5, 2.0], "controls": ["real", "reference"]}
    config = parse_config({"arms": arms})
    assert config.arms.names() == [
        "real", "real+lung_ddpm@0.5", "real+lung_ddpm@2.0", "real+real", "real+reference@1.0",
    ]  # fmt: skip
    assert config.arms.largest_doses() == {"lung_ddpm": 2.0, "reference": 1.0}


def test_synthetic_only_takes_as_many_cases_as_are_real():
    arms = {
        "generators": ["lung_ddpm"],
        "doses": [0.5],
        "controls": ["real"],
        "synthetic_only": ["lung_ddpm", "med_ddpm"],
    }
    config = parse_config({"arms": arms})
    assert config.arms.names() == [
        "real", "real+lung_ddpm@0.5", "synthetic:lung_ddpm", "synthetic:med_ddpm", "real+real",
    ]  # fmt: skip
    assert config.arms.doses_of() == {"lung_ddpm": [0.5, 1.0], "med_ddpm": [1.0]}
    assert config.arms.largest_doses() == {"lung_ddpm": 1.0, "med_ddpm": 1.0}


def test_schema_and_reference_are_in_step_with_the_models(repository):
    stored = json.loads((repository / "workflow/schemas/config.schema.json").read_text())
    assert stored == json_schema(), "run 'make docs'"
    assert (repository / "config/README.md").read_text() == markdown_reference() + "\n", "run 'make docs'"


def test_every_key_has_a_meaning():
    rows = [line for line in markdown_reference().splitlines() if line.startswith("| `")]
    optional = {"lung_ddpm_plus": {}, "segmentation": {"network": {}}}
    # These two sections have a row of their own; the empty mapping `arms.external` is a leaf, too.
    assert len(rows) == len(list(leaves(parse_config(optional).model_dump()))) + 3
    assert all(len(row.split("|")[4].strip()) > 10 for row in rows)


def test_light_verbs_import_nothing_heavy(repository):
    code = (
        "import sys; sys.argv = ['lungddpm', 'config', 'validate']\n"
        "from lungddpm.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'monai', 'nnunetv2', 'scipy', 'SimpleITK', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)
