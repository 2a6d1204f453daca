"""Find files of a finished run that have changed, and have the run make them again.

results/SHA256SUMS      hashes of what the run computed, in the format of `sha256sum --check`
results/manifest.json   hashes of the output of `lungddpm report` (see `report.page`)
results/.damaged        outputs of the workflow that `lungddpm run` must make again, one per line
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lungddpm.config.loading import load_config
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import read_json, sha256_of, write_text
from lungddpm.core.progress import LOG, Progress

if TYPE_CHECKING:
    from lungddpm.config.models import Config

SUMS, MANIFEST, CONFIG = "SHA256SUMS", "manifest.json", "config.json"
_TO_MAKE_AGAIN = ".damaged"
# The stages' folders, without what only a training under way, or the next run, needs.
_SUMMED = re.compile(
    r"(source|cases|qc|models|synthetic|arms|filter|segmentation|quality|label_fidelity)/"
    r"(?!index(\.[^/]+)?\.cache\.json$|[^/]+/[^/]+/[^/]+/(state|cache|tensorboard)/"
    r"|[^/]+/nnUNet_results/(?!.*checkpoint_final\.pth$)|(.*/)?\.|.*\.log$)"
)
_REPLICATE = re.compile(r"fold\d+_seed\d+")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Damage:
    """A file that is missing or has changed since it was written.

    Attributes:
        file: relative to the results folder.
        problem: "is missing" or "has changed".
        outputs: the workflow outputs that make it, also relative: the file is made again with these.
    """

    file: PurePosixPath
    problem: str
    outputs: tuple[PurePosixPath, ...]


def run_checksums(results: Path) -> None:
    """Write `SHA256SUMS`: the hashes of all files written below `results` by the stages before the report."""
    names = sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if _is_file(path))
    summed = [name for name in names if _SUMMED.match(name)]
    with Progress("checksums", len(summed)) as progress:
        lines = []
        for name in summed:
            lines.append(f"{sha256_of(results / name)}  {name}\n")
            progress.advance()
    write_text(results / SUMS, "".join(lines))


def run_verify(results: Path, repair: bool) -> list[Damage]:
    """Compare the files of a finished run with its hashes, and report which differ.

    Args:
        results: a run's folder.
        repair: delete damaged files, and have `lungddpm run` make them again. All others are kept, also those that no
            stage of this run makes, such as a user's own or those of a former arm: they get new hashes.

    Returns:
        The damaged files, in order of name.

    Raises:
        InputError: the run has not finished, or the lists of hashes are themselves damaged.
    """
    found = list(find_damage(results))
    for damage in found:
        LOG.warning("%s %s", results / damage.file, damage.problem)
    if repair and found:
        outputs = {output.as_posix() for damage in found for output in damage.outputs}
        if kept := [damage for damage in found if not damage.outputs]:
            LOG.warning("Made by no stage of this run, and kept: %s", ", ".join(str(damage.file) for damage in kept))
            outputs.add(SUMS)
        write_text(results / _TO_MAKE_AGAIN, "".join(f"{output}\n" for output in sorted(outputs)))
        for name in {*outputs, *(damage.file.as_posix() for damage in found if damage.outputs)}:
            path = results / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found


def outputs_to_make_again(results: Path) -> list[str]:
    """Files that `run_verify` deleted and no run has made since, by their name below the results folder.

    Snakemake alone would not look for them: it does not need the inputs of a finished run.
    """
    path = results / _TO_MAKE_AGAIN
    listed = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    missing = [name for name in listed if not (results / name).exists()]
    if listed and not missing:
        path.unlink()
    return missing


def find_damage(results: Path) -> Iterator[Damage]:
    """The damaged files of a finished run, in order of name; see `run_verify`."""
    recorded, config = _recorded(results), _config_of(results)
    with Progress("verifying", len(recorded)) as progress:
        for name, wanted in sorted(recorded.items()):
            path, file = results / name, PurePosixPath(name)
            if not path.is_file():
                yield Damage(file, "is missing", tuple(_outputs(results, file, config)))
            elif sha256_of(path) != wanted:
                yield Damage(file, "has changed", tuple(_outputs(results, file, config)))
            progress.advance()


def _config_of(results: Path) -> Config:
    try:
        return load_config(results / CONFIG, needs_source=False)
    except ConfigError as error:
        remedy = "Run 'lungddpm run' (again), which writes it."
        raise InputError(results / CONFIG, f"cannot be read ({error.problem})", remedy) from None


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _recorded(results: Path) -> dict[str, str]:
    """The hash of every listed file, by its name below the results folder."""
    remedy = "Run 'lungddpm run' (again), which writes it at the end."
    recorded = {}
    try:
        text = (results / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(results / SUMS, "does not exist", remedy) from None
    for line in text.splitlines():
        if (parts := _LINE.fullmatch(line)) is None:
            raise InputError(results / SUMS, f"has a line that is not a checksum: {line[:80]}", f"Delete it; {remedy}")
        recorded[parts[2]] = parts[1]
    manifest = read_json(results / MANIFEST, f"Delete it; {remedy}")
    try:
        return recorded | manifest["sha256"]
    except (KeyError, TypeError):
        raise InputError(results / MANIFEST, "has no hashes", f"Delete it; {remedy}") from None


def _outputs(results: Path, file: PurePosixPath, config: Config) -> list[PurePosixPath]:
    """The workflow outputs that make a file: itself, unless a stage writes it next to its output; none where no rule
    makes it for this config, for which Snakemake would refuse to run."""
    # Like the config, it reads the modules of all generators; `lungddpm run` must start without them.
    from lungddpm.segmentation.nnunet import weights_file

    match file.parts:
        case ("arms" | "filter" | "label_fidelity" | "segmentation" | "synthetic", *names) if _is_of_another_replicate(
            names, config
        ):
            return []
        case ("arms" | "filter" | "segmentation", arm, *_) if arm not in config.arms.names():
            return []
        case ("models" | "synthetic", generator, *_) if generator not in _generators(config):
            return []
        case ("quality", name) if re.sub(r"(-sets)?\.csv$", "", name) not in config.arms.largest_doses():
            return []
        case ("source", *_):
            return [PurePosixPath("source/.complete")] if config.source.is_simulated else []
        case ("cases", "index.tsv" | "cases.tsv" | "nodules.tsv") | ("quality", _) | ("report.html",):
            return [file]
        case ("cases", name) if re.fullmatch(r"cases-\d+\.tsv", name):
            return [file]
        case ("cases", case, _):
            return _tables_that_list(case, results, "cases/cases-*.tsv")
        case ("synthetic", _, _, name) if re.fullmatch(r"samples-.+-\d+\.tsv", name):
            return [file]
        case ("synthetic", generator, cohort, sample, _):
            return _tables_that_list(sample, results, f"synthetic/{generator}/{cohort}/samples-*.tsv")
        case ("models", generator, run, training, _, *_):
            return [PurePosixPath("models", generator, run, training, "model.safetensors")]
        case ("arms", arm, "draws", replicate, _, *_):
            return [PurePosixPath("arms", arm, "draws", replicate, "draw.json")]
        case ("arms", arm, "nnUNet_raw", *_):
            return [PurePosixPath("arms", arm, "arm.json")]
        case ("arms", arm, "nnUNet_preprocessed", *_):
            return [PurePosixPath("arms", arm, "plan.json")]
        case ("arms", _, "arm.json" | "plan.json"):
            return [file]
        case ("arms", arm, "nnUNet_results", *_):
            folds, seeds = config.segmentation.folds, config.segmentation.seeds
            made = {PurePosixPath(weights_file(Path("arms", arm), fold, seed)) for fold in folds for seed in seeds}
            return [file] if file in made else []
        case ("filter", arm, replicate, _):
            return [PurePosixPath("filter", arm, replicate, "filter.json")]
        case ("segmentation", arm, replicate, "predictions", *_):
            return [PurePosixPath("segmentation", arm, replicate, "predictions")]
        case ("segmentation", _, _, "metrics.csv" | "lesions.csv" | "candidates.csv" | "evaluation.json"):
            return [file]
        case ("label_fidelity", _, "metrics.csv" | "lesions.csv"):
            return [file]
        case ("qc", *_):
            return [PurePosixPath("qc/index.html")]
        case ("tables" | "figures", *_):
            return [PurePosixPath(MANIFEST)]
        case _:
            return []


def _is_of_another_replicate(names: Sequence[str], config: Config) -> bool:
    """Whether a folder or file has the name of a replicate that the config does not have (any more)."""
    named = {found[0] for name in names if (found := _REPLICATE.search(name))}
    return not named <= {*config.segmentation.replicates()}


def _generators(config: Config) -> list[str]:
    """Those with a folder of weights or samples."""
    return [*config.generators_in_use(), *config.arms.external]


def _tables_that_list(case: str, results: Path, pattern: str) -> list[PurePosixPath]:
    return [PurePosixPath(table.relative_to(results)) for table in sorted(results.glob(pattern)) if _lists(table, case)]


def _lists(table: Path, case: str) -> bool:
    try:
        return case in set(read_cases(table)["path"])
    except InputError:  # itself damaged: it may have listed the case
        return True
