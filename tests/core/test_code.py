"""Fingerprints of code: what of a made-up package counts, and what the real stages reach."""

import textwrap

import pytest

from lungddpm import generators, sources
from lungddpm.core.code import LEFT_OUT, PACKAGE, STAGES, Code, code_of_steps, stage_fingerprint

MADE_UP = {
    "__init__.py": "'''The package.'''\nVERSION = '1'\n",
    "core/__init__.py": "",
    "core/numbers.py": """
        '''Numbers.'''
        import math as m
        LIMIT = 5
        '''What may be.'''
        OTHER = 6

        def area(radius: float) -> float:
            '''The area.'''
            return m.pi * min(radius, LIMIT) ** 2

        def unused():
            return OTHER
    """,
    "core/speaking.py": "LOG = print\ndef waited(): return 1\n",
    "shapes/__init__.py": "'''Shapes.'''\n",
    "shapes/circle.py": """
        from __future__ import annotations

        from typing import TYPE_CHECKING

        from made_up.core import numbers
        from made_up.core.speaking import LOG

        if TYPE_CHECKING:
            from made_up.shapes.types import Shape

        def draw(shape: Shape, size: int = 2) -> list:
            # By area.
            LOG("drawing", size)
            found: list[float] = [numbers.area(shape.radius)]
            return found

        def sample():
            from made_up.shapes.noise import noise

            return noise()
    """,
    "shapes/noise.py": "def noise():\n    return 4\n",
    "shapes/types.py": "class Shape:\n    radius = 1\n",
}
DRAW = "made_up.shapes.circle:draw"


@pytest.fixture
def changed(tmp_path):
    """A function that writes the made-up package with some text replaced and gives its fingerprint."""

    def write(path: str = "", old: str = "", new: str = "", entries=(DRAW,), files=MADE_UP) -> str:
        root = tmp_path / "made_up"
        for name, text in files.items():
            text = textwrap.dedent(text)
            if name == path:
                assert text.count(old) == 1, f"{old!r} is in {path} once"
                text = text.replace(old, new)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return Code(root, ["made_up.core.speaking"]).fingerprint(entries)

    return write


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        pytest.param("shapes/circle.py", "# By area.", "# Another comment.\n", id="comment"),
        pytest.param("core/numbers.py", "'''The area.'''", "'''Its area,\n\n    as a number.'''", id="docstring"),
        pytest.param("core/numbers.py", "'''Numbers.'''\n", "", id="docstring of a module"),
        pytest.param("core/numbers.py", "'''What may be.'''", "'''What must be.'''", id="docstring of a constant"),
        pytest.param("core/numbers.py", "(radius: float) -> float", "(radius)", id="annotations of a function"),
        pytest.param("shapes/circle.py", "found: list[float] =", "found =", id="annotation of a variable"),
        pytest.param("shapes/types.py", "radius = 1", "radius = 2", id="imported for types only"),
        pytest.param("shapes/circle.py", "shapes.types import Shape", "core import numbers", id="type-only import"),
        pytest.param("core/numbers.py", "return OTHER", "return -OTHER", id="function that is not used"),
        pytest.param("core/numbers.py", "OTHER = 6", "OTHER = 7", id="constant that is not used"),
        pytest.param("shapes/noise.py", "return 4", "return 5", id="used by another function of the module"),
        pytest.param("core/speaking.py", "return 1", "return 2", id="module that is left out"),
        pytest.param("shapes/circle.py", '"drawing", size', '"still drawing", size', id="what is said"),
        pytest.param("__init__.py", "'1'", "'2'", id="constant of the package that is not used"),
    ],
)
def test_what_changes_no_result_does_not_count(changed, path, old, new):
    assert changed(path, old, new) == changed()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        pytest.param("core/numbers.py", "LIMIT = 5", "LIMIT = 5.0", id="constant of another module"),
        pytest.param("core/numbers.py", "** 2", "** 3", id="function of another module"),
        pytest.param("core/numbers.py", "import math as m", "import cmath as m", id="library behind a name"),
        pytest.param("shapes/circle.py", "size: int = 2", "size: int = 3", id="default value"),
        pytest.param("shapes/circle.py", "return found", "return found[:1]", id="the entry itself"),
        pytest.param("shapes/circle.py", "core import numbers", "shapes import noise as numbers", id="import"),
        pytest.param("__init__.py", "VERSION", "import os\nos.umask(0)\nVERSION", id="what the package does on import"),
        pytest.param("core/numbers.py", "OTHER = 6", "LIMIT += 6", id="constant that is changed"),
        pytest.param("core/numbers.py", "OTHER = 6", "for i in range(3): LIMIT = i", id="constant made in a loop"),
    ],
)
def test_what_may_change_a_result_counts(changed, path, old, new):
    assert changed(path, old, new) != changed()


