"""What every generator declares, and what happens to one that does not."""

import subprocess
import sys

import pytest

from lungddpm import generators
from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError

EXPECTED = {
    "copy_paste": (None, "added", "added"),
    "latent_diffusion": ("latent_diffusion", "reference", "jittered"),
    "lefusion": ("lefusion", "reference", "added"),
    "lung_ddpm": ("lung_ddpm", "reference", "jittered"),
    "lung_ddpm_plus": ("lung_ddpm_plus", "reference", "added"),
    "med_ddpm": ("lung_ddpm", "reference", "jittered"),
    "paste_constant": (None, "reference", "jittered"),
    "pix2pix3d": ("pix2pix3d", "reference", "jittered"),
    "reconstruct": ("latent_diffusion", "reference", "reference"),
    "rectified_flow": ("rectified_flow", "reference", "jittered"),
    "reference": (None, "reference", "reference"),
}
"""Generator -> whose weights it draws with, and where layouts are from when a reference is used first, and again."""


def test_declarations_are_read_without_heavy_imports():
    code = (
        "import sys\n"
        "from lungddpm import generators\n"
        "declared = {name: generators.plugin(name) for name in generators.names()}\n"
        f"expected = {EXPECTED}\n"
        "assert expected.items() <= {name: (p.weights_of, *p.layouts) for name, p in declared.items()}.items()\n"
        "assert all(p.title and p.citation and p.load for p in declared.values())\n"
        "assert all((p.weights_of is None) == (p.drawing is None) for p in declared.values())\n"
        "assert all((p.weights_of == p.name) == (p.recipe is not None) for p in declared.values())\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'pandas', 'nibabel'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_generator_has_a_section_of_the_config_and_weights_of_one_that_trains():
    config = parse_config({})
    assert sorted(type(config.generators).model_fields) == generators.names()
    for name in generators.names():
        if owner := generators.plugin(name).weights_of:
            assert config.for_training(owner).name == owner


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Write a module beside the generators."""
    monkeypatch.setattr(generators, "__path__", [*generators.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lungddpm.generators.mine", raising=False)

    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return path

    yield write
    sys.modules.pop("lungddpm.generators.mine", None)


def test_a_module_without_a_declaration_is_refused_with_its_file(plug_in):
    path = plug_in("TITLE = 'Mine'\n\ndef load(config, weights, device): ...\n")
    with pytest.raises(ConfigError) as refused:
        generators.plugin("mine")
    assert f"{path}: does not declare CITATION, Settings, LAYOUTS" in str(refused.value)


def test_commands_refuse_it_in_one_message(tmp_path):
    (tmp_path / "half.py").write_text("TITLE = 'Half'\n")
    code = (
        "import sys\n"
        "from lungddpm import generators\n"
        "from lungddpm.cli import main\n"
        f"generators.__path__.append({str(tmp_path)!r})\n"
        "sys.argv = ['lungddpm', 'config', 'show', '--configfile', 'config.yaml']\n"
        "main()"
    )
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "half.py: does not declare CITATION" in run.stderr
    assert "Traceback" not in run.stderr


def test_one_that_draws_with_weights_declares_the_cost_of_a_sample(plug_in):
    plug_in(
        "from lungddpm.config.sections import GeneratorSettings as Settings\n"
        "TITLE = CITATION = 'Mine'\nWEIGHTS_OF = 'lung_ddpm'\nLAYOUTS = 'reference', 'reference'\n\n"
        "def load(config, weights, device): ...\n"
    )
    with pytest.raises(ConfigError, match=r"mine.py: does not declare drawing\."):
        generators.plugin("mine")


def test_one_that_is_trained_declares_its_training(plug_in):
    plug_in(
        "from lungddpm.config.sections import TrainedSettings as Settings\n"
        "TITLE = CITATION = 'Mine'\nLAYOUTS = 'reference', 'reference'\n\n"
        "def load(config, weights, device): ...\n"
    )
    with pytest.raises(ConfigError, match=r"mine.py: does not declare recipe, preview, drawing\."):
        generators.plugin("mine")


def test_an_unknown_generator_is_named():
    with pytest.raises(ConfigError, match=r"there is no generator 'gan'.*copy_paste, .*reference"):
        generators.plugin("gan")
