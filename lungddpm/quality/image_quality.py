"""Similarity of synthetic to real CT, compared with floors that do not need a model.

Each sample is compared with its reference by region, and all samples together with all references in the features of
a network. Intensities are on [0, 1] over `grid.window_hu`. Voxels that the layout leaves open are copied from
the reference, so only the figures within the layout, and at its border, are informative about the generator.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation, generate_binary_structure, label, mean

from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, sha256_of, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import Progress, waiting
from lungddpm.core.roles import DISCOVERY, REFERENCE
from lungddpm.core.text import plural
from lungddpm.core.volume import Volume, to_model_range
from lungddpm.quality.calibration import NODULES, TRAINING, compare_hu, mean_hu
from lungddpm.quality.diversity import NoduleDraws, compare_draws, memorisation, nearest_case, pairwise_similarity
from lungddpm.quality.feature_distances import ImageSet, distances_of_sets
from lungddpm.quality.similarity import n_scales, similarities

if TYPE_CHECKING:
    from lungddpm.quality.medicalnet import Extractor

COLUMNS = ["generator", "case_id", "reference", "image", "region", "metric", "value", "note"]
"""One row per sample, image, region and metric. `image` is what is compared: `SYNTHETIC` or a floor."""
SET_COLUMNS = [
    "generator", "image", "region", "metric", "value", "standard_error", "n", "n_real", "extractor", "weights_sha256",
    "note",
]  # fmt: skip
"""One row per set of images, region and metric: `n` images (or pairs, or nodules) compared with `n_real` real cases."""
SYNTHETIC, CONSTANT_LUNGS, SHIFTED = "synthetic", "constant lungs", "shifted references"
"""Of the two floors, one keeps only the references' brightness, the other changes only that."""
OTHER_PATIENTS, COPIES = "other patients", "copies of the references"
"""Further floors: the discovery cases, treated as a sample or a set of samples; each sample's own reference."""
WHOLE, LUNGS, SEAM = "whole volume", "lungs", "seam"
"""Two of the `regions`, and the border between labelled and open voxels."""
METRICS = ("mse", "psnr_db", "ssim", "ms_ssim", "mean_difference_hu")
SEAM_RATIO, NEAREST = "gradient_ratio", "nearest_training_rms_hu"
MEDIAN_RATIO, SMALLEST_RATIO, N_NEARER = "nearest_training_ratio", "smallest_training_ratio", "n_nearer_than_any_real"
"""Memorisation, see `diversity.Nearness`."""
COPIED = "they copy more than 10 % of the lungs from their references, which would determine it"
"""Why nearness to training cases is not measured."""
PAIRWISE, VOXEL_SD, MEAN_SD = "pairwise_ms_ssim", "voxel_sd_hu", "nodule_mean_sd_hu"
"""Diversity of the draws of one layout; the last also of real nodules, for comparison."""
_SHELL_VOXELS = 2
_LEAST_DRAWN = 0.9
"""Share of the lungs. If half is drawn, even a copy of a training case there is 0.7 times as far as the reference."""