def test_an_import_inside_a_function_is_followed(changed):
    entry = ["made_up.shapes.circle:sample"]
    before = changed(entries=entry)
    assert changed("shapes/noise.py", "return 4", "return 5", entries=entry) != before
    assert changed("core/numbers.py", "LIMIT = 5", "LIMIT = 9", entries=entry) == before


def test_of_a_module_without_a_definition_everything_counts(changed):
    entry = ["made_up.shapes.circle"]
    before = changed(entries=entry)
    assert changed("shapes/noise.py", "return 4", "return 5", entries=entry) != before
    assert changed("core/numbers.py", "LIMIT = 5", "LIMIT = 9", entries=entry) != before


def test_order_does_not_count(changed):
    both = [DRAW, "made_up.shapes.circle:sample"]
    assert changed(entries=both) == changed(entries=both[::-1])
    numbers = "def unused():\n    return OTHER\ndef area(radius):\n    return m.pi * min(radius, LIMIT) ** 2\n"
    numbers += "OTHER = 6\nLIMIT = 5\nimport math as m\n"
    assert changed(files=MADE_UP | {"core/numbers.py": numbers}) == changed()


def code_of(tmp_path, **files) -> Code:
    root = tmp_path / "made_up"
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py" if name != "init" else root / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return Code(root)


def test_modules_that_import_each_other_are_both_reached(tmp_path):
    code = code_of(
        tmp_path,
        a="from made_up import b\ndef f(n):\n    return b.g(n - 1) if n else 0\n",
        b="from made_up import a\ndef g(n):\n    return a.f(n - 1) if n else 1\n",
        init="",
    )
    assert code.reached(["made_up.a:f"]) == {("made_up.a", "f"), ("made_up.b", "g")}


def test_relative_imports_and_names_passed_on_are_followed(tmp_path):
    code = code_of(
        tmp_path,
        init="from .room.a import f\n",
        room__a="from .b import X\ndef f():\n    return X\n",
        room__b="X = 1\n",
    )
    assert code.reached(["made_up:f"]) == {("made_up.room.a", "f"), ("made_up.room.b", "X")}


def test_a_module_used_as_a_value_counts_as_a_whole(tmp_path):
    code = code_of(
        tmp_path, init="", a="from made_up import b\ndef f(): return getattr(b, 'X')\n", b="X = 1\ndef g(): return 1\n"
    )
    assert code.reached(["made_up.a:f"]) == {("made_up.a", "f"), ("made_up.b", "X"), ("made_up.b", "g")}


def test_variables_of_a_function_are_not_the_module_s_names(tmp_path):
    code = code_of(
        tmp_path,
        init="",
        a="""
            def g(): return 1
            def h(): return 2
            def f(g):
                h = [g for g in range(3)]
                def inner(): return g, h
                return inner() + tuple(g for g in h)
            def writes():
                global h
                h = 3
        """,
    )
    assert code.reached(["made_up.a:f"]) == {("made_up.a", "f")}
    assert code.reached(["made_up.a:writes"]) == {("made_up.a", "writes"), ("made_up.a", "h")}


def test_types_that_annotations_name_are_followed(tmp_path):
    code = code_of(
        tmp_path,
        init="",
        types="class Folder:\n    def read(self): return 1\nclass Other: pass\n",
        a="from made_up.types import Folder, Other\ndef f(x: Folder | None):\n    y: Other = x.read()\n    return y\n",
    )
    assert code.reached(["made_up.a:f"]) == {
        ("made_up.a", "f"),
        ("made_up.types", "Folder"),
        ("made_up.types", "Other"),
    }


def test_methods_and_fields_of_a_class_are_followed(tmp_path):
    code = code_of(
        tmp_path,
        init="",
        a="""
            from dataclasses import dataclass
            class Unit: pass
            class Base: pass
            def scale(): return 2
            @dataclass
            class Shape(Base):
                unit: Unit
                def size(self): return scale()
        """,
    )
    assert {name for _, name in code.reached(["made_up.a:Shape"])} == {"Unit", "Base", "scale", "Shape"}


