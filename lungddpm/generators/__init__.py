"""Generators: what turns a reference CT, a layout and a seed into a synthetic CT. Each module here is one.

A module declares:

TITLE: str                    what it is, in a few words
CITATION: str                 the work to cite
Settings                      its keys in `generators.<name>` of the config: a subclass of `GeneratorSettings`, or that
                              class itself; of `TrainedSettings` for a generator that is trained
LAYOUTS: tuple[str, str]      where the layouts are from when a reference with nodules is used first, and again: each
                              `OWN`, `JITTERED` or `ADDED`, depending on what its CT can show. References without a
                              nodule get placed ones; where both are `OWN`, they are left out
load(config, weights, device) -> Generator

and where it applies:

WEIGHTS_OF: str               the generator whose weights it draws with; one that is trained has its own
recipe(config) -> Recipe      how it is trained; required where `Settings` are `TrainedSettings`, as is
preview(config) -> Preview    what draws a few samples while it trains
drawing(config) -> Drawing    what a sample costs, for `lungddpm plan`; required of those that draw with weights
FAMILY: str                   the family of its model, a row of the ladder (`lungddpm.verdict.ladder`); controls and
                              floors have none
PUBLISHED_AS: Mapping         by what it is given of the reference (`given_of`), the method in
                              `lungddpm/verdict/published.csv` that it then stands for

A module imports heavy libraries inside its functions only: light commands import it to read what it declares. It
imports no other part of the configuration than `lungddpm.config.sections`. Synthetic CT that other systems made needs
no module: see `lungddpm.synthesis.external`.
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
"""What a generator is given of the CT that it is to draw, as `published.csv` has it. (Of nothing but the random
numbers, no generator here draws: without a layout there is no label.)"""

_REQUIRED = ("TITLE", "CITATION", "Settings", "LAYOUTS", "load")


@dataclass(frozen=True)
class Task:
    """One synthetic CT to make.

    Attributes:
        reference: int16 HU; fills what the layout leaves open.
        layout: uint8 labels on the same grid.
        seed: of every random number in this CT.
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
        make: tasks on grids of one size -> one (x, y, z) int16 HU array each, on its reference's grid. Where the
            layout is background, the array equals the reference exactly (but for published AAS, which leaves noise in
            it, and for `med_ddpm`, which has no AAS). A task's array does not depend on the others.
        device: what it computes on, for the record.
        batch_size: tasks that it takes at once on a GPU.
        describe: what a task's CT is drawn with besides, as JSON-like values for its `sample.json`.
    """

    make: Callable[[list[Task]], list[np.ndarray]]
    device: str = "cpu"
    batch_size: int = 1
    describe: Callable[[Task], dict[str, Any]] = lambda task: {}


@dataclass(frozen=True)
class Drawing:
    """What it takes to draw with a network.

    Attributes:
        passes: forward passes per sample, on average.
        batch_size: samples that are drawn at once on a GPU.
    """

    passes: float
    batch_size: int = 1


@dataclass(frozen=True)
class Plugin:
    """What a module in this folder declares; see the top of this file.

    Attributes:
        name: of the module.
        weights_of: the generator whose weights it draws with; itself, if it is trained; None if it needs none.
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
        """How it is trained, and what draws a few samples meanwhile.

        Raises:
            ConfigError: it is not trained.
        """
        if self.recipe is None or self.preview is None:
            raise ConfigError("--generator", f"'{self.name}' is not trained", "Name a generator that is.")
        return self.recipe(config), self.preview(config)


def names() -> list[str]:
    """All generators, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def plugin(name: str) -> Plugin:
    """What a generator declares.

    Raises:
        ConfigError: there is no such generator, or its module lacks a declaration.
    """
    if name not in names():
        raise ConfigError("generators", f"there is no generator '{name}'", f"Known are {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    missing = [required for required in _REQUIRED if not hasattr(module, required)]
    trains = not missing and issubclass(module.Settings, TrainedSettings)
    weights_of = name if trains else getattr(module, "WEIGHTS_OF", None)
    required = [*(("recipe", "preview") if trains else ()), *(("drawing",) if weights_of is not None else ())]
    missing += [name for name in required if not hasattr(module, name)]
    if missing:
        remedy = "See docs/how-to/add-a-generator-or-source.md."
        raise ConfigError(module.__file__ or name, f"declares no {', no '.join(missing)}", remedy)
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
    """What a generator that draws with a network is given of the reference beside the layout: one of `GIVEN`.

    Where the open voxels are pasted, that is the whole volume around what is drawn, whatever the network sees of it.
    """
    sampling = getattr(config.settings, "sampling", None)
    if getattr(sampling, "background", "generated") == "reference":
        return VOLUME
    hint = getattr(config.of_weights.settings, "hint", "none")
    return {"none": LAYOUT, "slice": SLICE, "volume": VOLUME}[hint]
