"""The configuration: what is accepted, what is refused, and what is generated from it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from lungddpm.config.loading import load_config, parse_config, read_values
from lungddpm.config.models import Config
from lungddpm.config.reference import json_schema, markdown_reference
from lungddpm.core.cohorts import Cohort
from lungddpm.core.errors import ConfigError

OVERLAYS = ["lidc", "paper"]
PATH = '{"source": {"path": "/data/scans"}}'


def leaves(values, prefix=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_default_config_is_the_phantom_demo(repository):
    config = load_config(repository / "config.yaml")
    assert config.source.kind == "phantom"
    assert config.arms.names() == ["real", "real+lung_ddpm@3.0", "real+real", "real+reference@3.0"]


def test_nothing_differs_in_the_null_benchmark(repository):
    config = load_config(repository / "config.yaml", repository / "benchmarks/null.yaml")
    assert config.arms.names() == ["real", "real+real"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_are_valid_with_a_path(repository, tmp_path, overlay):
    mine = tmp_path / "mine.yaml"
    mine.write_text("source: {path: /data/LIDC-IDRI}\n")
    config = load_config(repository / "config.yaml", repository / f"config/{overlay}.yaml", mine)
    assert (config.grid.size, config.generators.lung_ddpm.denoiser.base_channels) == ((128, 128, 128), 64)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_of_the_demo_leaks_into_an_overlay(repository, overlay):
    # Snakemake merges it over config.yaml: a small learning rate that stayed would be silent.
    path = repository / f"config/{overlay}.yaml"
    over_the_demo = load_config(repository / "config.yaml", path, PATH)
    own = yaml.safe_load(path.read_text())
    assert own.pop("preset") == "published"
    assert over_the_demo == Config.model_validate({**own, "source": {**own["source"], **json.loads(PATH)["source"]}})


@pytest.mark.parametrize("file", ["config/lidc.yaml", "config/paper.yaml", "lungddpm/config/presets/demo.yaml"])
def test_a_file_holds_only_what_differs_from_the_defaults(repository, file):
    values = yaml.safe_load((repository / file).read_text())
    values.pop("preset", None)
    complete = parse_config({**values, "source": {"path": "/data", **values["source"]}}).model_dump(mode="json")
    defaults = Config().model_dump(mode="json")
    for path in leaves(values):
        # A section that is off by default has defaults of its own.
        given, default = complete, defaults
        for key in path:
            given, default = given[key], default.get(key) if isinstance(default, dict) else None
        assert given != default, ".".join(path)


def test_the_demo_is_its_preset_and_given_keys_count_over_it(repository):
    assert yaml.safe_load((repository / "config.yaml").read_text()) == {"preset": "demo"}
    demo = yaml.safe_load((repository / "lungddpm/config/presets/demo.yaml").read_text())
    assert parse_config({"preset": "demo"}) == parse_config(demo).model_copy(update={"preset": "demo"})
    config = parse_config({"preset": "demo", "grid": {"extent": "full"}, "segmentation": {"network": None}})
    assert (config.grid.size, config.grid.extent) == ((48, 48, 48), "full")
    assert config.segmentation.network is None
    assert parse_config({}) == parse_config({"preset": "published"}) == Config()
    with pytest.raises(ConfigError, match="preset: Input should be 'demo' or 'published', got 'dmo'"):
        parse_config({"preset": "dmo"})


def test_a_key_set_back_to_its_default_counts_in_the_jobs():
    config = parse_config({"preset": "demo", "grid": {"size": [64, 64, 64]}})
    assert load_config(config.differences()).grid.size == (64, 64, 64)


@pytest.mark.parametrize("file", ["config/lidc.yaml", "config/paper.yaml", "config/rivals.yaml"])
def test_an_autoencoder_that_learns_from_crops_encodes_whole_volumes_alike(repository, file):
    """Norms of the volume and zeros beyond it would differ, see `test_a_crop_is_encoded_as_within_its_volume`."""
    config = load_config(repository / file, needs_source=False)
    for trained in config.trained_generators():
        autoencoder = getattr(trained.settings, "autoencoder", None)
        if autoencoder is not None and autoencoder.crop is not None:
            assert (autoencoder.norm, autoencoder.padding) == ("voxel", "replicate"), trained.name


def test_the_rivals_at_the_published_scale_do_not_inherit_the_rate_of_voxels(repository):
    config = load_config(repository / "config/paper.yaml", needs_source=False)
    rates = {trained.name: trained.settings.training.learning_rate for trained in config.trained_generators()}
    assert rates == {"lung_ddpm": 1e-5, "pix2pix3d": 2e-4, "make_a_volume": 1e-4, "gem_3d": 1e-4}


@pytest.mark.parametrize(
    "file", ["config.yaml", "config/lidc.yaml", "config/paper.yaml", "config/rivals.yaml", "benchmarks/null.yaml"]
)
def test_editors_find_the_schema_that_a_config_keeps(repository, file):
    path = repository / file
    schema = re.match(r"# yaml-language-server: \$schema=(.*)\n", path.read_text())[1]
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads((path.parent / schema).read_text()))


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


def test_json_text_replaces_a_file(tmp_path):
    first = tmp_path / "a.yaml"
    first.write_text("arms: {doses: [0.5, 1.0]}\nseed: 3\n")
    config = load_config(first, '{"arms": {"doses": [2.0]}, "source": {"kind": "lidc", "path": "/data//scans"}}')
    assert (config.seed, config.arms.doses, str(config.source.path)) == (3, [2.0], "/data/scans")
    for text, problem in (('{"grdi": 1}', "grdi: there is no such key"), ('{"seed": 1', "cannot be read as YAML")):
        with pytest.raises(ConfigError, match=f"^--configfile: {problem}"):
            load_config(text)


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_what_is_not_a_default_is_the_whole_config(repository, overlay):
    # Jobs get nothing else.
    files = [repository / "config.yaml", *([repository / f"config/{overlay}.yaml"] if overlay else [])]
    config = load_config(*files, PATH)
    assert load_config(config.differences()) == config.model_copy(update={"preset": "published"})
    assert load_config(config.model_dump_json()) == config


ERRORS = {
    "typo": ({"grdi": {}}, "grdi: there is no such key"),
    "nested typo": (
        {"generators": {"lung_ddpm": {"training": {"stpes": 3}}}},
        "generators.lung_ddpm.training.stpes: there is no",
    ),
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
    "empty list of patients": ({"roles": {"test": []}}, "roles.test is empty"),
    "patient in two roles": ({"roles": {"test": ["a"], "discovery": ["a", "b"]}}, "patient a is in roles.discovery"),
    "patient that YAML takes for a number": (yaml.safe_load("roles: {test: [0010, b]}"), "read as 8, not as text"),
    "patient that YAML takes for a date": (
        yaml.safe_load("roles: {test: [2020-01-02]}"),
        'Quote patient ids, as in ["0',
    ),
    "patient that YAML takes for yes": (
        yaml.safe_load("roles: {reference: [no]}"),
        "roles.reference: a patient id is read",
    ),
    "shares above all": ({"roles": {"discovery": 0.8, "test": 0.5, "reference": 0.2}}, "more than all patients"),
    "groups do not divide": ({"generators": {"lung_ddpm": {"denoiser": {"base_channels": 20}}}}, "does not divide"),
    "crop with attention": ({"generators": {"lung_ddpm": {"training": {"crop": 32}}}}, "attention: false"),
    "more steps than timesteps": ({"generators": {"lung_ddpm": {"timesteps": 20}}}, "steps 250 exceeds timesteps 20"),
    "resampling as published": (
        {"generators": {"lung_ddpm": {"sampling": {"aas": "published", "resampling": 2}}}},
        "aas: corrected",
    ),
    "no real case": ({"arms": {"real_cases": [0]}}, "arms.real_cases.0: Input should be greater than or equal to 1"),
    "no number of real cases": ({"arms": {"real_cases": []}}, "arms.real_cases"),
    "a number of real cases twice": ({"arms": {"real_cases": [4, "4"]}}, "arms.real_cases lists a value twice"),
    "real cases in words": ({"arms": {"real_cases": ["four"]}}, "arms.real_cases"),
    "trainings without draws": (
        {"synthesis": {"draw_per_replicate": False, "training_per_replicate": True}},
        "synthesis.training_per_replicate needs synthesis.draw_per_replicate",
    ),
    "fold that does not exist": ({"segmentation": {"folds": [5]}}, "names fold 5"),
    "steps between saves": ({"segmentation": {"steps": 100, "save_every": 30}}, "not a multiple"),
    "plus without crop": (
        {"generators": {"lung_ddpm_plus": {"training": {"crop": None}}}},
        "generators.lung_ddpm_plus.training.crop",
    ),
    "plus with a small crop": (
        {"generators": {"lung_ddpm_plus": {"training": {"crop": 4}}}},
        "generators.lung_ddpm_plus.training.crop",
    ),
    "plus larger than grid": (
        {"generators": {"lung_ddpm_plus": {"training": {"crop": 128}}}, "arms": {"controls": ["lung_ddpm_plus"]}},
        "generators.lung_ddpm_plus: training.crop 128 is larger than grid.size",
    ),
    "plus by an ancestral sampler": (
        {"generators": {"lung_ddpm_plus": {"sampling": {"sampler": "ddpm"}}}},
        "generators.lung_ddpm_plus.sampling.sampler",
    ),
    "plus with resampling": (
        {"generators": {"lung_ddpm_plus": {"sampling": {"resampling": 2}}}},
        "lung_ddpm_plus.sampling.resampling",
    ),
    "plus with lungs": ({"generators": {"lung_ddpm_plus": {"classes": ["lung", "nodule"]}}}, "lung_ddpm_plus.classes"),
    "plus without classes": ({"generators": {"lung_ddpm_plus": {"classes": []}}}, "lung_ddpm_plus.classes"),
    "published levels of another sampler": (
        {"generators": {"lung_ddpm": {"sampling": {"levels": "published"}}}},
        "levels: published needs",
    ),
    "nodules alone": ({"generators": {"lung_ddpm": {"classes": ["nodule"]}}}, "classes is [lung, nodule] or"),
    "settings of an unknown generator": (
        {"generators": {"GAN": {"steps": 3}}},
        "generators: there is no generator 'GAN'; available: copy_paste,",
    ),
    "latents in sub-bands": (
        {"generators": {"latent_diffusion": {"denoiser": {"wavelet": True}}}},
        "denoiser.wavelet is for voxels",
    ),
    "lefusion without a reference": (
        {"generators": {"lefusion": {"sampling": {"background": "generated"}}}},
        "generators.lefusion.sampling.background",
    ),
    "lefusion with a hint": ({"generators": {"lefusion": {"hint": "slice"}}}, "generators.lefusion.hint"),
    "settings of a generator that has none": ({"generators": {"reference": {"run": "a"}}}, "generators.reference.run"),
    "weights of a generator that does not fit": (
        {"arms": {"generators": ["med_ddpm"]}, "grid": {"size": [40, 40, 40]}},
        "generators.lung_ddpm: grid.size [40, 40, 40] is not divisible by 16",
    ),
    "former section": ({"diffusion": {"run": "a"}}, "diffusion: is now generators.lung_ddpm"),
    "former section of plus": ({"lung_ddpm_plus": None}, "lung_ddpm_plus: is now generators.lung_ddpm_plus"),
    "former key of GPUs": ({"workflow": {"denoiser_gpus": 2}}, "workflow.denoiser_gpus: is now workflow.training_gpus"),
    "former key of nodes": (
        {"workflow": {"denoiser_nodes": 2}},
        "workflow.denoiser_nodes: is now workflow.training_nodes",
    ),
    "external test without kind": ({"external_tests": {"a": {"path": "b"}}}, "external_tests.a.kind: Field required"),
    "external test without path": ({"external_tests": {"a": {"kind": "lidc"}}}, "external_tests.a: path is needed"),
    "external test of computed patients": (
        {"external_tests": {"a": {"kind": "phantom"}}},
        "external_tests.a: kind 'phantom' is simulated",
    ),
    "external test of the name of source": (
        {"external_tests": {"Internal": {"kind": "lidc", "path": "b"}}},
        "'internal' is reserved",
    ),
    "external tests of one name": (
        {"external_tests": {"a": {"kind": "lidc", "path": "b"}, "A": {"kind": "lidc", "path": "c"}}},
        "names must differ by more than capitals",
    ),
    "external test with a slash": ({"external_tests": {"a/b": {"kind": "lidc", "path": "b"}}}, "external_tests"),
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


@pytest.mark.parametrize(("values", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_named(values, message):
    with pytest.raises(ConfigError, match="my.yaml") as caught:
        parse_config(values, "my.yaml")
    assert message in str(caught.value)


def test_a_generator_gets_its_own_part_of_the_config():
    settings = {"lung_ddpm": {"timesteps": 1000}, "lung_ddpm_plus": {"sampling": {"steps": "20"}}}
    config = parse_config({"generators": settings, "seed": 7})
    plus = config.for_training("lung_ddpm_plus")
    assert (plus.run, plus.settings.timesteps, plus.settings.sampling.steps) == ("plus", 250, 20)
    assert (plus.settings.sampling.sampler, plus.settings.sampling.order) == ("dpmsolver++", 3)
    assert (plus.seed, plus.grid, plus.weights_from) == (7, config.grid, None)
    med = config.for_generator("med_ddpm")
    assert (med.weights_from, med.run) == (config.for_training("lung_ddpm"), "main")
    assert med.weights_from.settings.timesteps == 1000


def test_grids_are_checked_for_generators_in_use_only():
    # The crops of lung_ddpm_plus have 64 voxels per edge.
    config = parse_config({"grid": {"size": [48, 48, 48]}})
    with pytest.raises(ConfigError, match=r"generators.lung_ddpm_plus: training.crop 64 is larger than grid.size"):
        config.for_generator("lung_ddpm_plus")


def test_a_generator_that_is_not_trained_is_refused():
    with pytest.raises(
        ConfigError, match=r"'med_ddpm' is not trained. Trained generators: .*lung_ddpm, lung_ddpm_plus"
    ):
        parse_config({}).for_training("med_ddpm")


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"lung_ddpm": {"sampling": {"steps": 9}}}, {"lung_ddpm"}),
        ({"lung_ddpm": {"sampling": {"batch_size": 9}}}, set()),
        ({"lung_ddpm": {"training": {"steps": 9}}}, set()),  # the weights say it
        ({"lung_ddpm": {"training": {"precision": "fp32"}}}, {"lung_ddpm", "med_ddpm"}),
        ({"latent_diffusion": {"training": {"precision": "fp32"}}}, {"latent_diffusion", "reconstruct"}),
        ({"lung_ddpm": {"orientation": "ras"}}, {"lung_ddpm", "med_ddpm"}),
        ({"med_ddpm": {"sampling": {"sampler": "ddim"}}}, {"med_ddpm"}),
        ({"lung_ddpm_plus": {"training": {"crop": 32}}}, {"lung_ddpm_plus"}),
        ({"lefusion": {"training": {"crop": 32}}}, {"lefusion"}),
        ({"lung_ddpm": {"denoiser": {"wavelet": True}}}, {"lung_ddpm", "med_ddpm"}),
    ],
)
def test_what_decides_samples(changes, changed):
    usual, other = parse_config({}), parse_config({"generators": changes})
    names = type(usual.generators).model_fields
    decisive = [{name: each.for_generator(name).decides_samples() for name in names} for each in (usual, other)]
    assert {name for name in names if decisive[0][name] != decisive[1][name]} == changed


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
def test_a_repeated_key_is_refused_with_both_lines(tmp_path, text, says):
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
def test_files_that_are_not_a_config(tmp_path, text):
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


@pytest.mark.parametrize(
    ("given", "named"),
    [("real+lung_ddpm@1", ["real+lung_ddpm@1.0"]), (["synthetic:lung_ddpm"], ["synthetic:lung_ddpm"]), ([], [])],
)
def test_primary_arms_are_named_in_any_spelling_of_their_dose(given, named):
    config = parse_config({"arms": {"synthetic_only": ["lung_ddpm"]}, "verdict": {"primary": given}})
    assert config.primary_arms() == named


@pytest.mark.parametrize("name", ["real+lung_ddpm@0.5", "real+real", "real", "lung_ddpm"])
def test_a_primary_arm_has_to_be_one_with_synthetic_ct(name):
    with pytest.raises(ConfigError, match=rf"verdict.primary: '{re.escape(name)}' is not an arm with synthetic CT"):
        parse_config({"verdict": {"primary": [name]}})


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


def test_schema_and_reference_match_the_models(repository):
    stored = json.loads((repository / "workflow/schemas/config.schema.json").read_text())
    assert stored == json_schema(), "run 'make docs'"
    assert (repository / "config/README.md").read_text() == markdown_reference() + "\n", "run 'make docs'"


def test_every_key_has_a_meaning():
    rows = [line for line in markdown_reference().splitlines() if line.startswith("| `")]
    optional = {"segmentation": {"network": {}}}
    # This section has a row of its own; the empty mappings `arms.external`, `external_tests` and `source.images.labels`
    # are leaves, too.
    assert len(rows) == len(list(leaves(parse_config(optional).model_dump()))) + 4
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


def test_every_number_of_real_cases_has_all_arms():
    arms = {"doses": [1.0], "controls": ["real"], "synthetic_only": ["lung_ddpm"], "real_cases": ["4", "all", 8]}
    config = parse_config({"arms": arms})
    recipes = ["real{}", "real{}+lung_ddpm@1.0", "synthetic{}:lung_ddpm", "real{}+real"]
    assert config.arms.names() == [recipe.format(number) for number in ("4", "", "8") for recipe in recipes]
    assert config.arms.planning().name == "real"
    fewer = parse_config({"arms": arms | {"real_cases": [8, 4]}})
    assert fewer.arms.planning().name == "real8"


def test_cohorts_and_trainings_follow_numbers_and_draws():
    values = {
        "arms": {"real_cases": [4, "all"], "generators": ["lung_ddpm", "maisi"], "external": {"maisi": "maisi"}},
        "segmentation": {"folds": [0, 1], "seeds": [3]},
    }

    def names(synthesis, learn_from="same"):
        config = parse_config(
            values | {"arms": values["arms"] | {"generators_learn_from": learn_from}, "synthesis": synthesis}
        )
        cohorts = {name: [each.name for each in config.cohorts(name, 4)] for name in ("lung_ddpm", "maisi")}
        folders = [config.for_training("lung_ddpm", each).model_folder for each in config.trainings("lung_ddpm")]
        return (
            cohorts["lung_ddpm"],
            cohorts["maisi"],
            [folder.removeprefix("models/lung_ddpm/main/") for folder in folders],
        )

    draws = ["real4-fold0_seed3", "real4-fold1_seed3"]
    assert names({"draw_per_replicate": False}) == (["real4"], ["real4"], ["all", "real4"])
    assert names({}) == (draws, ["real4"], ["all", "real4"])
    assert names({}, "all") == (draws, ["real4"], ["all"])
    of_each = ["all-fold0_seed3", "all-fold1_seed3", "real4-fold0_seed3", "real4-fold1_seed3"]
    assert names({"training_per_replicate": True}) == (draws, ["real4"], of_each)


def test_only_a_training_for_one_replicate_has_seeds_of_its_own():
    shared, each = (
        parse_config({"synthesis": {"training_per_replicate": per_replicate}}) for per_replicate in (False, True)
    )
    cohorts = [Cohort(None, "fold0_seed0"), Cohort(4, "fold0_seed0"), Cohort(None, "fold1_seed0")]
    assert {shared.for_generator("lung_ddpm", cohort).run for cohort in cohorts} == {"main"}
    runs = [each.for_generator("med_ddpm", cohort).of_weights.run for cohort in cohorts]
    assert runs == ["main-fold0_seed0", "main-fold0_seed0", "main-fold1_seed0"]


@pytest.mark.parametrize(("augmentation", "copies"), [("nnunet", 8), ("mirror", 8), ("left_right", 2), ("none", 1)])
def test_predictions_are_mirrored_along_the_axes_of_training_unless_turned_off(augmentation, copies):
    """2 to the power of the mirrored axes, as nnU-Net's predictor does."""
    for mirrored, expected in ((True, copies), (False, 1)):
        settings = {"augmentation": augmentation, "test_time_mirroring": mirrored}
        assert parse_config({"segmentation": settings}).segmentation.predictions_per_case == expected