def test_what_a_decorator_of_the_package_may_register_counts(tmp_path):
    code = code_of(
        tmp_path,
        init="",
        a="""
            KNOWN = {}
            def known(function): KNOWN[function.__name__] = function
            @known
            def dice(): return 1
            def measure(name): return KNOWN[name]()
        """,
    )
    before = code.fingerprint(["made_up.a:measure"])
    path = tmp_path / "made_up/a.py"
    path.write_text(path.read_text().replace("return 1", "return 2"))
    assert Code(path.parent).fingerprint(["made_up.a:measure"]) != before


def test_data_beside_a_module_counts_where_it_is_named(tmp_path):
    code = code_of(tmp_path, init="", room__a="def f(): return 'table.csv', 'templates'\ndef g(): return 1\n")
    room = tmp_path / "made_up/room"
    (room / "templates").mkdir()
    (room / "table.csv").write_text("1")
    (room / "templates/page.html").write_text("<p>")

    def both():
        return [Code(code._package).fingerprint([f"made_up.room.a:{name}"]) for name in "fg"]

    before = both()
    (room / "table.csv").write_text("2")
    table = both()
    (room / "templates/page.html").write_text("<div>")
    page = both()
    assert len({before[0], table[0], page[0]}) == 3
    assert before[1] == table[1] == page[1]


@pytest.mark.parametrize("entry", ["made_up.a:missing", "made_up.missing:f", "made_up.missing", "other.a"])
def test_an_entry_that_does_not_exist_is_an_error(tmp_path, entry):
    with pytest.raises(LookupError, match="is not in the package"):
        code_of(tmp_path, init="", a="def f(): return 1\n").fingerprint([entry])


def test_the_code_of_a_training_is_recorded_from_the_step_that_it_took(caplog):
    first = code_of_steps([], 0, "a", "use --restart")
    assert first == [{"from_step": 1, "code": "a"}]
    assert code_of_steps(first, 7, "a", "use --restart") == first
    assert not caplog.records
    second = code_of_steps(first, 7, "b", "use --restart")
    assert second == [*first, {"from_step": 8, "code": "b"}]
    assert "changed since step 7 (a, now b)" in caplog.text
    assert "To start over, use --restart." in caplog.text
    # What was not saved is forgotten: the steps from 8 on are taken by the first code after all.
    assert code_of_steps(second, 7, "a", "use --restart") == first
    assert code_of_steps(second, 0, "c", "use --restart") == [{"from_step": 1, "code": "c"}]


# The real package.

ROOMS = ["core", "config", "sources", "layouts", "models", "generators", "synthesis", "arms", "segmentation"]
ROOMS += ["evaluation", "quality", "verdict", "report", "operations"]
SOURCES = sources.names()
GENERATORS = generators.names()
NAMES = {
    "simulate": ["phantom"],
    "find_series": SOURCES,
    "index": SOURCES,
    "prepare": SOURCES,
    "train": [name for name in GENERATORS if generators.plugin(name).recipe is not None],
    "synthesize": GENERATORS,
    "draw": GENERATORS,
}
STAGES_AND_NAMES = [(stage, name) for stage in STAGES for name in NAMES.get(stage, [""])]


def reached(stage: str, name: str = "") -> set[str]:
    found = Code(PACKAGE, LEFT_OUT).reached(entry.format(name=name) for entry in STAGES[stage])
    return {f"{module.removeprefix('lungddpm.')}:{definition}" for module, definition in found}


def modules(stage: str, name: str = "") -> set[str]:
    return {place.partition(":")[0] for place in reached(stage, name)}


@pytest.mark.parametrize(("stage", "name"), STAGES_AND_NAMES)
def test_every_stage_has_code(stage, name):
    assert len(stage_fingerprint(stage, name)) == 64
    assert stage_fingerprint(stage, name) == stage_fingerprint(stage, name)


def test_what_is_left_out_is_there():
    for dotted in LEFT_OUT:
        path = PACKAGE.parent.joinpath(*dotted.split("."))
        names = [path, path.with_suffix(".py")]
        if not any(name.exists() for name in names):
            assert f"def {path.name}(" in path.parent.with_suffix(".py").read_text()


