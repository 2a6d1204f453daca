"""Generators: each module turns a reference CT, a layout and a seed into a synthetic CT.

A module declares:

TITLE: str                    short description
CITATION: str                 the work to cite
Settings                      its keys in `generators.<name>` of the config: a subclass of `GeneratorSettings`, or that
                              class itself; of `TrainedSettings` for a generator that is trained
LAYOUTS: tuple[str, str]      source of the layout when a reference with nodules is used first, and again: each
                              `OWN`, `JITTERED` or `ADDED`, depending on what it can draw. References without a
                              nodule get placed ones; if both are `OWN`, they are left out
load(config, weights, device) -> Generator

and, if applicable:

WEIGHTS_OF: str               the generator whose weights it uses; a trained generator has its own
recipe(config) -> Recipe      how it is trained; required if `Settings` are `TrainedSettings`, as is
preview(config) -> Preview    draws a few samples during training
drawing(config) -> Drawing    cost of a sample, for `lungddpm plan`; required for generators with weights
FAMILY: str                   the family of its model, a row of the ladder (`lungddpm.verdict.ladder`); controls and
                              floors have none
PUBLISHED_AS: Mapping         by the information that it is given (`given_of`), the method in
                              `lungddpm/verdict/published.csv` that it represents

A module imports heavy libraries only inside its functions, because light commands import it for its declarations. Of
the configuration it imports only `lungddpm.config.sections`. Synthetic CT from other systems does not need a module:
see `lungddpm.synthesis.external`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungddpm.config.sections import GeneratorConfig, GeneratorSettings, TrainedSettings
from lungddpm.core.cases import ADDED as ADDED
from lungddpm.core.cases import JITTERED as JITTERED
from lungddpm.core.cases import OWN as OWN
from lungddpm.core.cases import PLACED as PLACED
from lungddpm.core.cases import CaseFolder
from lungddpm.core.errors import ConfigError
from lungddpm.core.volume import Volume

if TYPE_CHECKING:
    from lungddpm.layouts.placement import MadeLayout
    from lungddpm.models.recipe import Preview, Recipe

NOTHING, LAYOUT, SLICE, VOLUME = "none", "layout", "layout+slice", "layout+volume"
GIVEN = NOTHING, LAYOUT, SLICE, VOLUME
"""The information about the target CT that a generator is given, in the terms of `published.csv`. (All generators here
are given the layout: without one there are no labels.)"""
NODULES_PER_CASE = 2.5
"""On average (LIDC-IDRI: 2.6 in 1,018 scans): assumed of samples that are drawn nodule by nodule, until they exist."""

_REQUIRED = ("TITLE", "CITATION", "Settings", "LAYOUTS", "load")


@dataclass(frozen=True)
class Task:
    """One synthetic CT to draw.

    Attributes:
        reference: int16 HU; fills what the layout leaves open.
        layout: uint8 labels on the same grid.
        seed: for all random numbers in this CT.
        made: how the layout was made; None for the reference's own.
        donors: folder of every case that one of its nodules is from, by case id.
    """

    reference: Volume
    layout: Volume
    seed: int
    made: MadeLayout | None = None
    donors: Mapping[str, CaseFolder] = field(default_factory=dict)


@dataclass(frozen=True)
class Generator:
    """A generator ready to work.

    Attributes:
        make: tasks on grids of equal size -> one (x, y, z) int16 HU array each, on its reference's grid. Where the
            layout is background, the array equals the reference exactly, except with `background: generated`, with
            published AAS, which leaves noise in it, and with `med_ddpm`, which has no AAS. A task's array does not
            depend on the other tasks.
        device: description of its device, for the record.
        batch_size: tasks to pass at once on a GPU.
        describe: further inputs of a task's CT, as JSON-like values for its `sample.json`.
    """

    make: Callable[[list[Task]], list[np.ndarray]]
    device: str = "cpu"
    batch_size: int = 1
    describe: Callable[[Task], dict[str, Any]] = lambda task: {}


@dataclass(frozen=True)
class Drawing:
    """The cost of drawing with a network.

    Attributes:
        passes: forward passes per sample, or per nodule.
        batch_size: samples drawn at once on a GPU.
        per_nodule: whether each nodule takes these passes.
    """

    passes: float
    batch_size: int = 1
    per_nodule: bool = False

    def passes_for(self, nodules: float = NODULES_PER_CASE) -> float:
        """Forward passes of a sample with this number of nodules."""
        return self.passes * nodules if self.per_nodule else self.passes


@dataclass(frozen=True)
class Plugin:
    """The declaration of a module in this folder; see the top of this file.

    Attributes:
        name: of the module.
        weights_of: the generator whose weights it uses; itself, if it is trained; None if it needs none.
    """

    name: str
    title: str
    citation: str
    settings: type[GeneratorSettings]
    layouts: tuple[str, str]
    load: Callable[[GeneratorConfig[Any], Path | None, str], Generator]
    weights_of: str | None
    recipe: Callable[[GeneratorConfig[Any]], Recipe] | None
    preview: Callable[[GeneratorConfig[Any]], Preview] | None
    drawing: Callable[[GeneratorConfig[Any]], Drawing] | None
    family: str | None
    published_as: Mapping[str, str]

    def training(self, config: GeneratorConfig[TrainedSettings]) -> tuple[Recipe, Preview]:
        """Its training recipe, and the preview that draws a few samples meanwhile.

        Raises:
            ConfigError: it is not trained.
        """
        if self.recipe is None or self.preview is None:
            raise ConfigError("--generator", f"'{self.name}' is not trained", "Name a trained generator.")
        return self.recipe(config), self.preview(config)


def names() -> list[str]:
    """All generators, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def plugin(name: str) -> Plugin:
    """The declaration of a generator.

    Raises:
        ConfigError: there is no such generator, or its module lacks a declaration.
    """
    if name not in names():
        raise ConfigError("generators", f"there is no generator '{name}'", f"Available: {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    missing = [required for required in _REQUIRED if not hasattr(module, required)]
    trains = not missing and issubclass(module.Settings, TrainedSettings)
    weights_of = name if trains else getattr(module, "WEIGHTS_OF", None)
    required = [*(("recipe", "preview") if trains else ()), *(("drawing",) if weights_of is not None else ())]
    missing += [name for name in required if not hasattr(module, name)]
    if missing:
        remedy = "See docs/how-to/add-a-generator-or-source.md."
        raise ConfigError(module.__file__ or name, f"does not declare {', '.join(missing)}", remedy)
    return Plugin(
        name=name,
        title=module.TITLE,
        citation=module.CITATION,
        settings=module.Settings,
        layouts=module.LAYOUTS,
        load=module.load,
        weights_of=weights_of,
        recipe=module.recipe if trains else None,
        preview=module.preview if trains else None,
        drawing=module.drawing if weights_of is not None else None,
        family=getattr(module, "FAMILY", None),
        published_as=getattr(module, "PUBLISHED_AS", {}),
    )


def given_of(config: GeneratorConfig[Any]) -> str:
    """The information that a generator with a network is given besides the layout: one of `GIVEN`.

    If the open voxels are pasted, that is the whole volume around the drawn region, whatever the network sees of it.
    """
    sampling = getattr(config.settings, "sampling", None)
    if getattr(sampling, "background", "generated") == "reference":
        return VOLUME
    hint = getattr(config.of_weights.settings, "hint", "none")
    return {"none": LAYOUT, "slice": SLICE, "volume": VOLUME}[hint]
