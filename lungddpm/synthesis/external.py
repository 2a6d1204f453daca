"""Synthetic CT of another system, imported from a folder (`arms.external`) if it fulfils the contract.

<folder>/samples.json             see `Declaration`
<folder>/<sample>/ct.nii.gz       HU, on the grid of its reference
<folder>/<sample>/layout.nii.gz   labels (see `lungddpm.core.labels.Label`), same grid
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lungddpm.config.models import Config, LayoutLimits
from lungddpm.core import cases
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.errors import InputError
from lungddpm.core.files import fingerprint, read_json, sha256_of, write_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.roles import INTERNAL, SYNTHETIC
from lungddpm.core.volume import AIR_HU, Volume, is_sheared, read_grid, read_labels, read_volume, write_volume
from lungddpm.layouts.hounsfield import hounsfield_problem, recognised_problem
from lungddpm.synthesis.records import is_complete

if TYPE_CHECKING:
    import pandas as pd

NOBODY = "none"
"""Declares that no patient of this run was used; an empty list is an error."""
SPACING_FACTOR = 1.5
"""Tolerance of a sample's voxel edges beyond the smallest and largest of the real cases, as a factor."""
_REMEDY = "See docs/how-to/bring-your-own-synthetic-ct.md."
_SHOWN = 40
_CT, _LAYOUT = _FILES = cases.CaseFolder.CT, cases.CaseFolder.LAYOUT
_READERS = {_CT: read_volume, _LAYOUT: read_labels}