@pytest.mark.parametrize(
    ("stage", "name", "but_not"),
    [
        # Neither drawing pictures, nor drawing samples, nor the loop around the steps retrains a model.
        (
            "train",
            "lung_ddpm",
            ["core.drawing", "models.sampling", "models.monitoring", "models.training_states", "report"],
        ),
        (
            "train",
            "lung_ddpm",
            ["generators.copy_paste", "layouts", "operations", "segmentation", "evaluation", "quality"],
        ),
        ("train", "lung_ddpm", ["models.adversarial"]),
        ("train", "pix2pix3d", ["models.sampling", "models.schedule", "models.monitoring", "generators.lung_ddpm"]),
        ("train_segmenter", "", ["segmentation.nnunet", "models", "generators", "layouts", "arms", "core.drawing"]),
        ("synthesize", "lung_ddpm", ["models.training", "models.optimization", "models.data", "generators.copy_paste"]),
        ("synthesize", "reference", ["models", "generators.lung_ddpm", "generators.copy_paste", "core.drawing"]),
        ("synthesize", "copy_paste", ["models", "generators.lung_ddpm"]),
        ("import_external", "", ["models", "generators.lung_ddpm"]),
        ("draw", "reference", ["layouts", "models"]),
        ("make_layout", "", ["generators", "models", "layouts.lungs"]),
        ("prepare", "images", ["sources.lidc", "sources.phantom", "models", "arms", "layouts.placement", "report"]),
        ("prepare", "lidc", ["sources.phantom", "sources.images"]),
        ("find_series", "lidc", ["arms", "layouts"]),
        ("simulate", "phantom", ["sources.lidc", "layouts", "core.cases"]),
        ("evaluate", "", ["quality", "verdict", "report", "segmentation"]),
        ("label_fidelity", "", ["models", "generators", "synthesis", "layouts", "verdict", "report", "core.drawing"]),
        ("qc", "", ["verdict", "quality", "models", "core.drawing"]),
        ("checksums", "", ["report", "operations.doctor", "operations.plan", "operations.bench"]),
        ("report", "", ["operations.bench", "operations.plan", "models", "layouts", "sources"]),
    ],
)
def test_a_stage_does_not_depend_on(stage, name, but_not):
    found = {m for m in modules(stage, name) for other in but_not if m == other or m.startswith(f"{other}.")}
    assert found == set()


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        ("index", "lidc", {"arms.splits:assign_roles", "sources.lidc:find_series"}),
        ("prepare", "phantom", {"layouts.lungs:segment_lungs", "core.labels:Label", "core.drawing:LABELS"}),
        ("prepare", "phantom", {"sources.lidc:load_scan", "layouts.compose:build_case"}),
        ("train", "lung_ddpm", {"models.denoiser:UNet", "models.data:SampleStream", "models.augmentation:augment"}),
        ("train", "lung_ddpm", {"models.schedule:cosine_betas", "core.labels:Label", "core.files:seed_from"}),
        ("train", "pix2pix3d", {"models.adversarial:AdversarialOptimization", "models.adversarial:Discriminators"}),
        ("train", "pix2pix3d", {"models.optimization:Learner", "models.objectives:WeightedError"}),
        ("synthesize", "med_ddpm", {"generators.lung_ddpm:load_sampler", "models.sampling:sample_free"}),
        ("make_layout", "", {"layouts.placement:jitter"}),
        ("compose", "", {"arms.splits:check_leaks", "arms.splits:folds"}),
        ("predict", "", {"segmentation.nnunet:run_predict"}),
        ("evaluate", "", {"evaluation.lesions:lesion_measures", "core.labels:Label"}),
        ("label_fidelity", "", {"segmentation.nnunet:Segmenter", "evaluation.lesions:lesion_measures"}),
        ("report", "", {"verdict.published:published_figures", "evaluation.froc:froc_tables", "core.drawing:STYLE"}),
    ],
)
def test_a_stage_depends_on(stage, name, expected):
    assert expected <= reached(stage, name)


@pytest.mark.parametrize(("stage", "name"), STAGES_AND_NAMES)
def test_a_stage_reaches_no_room_after_its_own(stage, name):
    own = [ROOMS.index(entry.format(name=name).split(".")[1].partition(":")[0]) for entry in STAGES[stage]]
    found = {m.partition(".")[0] for m in modules(stage, name)} - set(ROOMS[: max(own) + 1])
    assert not found