def unit_range(hu: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """HU -> [0, 1] float32, linear over the window, clipped outside it."""
    return (to_model_range(hu, window_hu) + 1) / 2


@dataclass(frozen=True)
class Reference:
    """The real case that a sample was made from.

    Attributes:
        case_id: its name.
        ct: HU.
        layout: its own; the sample's differs where nodules were placed or moved.
    """

    case_id: str
    ct: Volume
    layout: Volume


@dataclass(frozen=True)
class Sample:
    """A synthetic case with its reference, on the same grid.

    Attributes:
        ct: synthetic, HU.
        layout: the one that it was made from.
        reference: None for a sample of another system without one.
    """

    ct: Volume
    layout: Volume
    reference: Reference | None


def regions(layout: np.ndarray, reference_layout: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the regions in which a synthetic CT can be compared with its reference; lungs include nodules.

    Where nodules were placed or moved, the reference shows other tissue: those voxels are left out of the lungs, and
    the nodules are not compared at all. The shell around nodules is limited to labelled voxels; the others are copied.
    """
    same = layout == reference_layout
    nodules = (layout == Label.NODULE) & same.all()
    cube = generate_binary_structure(3, 3)
    with_shell = binary_dilation(nodules, cube, _SHELL_VOXELS) if nodules.any() else nodules
    return {
        WHOLE: np.ones(layout.shape, bool),
        LUNGS: (layout != Label.BACKGROUND) & same,
        NODULES: nodules,
        "nodules and shell": with_shell & (layout != Label.BACKGROUND),
    }


def constant_lungs(reference: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The floor: the reference with constant lungs at the value of least squared error (their mean)."""
    return np.where(lungs, reference[lungs].mean() if lungs.any() else 0, reference).astype(reference.dtype)


def shifted_lungs(image: np.ndarray, reference: np.ndarray, layout: np.ndarray, same: np.ndarray) -> np.ndarray:
    """The floor: the reference with the image's mean brightness in the lungs, otherwise unchanged.

    Args:
        image: (x, y, z), HU.
        reference: same shape, HU.
        layout: labels that the image was made from, same shape.
        same: bool, same shape: voxels for the mean difference, if they are labelled.
    """
    lungs = layout != Label.BACKGROUND
    compared = lungs & same
    shift = image[compared].mean() - reference[compared].mean() if compared.any() else 0.0
    return np.where(lungs, reference + shift, reference)


def compare_images(
    image: np.ndarray, reference: np.ndarray, masks: dict[str, np.ndarray], window_hu: tuple[float, float]
) -> list[dict]:
    """MSE, PSNR (dB), SSIM, MS-SSIM, and mean difference (HU, image minus reference) within each region.

    Args:
        image: (x, y, z) in [0, 1].
        reference: same shape and range.
        masks: region name -> bool mask of that shape.
        window_hu: the HU range of [0, 1].

    Returns:
        One dict {region, metric, value, note} per region and metric. Values of an empty region are NaN, as is
        similarity on grids with fewer than 11 voxels per edge; the PSNR of identical images is infinite.
    """
    difference, similar = image - reference, similarities(image, reference, masks)
    notes, rows = {"ms_ssim": plural(n_scales(image.shape), "scale")}, []
    for region, mask in masks.items():
        values = dict.fromkeys(METRICS, math.nan)
        if mask.any():
            mse = float(np.square(difference[mask], dtype=np.float64).mean())
            ssim, ms_ssim = similar[region]
            values = {
                "mse": mse,
                "psnr_db": -10 * math.log10(mse) if mse else math.inf,
                "ssim": ssim,
                "ms_ssim": ms_ssim,
                "mean_difference_hu": float(difference[mask].mean(dtype=np.float64)) * (window_hu[1] - window_hu[0]),
            }
        rows += [
            {"region": region, "metric": metric, "value": value, "note": notes.get(metric, "")}
            for metric, value in values.items()
        ]
    return rows


def seam_ratio(image: np.ndarray, reference: np.ndarray, layout: np.ndarray, same: np.ndarray) -> float:
    """The step across the layout's border, as a multiple of the reference's: above 1, the seam is visible.

    The step is the mean absolute difference between face neighbours of which one is labelled and the other open.

    Args:
        image: (x, y, z) in [0, 1].
        reference: same shape and range.
        layout: labels, same shape.
        same: bool, same shape; pairs with a voxel where it is false do not count.

    Returns:
        NaN if there is no such pair, or the reference has no step at all.
    """
    named = layout != Label.BACKGROUND
    of_image, of_reference = 0.0, 0.0
    for axis in range(3):
        low, high = (
            tuple(part if a == axis else slice(None) for a in range(3)) for part in (slice(-1), slice(1, None))
        )
        border = (named[low] != named[high]) & same[low] & same[high]
        of_image += np.abs(image[high][border] - image[low][border]).sum(dtype=np.float64)
        of_reference += np.abs(reference[high][border] - reference[low][border]).sum(dtype=np.float64)
    return float(of_image / of_reference) if of_reference else math.nan


def nodule_means(hu: np.ndarray, layout: np.ndarray) -> list[float]:
    """Mean HU of each nodule (component by all 26 neighbours).

    Args:
        hu: (x, y, z).
        layout: labels, same shape.
    """
    numbers, count = label(layout == Label.NODULE, generate_binary_structure(3, 3))
    return [float(value) for value in mean(hu, numbers, range(1, count + 1))] if count else []


def list_samples(sample_tables: list[Path]) -> pd.DataFrame:
    """The usable rows of a generator's case tables, in order, with the `folder` of each sample; each once, though
    doses share samples."""
    tables = []
    for path in sample_tables:
        table = cases.read_cases(path)
        table["folder"] = [cases.folder_of(path, row) for _, row in table.iterrows()]
        tables.append(table[table["status"] == "ok"])
    if not tables:
        return pd.DataFrame(columns=[*cases.COLUMNS, "folder"])
    return pd.concat(tables).drop_duplicates("case_id", ignore_index=True)


def reference_of(sample_folder: cases.CaseFolder) -> str | None:
    """Case id of a sample's reference; None for a sample of another system without one.

    Raises:
        InputError: it is not in `sample.json`.
    """
    origin, remedy = sample_folder.sample_record, "Delete the sample and synthesize it again."
    record = read_json(origin, remedy)
    if "reference_case_id" not in record:
        raise InputError(origin, "does not name its reference", remedy)
    return record["reference_case_id"]


def read_sample(sample_folder: cases.CaseFolder, cases_table: Path) -> Sample:
    """A synthetic case and the case it was made from.

    Raises:
        InputError: `sample.json` names no known reference, or the two CTs are on different grids.
    """
    name = reference_of(sample_folder)
    if name is None:
        return Sample(*sample_folder.read(), reference=None)
    table = cases.read_cases(cases_table)
    found = table[table["case_id"] == name]
    if found.empty:
        problem = f"names the reference {name}, which is not in {cases_table}"
        raise InputError(sample_folder.sample_record, problem, "Synthesize again.")
    synthetic, layout = sample_folder.read()
    reference = Reference(name, *cases.folder_of(cases_table, found.iloc[0]).read())
    if not synthetic.same_grid(reference.ct):
        raise InputError(sample_folder.path, f"is not on the grid of its reference {name}", "Synthesize it again.")
    return Sample(synthetic, layout, reference)


@dataclass(frozen=True)
class RealCase:
    """A real CT.

    Attributes:
        case_id: its name.
        patient_id: its patient.
        hu: (x, y, z) int16, clipped to the window.
        lungs: bool, same shape: labelled voxels, including nodules and vessels.
        nodules_hu: mean HU of each of its nodules.
        mean_hu: of each region, see `calibration.mean_hu`.
    """

    case_id: str
    patient_id: str
    hu: np.ndarray
    lungs: np.ndarray
    nodules_hu: list[float]
    mean_hu: dict[str, float]


def run_quality(config: Config, cases_table: Path, sample_tables: list[Path], generator: str, output: Path) -> None:
    """Measure the samples of a generator, individually and together, and the floors with them.

    Writes `output`, a CSV with `COLUMNS`, and next to it the table named by `sets_beside`, with `SET_COLUMNS`.

    Args:
        config: the run's config; `grid.window_hu` and `image_quality` are used.
        cases_table: `cases.tsv`, where the real cases are.
        sample_tables: the generator's case tables, one per shard.
        generator: its name.
        output: the CSV file to write.

    Raises:
        InputError: a file is missing or breaks the contract of a case, or the weights of the feature network do not
            fit.
    """
    # It imports torch, which is not needed for reading the results.
    from lungddpm.quality.medicalnet import load_extractor

    with waiting("reading the real cases"):
        extractor, window = load_extractor(config.image_quality.weights), config.grid.window_hu
        table, samples = cases.read_cases(cases_table), list_samples(sample_tables)
        training, references = (_read_real(cases_table, table, role, window) for role in (DISCOVERY, REFERENCE))
    rows = _judge_samples(cases_table, samples, training, window, f"image quality of {generator}")
    with waiting("distances between real cases"):
        rows += _nearest_of_real(training, references)
    sets = _distance_rows(cases_table, samples, training, references, window, extractor)
    sets += _training_rows(training, references)
    with waiting("diversity of the samples"):
        sets += _memorisation_rows(rows, len(training)) + _diversity_rows(samples, window) + _real_nodules_row(training)
    for path, found, columns in ((output, rows, COLUMNS), (sets_beside(output), sets, SET_COLUMNS)):
        write_table(path, pd.DataFrame([{"generator": generator, **row} for row in found], columns=columns))


def sets_beside(path: Path) -> Path:
    """The table of sets that belongs to a table of samples: `<name>-sets.csv` beside `<name>.csv`."""
    return path.with_name(f"{path.stem}-sets.csv")


def _read_real(cases_table: Path, table: pd.DataFrame, role: str, window: tuple[float, float]) -> list[RealCase]:
    found = []
    for _, row in cases.usable(table, role).iterrows():
        ct, layout = cases.folder_of(cases_table, row).read()
        labels, hu = layout.array, _clip(ct, window)
        measures = nodule_means(hu, labels), mean_hu(hu, labels)
        found.append(RealCase(row["case_id"], row["patient_id"], hu, labels != Label.BACKGROUND, *measures))
    return found


def _images_of(sample: Sample, window: tuple[float, float]) -> dict[str, np.ndarray]:
    """The sample, and the floors made from its reference, in HU."""
    images = {SYNTHETIC: _clip(sample.ct, window)}
    if sample.reference is not None:
        layout, reference = sample.layout.array, _clip(sample.reference.ct, window)
        same = layout == sample.reference.layout.array
        images[CONSTANT_LUNGS] = constant_lungs(reference, layout != Label.BACKGROUND)
        images[SHIFTED] = shifted_lungs(images[SYNTHETIC], reference, layout, same)
    return images


def _judge_samples(
    cases_table: Path, samples: pd.DataFrame, training: list[RealCase], window: tuple[float, float], what: str
) -> list[dict]:
    """Compare every sample and the floors with its reference, and their nearness to training cases."""
    rows, every_case = [], {case.case_id: case.hu for case in training}
    with Progress(what, len(samples)) as progress:
        for number, row in enumerate(samples.to_dict("records")):
            sample = read_sample(row["folder"], cases_table)
            images = _images_of(sample, window)
            found = _nearness_rows(sample, images, every_case, window)
            if others := [case.hu for case in training if case.patient_id != row["patient_id"]]:
                images[OTHER_PATIENTS] = others[number % len(others)]
            reference_id = ""
            if sample.reference is not None:
                reference_id = sample.reference.case_id
                images[COPIES] = sample.reference.ct.array
                found += _beside_reference(sample.layout.array, sample.reference, images, window)
            rows += [{"case_id": row["case_id"], "reference": reference_id, **one} for one in found]
            progress.advance()
    return rows


def _beside_reference(
    layout: np.ndarray, reference: Reference, images: dict[str, np.ndarray], window: tuple[float, float]
) -> list[dict]:
    own_layout = reference.layout.array
    masks, expected, rows = regions(layout, own_layout), unit_range(reference.ct.array, window), []
    for image, hu in images.items():
        values = unit_range(hu, window)
        ratio = seam_ratio(values, expected, layout, layout == own_layout)
        seam = {"region": SEAM, "metric": SEAM_RATIO, "value": ratio, "note": ""}
        rows += [{"image": image, **row} for row in [*compare_images(values, expected, masks, window), seam]]
    calibration = compare_hu(images[SYNTHETIC], _clip(reference.ct, window), layout, own_layout)
    return rows + [{"image": SYNTHETIC, **row} for row in calibration]


def _nearness_rows(
    sample: Sample, images: dict[str, np.ndarray], training: dict[str, np.ndarray], window: tuple[float, float]
) -> list[dict]:
    """Nearness to training cases of a sample and of constant lungs; without a value if most of its lungs are copied."""
    lungs = sample.layout.array != Label.BACKGROUND
    remembering = {image: hu for image, hu in images.items() if image != SHIFTED}
    rows = [{"image": image, **_nearest_row(hu, lungs, training)} for image, hu in remembering.items()]
    if sample.reference is not None:
        drawn = images[SYNTHETIC] != _clip(sample.reference.ct, window)
        if lungs.any() and drawn[lungs].mean() < _LEAST_DRAWN:
            rows[0] |= {"value": math.nan, "note": COPIED}
    return rows


def _nearest_row(hu: np.ndarray, lungs: np.ndarray, training: dict[str, np.ndarray]) -> dict:
    nearest, distance = nearest_case(hu, lungs, training) if training and lungs.any() else ("", math.nan)
    return {"region": LUNGS, "metric": NEAREST, "value": distance, "note": nearest}


def _nearest_of_real(training: list[RealCase], references: list[RealCase]) -> list[dict]:
    """The distance of real cases to the nearest training case of another patient."""
    rows = []
    for case in [*training, *references]:
        others = {other.case_id: other.hu for other in training if other.patient_id != case.patient_id}
        who = {"case_id": case.case_id, "reference": "", "image": OTHER_PATIENTS}
        rows.append(who | _nearest_row(case.hu, case.lungs, others))
    return rows


def _memorisation_rows(rows: list[dict], n_training: int) -> list[dict]:
    """Summary of these distances: of the samples, and of constant lungs, which contain no memorised texture."""
    nearness = pd.DataFrame(rows, columns=COLUMNS).query("metric == @NEAREST")
    found = nearness.dropna(subset="value")
    distances = {image: found.loc[found["image"] == image, "value"].to_numpy() for image in found["image"].unique()}
    if SYNTHETIC not in distances and COPIED in set(nearness["note"]):
        row = {"image": SYNTHETIC, "region": LUNGS, "n": 0, "n_real": n_training, "value": math.nan, "note": COPIED}
        unknown = [row | {"metric": metric} for metric in (MEDIAN_RATIO, SMALLEST_RATIO, N_NEARER)]
    else:
        unknown = []
    real, summary = distances.pop(OTHER_PATIENTS, np.array([])), []
    for image, of_image in distances.items():
        values = dict.fromkeys((MEDIAN_RATIO, SMALLEST_RATIO, N_NEARER), math.nan)
        notes = dict.fromkeys(values, "no two real cases of different patients")
        if len(real):
            signs = memorisation(of_image, real)
            values = {MEDIAN_RATIO: signs.ratio, SMALLEST_RATIO: signs.smallest_ratio, N_NEARER: signs.n_nearer}
            nearest = found[found["image"] == image].sort_values("value", kind="stable").iloc[0]
            # If samples and real cases were alike, each would be equally likely to be the nearest.
            by_chance = len(of_image) / (len(real) + 1)
            notes = {
                MEDIAN_RATIO: f"real: {np.median(real):.0f} HU",
                SMALLEST_RATIO: f"{nearest['case_id']} is {nearest['value']:.0f} HU from {nearest['note']}; "
                f"real: {real.min():.0f} HU",
                N_NEARER: f"real: {real.min():.0f} HU; by chance {by_chance:.2g}",
            }
        keys = {"image": image, "region": LUNGS, "n": len(of_image), "n_real": n_training}
        summary += [keys | {"metric": name, "value": value, "note": notes[name]} for name, value in values.items()]
    return unknown + summary


def _distance_rows(
    cases_table: Path, samples: pd.DataFrame, training: list[RealCase], references: list[RealCase],
    window: tuple[float, float], extractor: Extractor,
) -> list[dict]:  # fmt: skip
    """Distances of the samples and all floors to the references, in the features of a network."""
    with Progress(f"features by {extractor.name}", len(training) + len(references) + len(samples)) as progress:

        def features(hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
            values = unit_range(hu, window)
            found: np.ndarray = extractor.features([values, np.where(lungs, values, 0)])
            return found

        real, sets = ImageSet(), {image: ImageSet() for image in (SYNTHETIC, SHIFTED, CONSTANT_LUNGS, COPIES)}
        sets[OTHER_PATIENTS] = ImageSet()
        for to, of_role in ((real, references), (sets[OTHER_PATIENTS], training)):
            for case in of_role:
                to.add(features(case.hu, case.lungs), case.patient_id)
                progress.advance()
        of_reference = dict(zip((case.case_id for case in references), real.features, strict=True))
        for row in samples.to_dict("records"):
            sample = read_sample(row["folder"], cases_table)
            # A sample without a reference belongs to no patient.
            patient = row["case_id"] if sample.reference is None else row["patient_id"]
            for image, hu in _images_of(sample, window).items():
                sets[image].add(features(hu, sample.layout.array != Label.BACKGROUND), patient)
            if sample.reference is not None and sample.reference.case_id in of_reference:
                sets[COPIES].add(of_reference[sample.reference.case_id], patient)
            progress.advance()
    with waiting("FID, MMD, KID, precision, recall and AUC"):
        rows = distances_of_sets(sets, real, sets[OTHER_PATIENTS], (WHOLE, LUNGS))
    network = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256}
    return [row | network for row in rows]


def _training_rows(training: list[RealCase], references: list[RealCase]) -> list[dict]:
    """How much brighter the training cases are than the references, by region."""
    here, there = (pd.DataFrame([case.mean_hu for case in group]) for group in (training, references))
    if here.empty or there.empty:
        return []
    differences = here.mean() - there.mean()
    row = {"image": OTHER_PATIENTS, "metric": TRAINING, "n_real": len(there), "note": ""}
    return [row | {"region": region, "value": value, "n": len(here)} for region, value in differences.items()]


def _diversity_rows(samples: pd.DataFrame, window: tuple[float, float]) -> list[dict]:
    """Similarity of the samples of one layout: MS-SSIM over all pairs; in the nodules, also HU."""
    by_layout = defaultdict(list)
    for row in samples.to_dict("records"):
        by_layout[row["patient_id"], sha256_of(row["folder"].layout)].append(row["folder"])
    alike = [folders for folders in by_layout.values() if len(folders) > 1]
    note = "no two samples share a layout"
    pairs: dict[str, list[float]] = {WHOLE: [], LUNGS: []}
    nodules: list[NoduleDraws] = []
    for folders in alike:
        volumes = [folder.read() for folder in folders]
        layout = volumes[0][1].array
        lungs = layout != Label.BACKGROUND
        images = [unit_range(ct.array, window) for ct, _ in volumes]
        for region, values in pairwise_similarity(images, {WHOLE: np.ones_like(lungs), LUNGS: lungs}).items():
            pairs[region] += values
        nodules += compare_draws(images, layout == Label.NODULE)
        note = f"{plural(n_scales(lungs.shape), 'scale')}, {plural(len(alike), 'layout')}"
    rows = [
        {"region": region, "metric": PAIRWISE, "n": len(values), "note": note}
        | {"value": float(np.mean(values)) if values else math.nan}
        for region, values in pairs.items()
    ]
    of_nodules = f"{plural(len(nodules), 'nodule')}, {plural(len(alike), 'layout')}" if alike else note
    rows += _nodule_rows(nodules, window[1] - window[0], of_nodules)
    return [{"image": SYNTHETIC, "n_real": 0, **row} for row in rows]


def _nodule_rows(nodules: list[NoduleDraws], width_hu: float, note: str) -> list[dict]:
    """Diversity within nodules, over all of them; spreads are roots of mean variances."""
    spreads = {
        VOXEL_SD: [nodule.voxel_sd for nodule in nodules],
        MEAN_SD: [nodule.mean_sd for nodule in nodules],
    }
    rows = [
        {"metric": metric, "n": len(sds), "note": note}
        | {"value": width_hu * math.sqrt(np.square(sds).mean()) if sds else math.nan}
        for metric, sds in spreads.items()
    ]
    pairs = [value for nodule in nodules for value in nodule.similarities]
    if nodules:
        least, most = (pick(nodule.scales for nodule in nodules) for pick in (min, max))
        note = f"{plural(most, 'scale') if least == most else f'{least} to {most} scales'}, {note}"
    value = float(np.mean(pairs)) if pairs else math.nan
    rows.append({"metric": PAIRWISE, "value": value, "n": len(pairs), "note": note})
    return [{"region": NODULES, **row} for row in rows]


def _real_nodules_row(training: list[RealCase]) -> list[dict]:
    """Spread of the mean HU of real nodules: the value for draws that vary as much as real nodules."""
    found = [hu for case in training for hu in case.nodules_hu]
    sd = float(np.std(found, ddof=1)) if len(found) > 1 else math.nan
    note = f"{plural(len(found), 'real nodule')}, each of its own layout"
    row = {"image": OTHER_PATIENTS, "region": NODULES, "metric": MEAN_SD, "value": sd, "note": note}
    return [row | {"n": len(found), "n_real": len(training)}]


def _clip(volume: Volume, window: tuple[float, float]) -> np.ndarray:
    return np.rint(np.clip(volume.array, *window)).astype(np.int16)