_Text = Annotated[str, Field(min_length=1)]
_Patients = Literal["none"] | Annotated[list[_Text], Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeclaredSample(_Entry):
    """One entry of the declaration's `samples`."""

    sample: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Its folder."""
    reference: _Text
    """Case of this run whose CT it was made from and whose grid it has, or `none`."""
    donors: _Patients
    """Patients or cases whose data was used in any other way, or `none`."""


class Declaration(_Entry):
    """The content of `samples.json`."""

    trained_on: _Patients
    """Patients or cases of this run on which the system was trained, or `none`."""
    samples: Annotated[list[DeclaredSample], Field(min_length=1)]
    """A smaller dose takes the first ones."""


def import_external(
    config: Config,
    root: Path,
    generator: str,
    wanted: int,
    cases_table: Path,
    real_cases: pd.DataFrame,
    output: Path,
) -> list[dict[str, Any]]:
    """Check the whole folder of another system, and copy the first samples.

    Writes `<output>/<sample>/{ct.nii.gz,layout.nii.gz,sample.json}`; existing samples are kept.

    Args:
        config: `grid.size` and `layouts.limits` are used.
        root: the folder.
        generator: its name in `arms.external`.
        wanted: number of samples to copy.
        cases_table: table of the real cases.
        real_cases: its content.
        output: folder of this generator's samples.

    Returns:
        Rows of a case table, in the order of the declaration.

    Raises:
        InputError: it breaks the contract; the message has every violation with its file.
    """
    declaration = read_declaration(root)
    violations = check_names(declaration, real_cases)
    if len(declaration.samples) < wanted:
        violations.append(f"samples.json: has {len(declaration.samples)} samples, but an arm takes {wanted}")
    usable = real_cases[real_cases["status"] == "ok"].set_index("case_id", drop=False)
    grids = {name: read_grid(cases.folder_of(cases_table, row).ct) for name, row in usable.iterrows()}
    with Progress(f"checking {generator}", len(declaration.samples)) as progress:
        named = {Label.LUNG} if generator in config.arms.quality_only else {Label.LUNG, Label.NODULE}
        for entry in declaration.samples:
            violations += check_sample(root, entry, config, grids, named)
            progress.advance()
    if violations:
        more = f"; and {len(violations) - _SHOWN} more" if len(violations) > _SHOWN else ""
        raise InputError(
            root,
            f"breaks the contract of arms.external {len(violations)} times: {'; '.join(violations[:_SHOWN])}{more}",
            _REMEDY,
        )
    rows = []
    for entry in declaration.samples[:wanted]:
        reference = None if entry.reference == NOBODY else usable.loc[entry.reference]
        rows.append(_copy(root, entry, declaration, generator, reference, output))
    LOG.info("%s: %d of %d samples are used", generator, len(rows), len(declaration.samples))
    return rows


def read_declaration(root: Path) -> Declaration:
    """Read `samples.json`.

    Raises:
        InputError: it is missing, is not JSON, or has wrong keys or values; the message lists all errors.
    """
    path = root / "samples.json"
    content = read_json(path, _REMEDY)
    try:
        return Declaration.model_validate(content)
    except ValidationError as error:
        problems = {
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r:.60}"
            for problem in error.errors()
        }
        raise InputError(path, f"has {len(problems)} errors: {'; '.join(sorted(problems)[:_SHOWN])}", _REMEDY) from None


def check_names(declaration: Declaration, real_cases: pd.DataFrame) -> list[str]:
    """Errors in the names of a declaration, each as "<file>: <problem>".

    An outside patient cannot be distinguished from a misspelt one of this run, so both are errors.
    """
    known = {name for key in ("case_id", "patient_id", "series_uid") for name in real_cases[key]}
    problems = []
    for sample, times in Counter(entry.sample for entry in declaration.samples).items():
        if times > 1:
            problems.append(f"lists {sample} {times} times")
        if sample in known:
            problems.append(f"gives a sample the name of the case {sample}")
    lists = {"trained_on": declaration.trained_on}
    lists |= {f"donors of {entry.sample}": entry.donors for entry in declaration.samples}
    for key, names in lists.items():
        strangers = [] if names == NOBODY else sorted(set(names) - known)
        if strangers:
            problems.append(f"{key} names {', '.join(strangers[:5])}, not in this run (leave out other patients)")
    return [f"samples.json: {problem}" for problem in problems]


def check_sample(
    root: Path,
    entry: DeclaredSample,
    config: Config,
    grids: Mapping[str, Volume],
    named: Collection[Label] = (Label.LUNG, Label.NODULE),
) -> list[str]:
    """Errors in the files of one sample, each as "<file>: <problem>".

    Args:
        root: folder of the other system.
        entry: the sample's declaration.
        config: `grid.size` and `layouts.limits` are used.
        grids: of the usable real cases, by case id.
        named: labels that a layout must have; samples of `arms.quality_only` are not used for training, so they do not
            need nodules.
    """
    problems, volumes = [], {}
    for name in _FILES:
        path = root / entry.sample / name
        if not path.resolve().is_relative_to(root.resolve()):
            problems.append((name, f"points outside the folder, to {path.resolve()}"))
            continue
        try:
            volumes[name] = _READERS[name](path)
        except InputError as error:
            problems.append((name, error.problem))
    ct, layout = (volumes.get(name) for name in _FILES)
    if entry.reference != NOBODY and entry.reference not in grids:
        problems.append((_CT, f"is made from {entry.reference}, which is not a usable case of this run"))
    elif ct is not None:
        problems += [(_CT, problem) for problem in _grid_problems(ct, entry.reference, config.grid.size, grids)]
    if layout is not None:
        problems += [(_LAYOUT, problem) for problem in _label_problems(layout.array, named)]
    off_grid = ct is not None and layout is not None and not ct.same_grid(layout)
    if off_grid:
        problems.append((_LAYOUT, "is not on the grid of its CT"))
    if ct is not None:
        lungs = None if off_grid or layout is None else layout.array == Label.LUNG
        problems += [(_CT, problem) for problem in _intensity_problems(ct.array, lungs, config.layouts.limits)]
    return [f"{entry.sample}/{name}: {problem}" for name, problem in problems]


def _grid_problems(ct: Volume, reference: str, size: tuple[int, int, int], grids: Mapping[str, Volume]) -> list[str]:
    if reference != NOBODY:
        return [] if ct.same_grid(grids[reference]) else [f"is not on the grid of {reference}: resample it"]
    problems = (
        [] if ct.shape == tuple(size) else [f"has {ct.shape} voxels, but the grid has {tuple(size)}: resample it"]
    )
    if is_sheared(ct.affine):
        problems.append("has sheared axes: resample it to an upright grid")
    real_mm = np.array([grid.spacing_mm for grid in grids.values()])
    low, high = real_mm.min(axis=0) / SPACING_FACTOR, real_mm.max(axis=0) * SPACING_FACTOR
    if ((ct.spacing_mm < low) | (ct.spacing_mm > high)).any():
        shown = " x ".join(f"{edge:.2f}" for edge in ct.spacing_mm)
        problems.append(f"has voxels of {shown} mm, unlike the real cases: write its true affine")
    return problems


def _intensity_problems(hu: np.ndarray, lungs: np.ndarray | None, limits: LayoutLimits) -> list[str]:
    if not np.isfinite(hu).all():
        return [f"has NaN or infinite values in {np.count_nonzero(~np.isfinite(hu))} voxels"]
    if hu.min() == hu.max():
        return [f"is constant ({hu.flat[0]:g} HU)"]
    if problem := recognised_problem(hu, limits) if lungs is None else hounsfield_problem(hu, lungs, limits):
        return [problem]
    stored = np.iinfo(np.int16)
    if hu.min() < stored.min or hu.max() > stored.max:
        return [f"ranges from {hu.min():g} to {hu.max():g}, which are not HU"]
    return []


def _label_problems(labels: np.ndarray, named: Collection[Label]) -> list[str]:
    found = np.unique(labels).tolist()
    problems = []
    if unknown := [label for label in found if label not in list(Label)]:
        problems.append(f"has the label {unknown[0]:g}; allowed are 0 background, 1 lung, 2 nodule, 3 vessel")
    problems += [f"has no {label.name.lower()}" for label in Label if label in named and label not in found]
    return problems


def _copy(
    root: Path,
    entry: DeclaredSample,
    declaration: Declaration,
    generator: str,
    reference: pd.Series | None,
    output: Path,
) -> dict[str, Any]:
    """Write one sample in the common form; return its row."""
    folder = cases.CaseFolder(output / entry.sample)
    provenance = {
        "sample_id": entry.sample,
        "reference_case_id": None if reference is None else reference["case_id"],
        "reference_patient_id": None if reference is None else reference["patient_id"],
        "layout_origin": "external",
        "declared": {"trained_on": declaration.trained_on, **entry.model_dump(include={"reference", "donors"})},
        "generator": generator,
        "files": {name: sha256_of(root / entry.sample / name) for name in _FILES},
        "code": stage_fingerprint("copy_external"),
    }
    made_from = fingerprint(provenance)
    if not is_complete(folder, made_from):
        ct, layout = (read(root / entry.sample / name) for name, read in _READERS.items())
        write_volume(folder.ct, ct.like(np.rint(np.maximum(ct.array, AIR_HU)).astype(np.int16)))
        write_volume(folder.layout, layout.like(layout.array.astype(np.uint8)))
        write_json(folder.sample_record, {**provenance, "fingerprint": made_from, "sha256": folder.hash()})
    return _row(folder, generator, reference)


def _row(folder: cases.CaseFolder, generator: str, reference: pd.Series | None) -> dict[str, Any]:
    from scipy import ndimage

    ct, layout = folder.read()
    _, n_nodules = ndimage.label(layout.array == Label.NODULE, np.ones((3, 3, 3)))
    return {
        "case_id": folder.path.name,
        "patient_id": NOBODY if reference is None else reference["patient_id"],
        "source": generator,
        "data_set": INTERNAL,
        "role": SYNTHETIC,
        "series_uid": "" if reference is None else reference["series_uid"],
        **dict(zip(("size_x", "size_y", "size_z"), ct.shape, strict=True)),
        **dict(zip(("spacing_x_mm", "spacing_y_mm", "spacing_z_mm"), ct.spacing_mm, strict=True)),
        "n_nodules": n_nodules,
        "status": "ok",
        "reason": "",
        "path": folder.path.name,
        "sha256": folder.hash(),
    }
