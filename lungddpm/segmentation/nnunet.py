"""The only adapter to nnU-Net: plan, train and predict one arm, without its command line and global settings.

<arm>/plan.json                               written last: the arm is planned and preprocessed
<arm>/nnUNet_preprocessed/, <arm>/nnUNet_results/seed<k>/    in nnU-Net's layout, usable with its own commands
                                              (nnUNet_extTrainer must point to the folder `trainers` next to this file)
A replicate with its own draw (see `lungddpm.arms.compose`) adds the samples of that draw to the preprocessed cases
when it is trained, and its `training.json` has its split; nnU-Net's splits_final.json has the shared cases.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from lungddpm.arms.compose import DATASET, draw_record, image_and_label
from lungddpm.config.models import Config, Network
from lungddpm.core.cases import read_cases, unchanged_folder_of, usable
from lungddpm.core.code import CodeFromStep, code_of_steps, stage_fingerprint
from lungddpm.core.device import log_device
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import (
    exclusive_lock,
    fingerprint,
    link_or_copy,
    read_json,
    seed_from,
    sha256_of,
    write_json,
)
from lungddpm.core.progress import LOG, Progress, shorten_paths, waiting
from lungddpm.core.roles import TEST
from lungddpm.core.volume import Volume, read_grid, write_volume

if TYPE_CHECKING:
    import torch
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

CONFIGURATION = "lungddpm"
PLANS = "nnUNetPlans"
TRAINER = "LungDDPMTrainer"
_FINAL = "checkpoint_final.pth"
_LOGS = "training_log_*.txt"
_LOGGED_EPOCH = re.compile(r"Epoch (\d+) \n(?:.*\n)?.*train_loss (-?\d+\.\d+), pseudo Dice (nan|\d+\.\d+)")
TRAINERS = Path(__file__).parent / "trainers"


def run_plan_segmenter(config: Config, arm_dir: Path, plans_from: Path | None = None, processes: int = 1) -> None:
    """Fingerprint, plan and preprocess an arm; with `plans_from`, take fingerprint and plans from that arm.

    Writes `plan.json` last; does nothing if that already describes this arm with this config.

    Args:
        config: `segmentation.network` and `segmentation.batch_size` define nnU-Net's configuration `lungddpm`.
        arm_dir: folder of a composed arm.
        plans_from: folder of the planned arm `real`, so that all arms train the same network on the same scale.
        processes: cases preprocessed at once.

    Raises:
        InputError: the arm is not composed, or `plans_from` is not planned.
    """
    settings = {"network": config.segmentation.network, "batch_size": config.segmentation.batch_size}
    origin = _read_plan(plans_from) if plans_from else None
    arm = _read_arm(arm_dir)
    state = fingerprint(
        {
            "arm": arm["fingerprint"],
            "settings": settings,
            "plans": origin["plans_sha256"] if origin else None,
            "nnunetv2": version("nnunetv2"),
            "code": stage_fingerprint("plan"),
        }
    )
    with exclusive_lock(arm_dir / ".lock", f"planning {arm_dir}"):
        marker = arm_dir / "plan.json"
        if marker.exists() and _read_plan(arm_dir)["fingerprint"] == state:
            LOG.info("%s is already planned and preprocessed", arm_dir)
            return
        marker.unlink(missing_ok=True)
        preprocessed = arm_dir / "nnUNet_preprocessed" / DATASET
        shutil.rmtree(preprocessed, ignore_errors=True)
        preprocessed.mkdir(parents=True)
        raw = arm_dir / "nnUNet_raw" / DATASET
        for name in ("dataset.json", "splits_final.json"):
            shutil.copyfile(raw / name, preprocessed / name)
        # nnU-Net's own validation looks for the true labels here.
        link_or_copy(raw / "labelsTr", preprocessed / "gt_segmentations")

        with _environment(arm_dir, processes), _quiet(arm_dir / "nnUNet_preprocessed" / "plan.log"):
            if plans_from is None:
                LOG.info("Arm %s: computing nnU-Net's fingerprint and plans", arm_dir.name)
                with waiting("measuring and planning"):
                    _plan(config, preprocessed, processes)
            else:
                for name in ("dataset_fingerprint.json", f"{PLANS}.json"):
                    shutil.copyfile(plans_from / "nnUNet_preprocessed" / DATASET / name, preprocessed / name)
            _preprocess(raw, preprocessed, processes)
        content = {
            "arm": arm["arm"],
            "arm_fingerprint": arm["fingerprint"],
            "plans_sha256": sha256_of(preprocessed / f"{PLANS}.json"),
            "nnunetv2": version("nnunetv2"),
        }
        write_json(marker, {**content, "fingerprint": state})


def small_configuration(planned: dict, transpose_forward: list[int], network: Network | None, batch_size: int) -> dict:
    """nnU-Net's configuration `lungddpm`: the planned `3d_fullres` with another patch, network and batch size.

    Args:
        planned: the configuration `3d_fullres` of the plans.
        transpose_forward: the plans' order of axes, relative to (z, y, x) as SimpleITK reads them.
        network: patch in (x, y, z) and features of each stage; None keeps nnU-Net's plan.
        batch_size: patches per optimizer step.
    """
    configuration = {"inherits_from": "3d_fullres", "batch_size": batch_size}
    if network is None:
        return configuration
    stages = len(network.features)
    architecture = planned["architecture"]
    kwargs = architecture["arch_kwargs"] | {
        "n_stages": stages,
        "features_per_stage": list(network.features),
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    patch_zyx = network.patch[::-1]
    return configuration | {
        "patch_size": [patch_zyx[axis] for axis in transpose_forward],
        "architecture": architecture | {"arch_kwargs": kwargs},
    }


def run_train_segmenter(
    config: Config, arm_dir: Path, fold: int, seed: int, device: str = "auto", processes: int = 1
) -> None:
    """Train one replicate of an arm for `segmentation.steps` optimizer steps, or resume a killed run.

    The random seed depends on the run's seed, the replicate's seed and the fold, not on the arm: replicates of
    different arms are pairs. A finished training with the same data and settings is kept. A different one is set
    aside until this one has saved, and resumes if it is requested again before that. Changed code does not end a
    training: `training.json` records which code version ran which steps.

    Args:
        config: the run's config.
        arm_dir: folder of a planned arm.
        fold: index into the arm's folds.
        seed: the replicate's seed.
        device: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda (the first visible one) or mps.
        processes: data loader processes on a GPU. On a CPU batches are made in the training process, which makes runs
            bit-identical.

    Raises:
        ConfigError: no such device.
        InputError: the arm is not planned in its present form, has no such fold, or lacks the replicate's draw.
    """
    chosen = _select_device(device)
    settings = _training_settings(config, arm_dir, fold, seed)
    folder = fold_folder(arm_dir, fold, seed)
    what = f"{arm_dir.name} fold {fold} seed {seed}"
    with exclusive_lock(results_folder(arm_dir, seed) / f".lock_fold{fold}", f"training {what}"):
        if _is_trained(folder, settings):
            LOG.info("%s is already trained", what)
            return
        aside = folder.with_name(f".{folder.name}-of-other-settings")
        _make_way(folder, aside, settings, what)
        loaders = 0 if chosen.type == "cpu" else processes
        with _environment(arm_dir, processes, seed, loaders), _quiet(folder / "console.log"):
            if draw := _read_draw(config, arm_dir, fold, seed):
                _preprocess_draw(arm_dir, draw)
            _train(arm_dir, folder, fold, settings, chosen, what)
        shutil.rmtree(aside, ignore_errors=True)


def run_predict(
    config: Config,
    arm_dir: Path,
    fold: int,
    seed: int,
    cases_table: Path,
    output: Path,
    device: str = "auto",
    processes: int = 1,
) -> None:
    """Segment every usable test case with a trained replicate, on the case's own grid.

    Writes `<case_id>.nii.gz` (uint8, 0 or 1) and `probability/<case_id>.nii.gz` (uint16, 65535 times the probability
    of nodule); files of other cases are removed from `output`.

    Args:
        config: the run's config.
        arm_dir: folder of a planned arm.
        fold: fold of the replicate.
        seed: seed of the replicate.
        cases_table: table of the real cases, with roles.
        output: folder for the masks.
        device: as for `run_train_segmenter`.
        processes: maximum number of threads of nnU-Net.

    Raises:
        ConfigError: no such device.
        InputError: the replicate is not trained on the present arm with the present config.
    """
    cases = usable(read_cases(cases_table), TEST)
    what = f"segmenting test cases, {arm_dir.name} fold {fold} seed {seed}"
    with (
        open_segmenter(config, arm_dir, fold, seed, device, processes) as segmenter,
        Progress(what, len(cases)) as progress,
    ):
        for _, case in cases.iterrows():
            mask, probability = segmenter.mask_and_probability(unchanged_folder_of(cases_table, case).ct)
            write_volume(output / "probability" / f"{case['case_id']}.nii.gz", probability)
            write_volume(output / f"{case['case_id']}.nii.gz", mask)
            progress.advance()
    expected = {f"{case_id}.nii.gz" for case_id in cases["case_id"]}
    for stale in [path for path in output.rglob("*.nii.gz") if path.name not in expected]:
        stale.unlink()


class Segmenter:
    """A trained replicate, ready to segment CTs."""

    def __init__(self, predictor: nnUNetPredictor, reader: BaseReaderWriter):
        self._predictor, self._reader = predictor, reader

    def mask(self, ct: Path) -> Volume:
        """The nodules of a CT: uint8, 0 or 1, on its own grid."""
        image, properties = self._reader.read_images([str(ct)])
        mask = self._predictor.predict_single_npy_array(image, properties)
        return _on_grid_of(ct, mask, np.uint8)

    def mask_and_probability(self, ct: Path) -> tuple[Volume, Volume]:
        """The nodules, and their probability: uint16, 65535 times the probability."""
        image, properties = self._reader.read_images([str(ct)])
        mask, probabilities = self._predictor.predict_single_npy_array(image, properties, None, None, True)
        # Channel 1 is the nodule. In 8 bits the most confident candidates, which a FROC ranks first, would all be 255.
        return _on_grid_of(ct, mask, np.uint8), _on_grid_of(ct, np.rint(65535 * probabilities[1]), np.uint16)


def _on_grid_of(ct: Path, array_zyx: np.ndarray, kind: type[np.generic]) -> Volume:
    """An array of nnU-Net's, which are (z, y, x), as a volume."""
    return read_grid(ct).like(array_zyx.T.astype(kind))


@contextlib.contextmanager
def open_segmenter(
    config: Config, arm_dir: Path, fold: int, seed: int, device: str = "auto", processes: int = 1
) -> Iterator[Segmenter]:
    """A trained replicate of an arm, loaded once for all segmentations within the block.

    Args:
        config: the run's config.
        arm_dir: folder of a planned arm.
        fold: fold of the replicate.
        seed: seed of the replicate.
        device: as for `run_train_segmenter`.
        processes: maximum number of threads of nnU-Net.

    Raises:
        ConfigError: no such device.
        InputError: the replicate is not trained on the present arm with the present config.
    """
    chosen = _select_device(device)
    folder = fold_folder(arm_dir, fold, seed)
    if not _is_trained(folder, _training_settings(config, arm_dir, fold, seed)):
        raise InputError(
            folder, "has no finished training of this arm with this config", "Run 'lungddpm segment train' first."
        )
    with _environment(arm_dir, processes, seed), _quiet(folder / "console.log"):
        with waiting("loading nnU-Net"):
            segmenter = Segmenter(*_predictor(arm_dir, folder, chosen, config.segmentation.test_time_mirroring))
        yield segmenter


def results_folder(arm_dir: Path, seed: int | str) -> Path:
    """The folder passed to nnU-Net as `nnUNet_results` for one seed."""
    return arm_dir / "nnUNet_results" / f"seed{seed}"


def fold_folder(arm_dir: Path, fold: int | str, seed: int | str) -> Path:
    """nnU-Net's folder for the checkpoints of one replicate."""
    return results_folder(arm_dir, seed) / DATASET / f"{TRAINER}__{PLANS}__{CONFIGURATION}" / f"fold_{fold}"


def weights_file(arm_dir: Path, fold: int | str, seed: int | str) -> Path:
    """The file that nnU-Net writes at the end of a replicate's training; fold and seed may be wildcards of a rule."""
    return fold_folder(arm_dir, fold, seed) / _FINAL


def segmenter_curve(arm_dir: Path, fold: int, seed: int, save_every: int) -> list[tuple[int, float, float]]:
    """Optimizer step, mean training loss (nnU-Net's: cross-entropy minus soft Dice) and Dice of the validation patches
    (NaN if they have no nodule) at every saved state of a replicate, from nnU-Net's logs; empty if there are
    none."""
    logged = {}
    logs = fold_folder(arm_dir, fold, seed).glob(_LOGS)
    # Their names have the date as numbers without zeros in front.
    for log in sorted(logs, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)]):
        # A resumed training repeats the steps that it had not saved.
        for epoch, loss, dice in _LOGGED_EPOCH.findall(log.read_text(encoding="utf-8")):
            logged[int(epoch)] = float(loss), float(dice)
    return [((epoch + 1) * save_every, *values) for epoch, values in sorted(logged.items())]


def _select_device(device: str) -> torch.device:
    """See `core.torch_device.select_device`; rejects GPUs other than the first, which nnU-Net always uses."""
    from lungddpm.core.torch_device import device_name, select_device

    chosen = select_device(device)
    if chosen.index:
        raise ConfigError(
            "device", "nnU-Net only uses the first visible GPU", f"Use cuda, with CUDA_VISIBLE_DEVICES={chosen.index}."
        )
    log_device(str(chosen), device_name(chosen))
    return chosen


def _plan(config: Config, preprocessed: Path, processes: int) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    extractor = DatasetFingerprintExtractor(DATASET, processes)
    extractor.show_progress_bar = False
    extractor.run()
    plans = ExperimentPlanner(DATASET).plan_experiment()
    plans["configurations"][CONFIGURATION] = small_configuration(
        plans["configurations"]["3d_fullres"],
        plans["transpose_forward"],
        config.segmentation.network,
        config.segmentation.batch_size,
    )
    write_json(preprocessed / f"{PLANS}.json", plans)


def _preprocess(raw: Path, preprocessed: Path, processes: int) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    plans = PlansManager(str(preprocessed / f"{PLANS}.json"))
    configuration = plans.get_configuration(CONFIGURATION)
    preprocessor = configuration.preprocessor_class(verbose=False)
    if processes > 1:
        preprocessor.show_progress_bar = False
        with waiting("preprocessing training cases"):
            preprocessor.run(DATASET, CONFIGURATION, PLANS, processes)
        return
    # nnU-Net's own loop always starts a process, which takes seconds per arm.
    dataset_json = read_json(preprocessed / "dataset.json")
    target = preprocessed / configuration.data_identifier
    target.mkdir()
    dataset = get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    with Progress("preprocessing training cases", len(dataset)) as progress:
        for name, files in dataset.items():
            preprocessor.run_case_save(
                str(target / name), files["images"], files["label"], plans, configuration, dataset_json
            )
            progress.advance()


def _preprocess_draw(arm_dir: Path, draw: dict[str, Any]) -> None:
    """Preprocess the samples of one replicate's draw, next to the cases that all replicates share.

    Always: samples that were made again have the same names as before.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    preprocessed = arm_dir / "nnUNet_preprocessed" / DATASET
    plans = PlansManager(str(preprocessed / f"{PLANS}.json"))
    configuration = plans.get_configuration(CONFIGURATION)
    preprocessor = configuration.preprocessor_class(verbose=False)
    target, dataset_json = preprocessed / configuration.data_identifier, read_json(preprocessed / "dataset.json")
    raw = draw_record(arm_dir, draw["replicate"]).parent
    with Progress(f"preprocessing the draw of {draw['replicate']}", len(draw["cases"])) as progress:
        for case in draw["cases"]:
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):  # of a killed training: blosc2 does not overwrite files
                (target / f"{case['name']}{ending}").unlink(missing_ok=True)
            image, label = (str(raw / file) for file in image_and_label(case["name"]))
            preprocessor.run_case_save(str(target / case["name"]), [image], label, plans, configuration, dataset_json)
            progress.advance()


def _make_way(folder: Path, aside: Path, settings: dict, what: str) -> None:
    """Set a training with other data or settings aside until the new one has saved, or restore the wanted one.

    Args:
        folder: of the training.
        aside: temporary place of one with other settings.
        settings: of the wanted training.
        what: its name, for messages.
    """
    before = _settings_of(folder)
    if not before or before["fingerprint"] == settings["fingerprint"]:
        if _has_states(folder):
            shutil.rmtree(aside, ignore_errors=True)
    elif _has_states(folder):
        LOG.info("%s: data, plans or settings have changed: the old training is discarded when this one is saved", what)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    else:
        shutil.rmtree(folder)
        if _settings_of(aside).get("fingerprint") == settings["fingerprint"]:
            aside.rename(folder)


def _has_states(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoint_latest.pth", "checkpoint_final.pth"))


def _train(arm_dir: Path, folder: Path, fold: int, settings: dict, device: torch.device, what: str) -> None:
    with waiting("loading nnU-Net"):
        import torch

        from lungddpm.segmentation.trainers.lungddpm_trainer import LungDDPMTrainer

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    latest = _latest_state(folder)
    if latest is None:  # an earlier start that saved nothing logged other steps
        for log in folder.glob(_LOGS):
            log.unlink()
    before: list[CodeFromStep] = _settings_of(folder).get("code", []) if latest else []
    write_json(folder / "training.json", settings | {"code": before})
    preprocessed = arm_dir.resolve() / "nnUNet_preprocessed" / DATASET
    plans, dataset_json = (read_json(preprocessed / name) for name in (f"{PLANS}.json", "dataset.json"))
    trainer = LungDDPMTrainer(
        plans=plans | {"continue_training": latest is not None},
        configuration=CONFIGURATION,
        fold=fold,
        dataset_json=dataset_json,
        device=device,
    )
    if latest is not None:
        trainer.load_checkpoint(str(latest))
        LOG.info("%s resumes after epoch %d of %d", what, trainer.current_epoch, trainer.num_epochs)
    steps = trainer.num_iterations_per_epoch
    code = stage_fingerprint("train_segmenter")
    held = code_of_steps(before, trainer.current_epoch * steps, code, "delete its folder fold_<number>")
    write_json(folder / "training.json", settings | {"code": held})
    with (
        Progress(f"training {what}", trainer.num_epochs * steps, trainer.current_epoch * steps) as trainer.progress,
        _sigterm_as_exit(what),
    ):
        trainer.run_training()


@contextlib.contextmanager
def _sigterm_as_exit(what: str) -> Iterator[None]:
    """Within the block SIGTERM, which clusters send before the time limit, ends the process and its loaders cleanly.

    nnU-Net saves every few hundred steps, which may take longer than a cluster waits: unsaved steps are repeated.
    """

    def end(*_: object) -> None:
        LOG.warning("%s: stopped by SIGTERM: the same command resumes from the last saved state", what)
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _latest_state(folder: Path) -> Path | None:
    """The last saved state of a training under way; None if there is none, or a damaged one, which is removed."""
    path = folder / "checkpoint_latest.pth"
    if not path.exists():
        return None
    try:
        _read_checkpoint(path)
    except InputError as error:
        LOG.warning("%s: %s: training restarts", path, error.problem)
        path.unlink()
        return None
    return path


def _read_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU. nnU-Net, which resumes from its path, would run code in it: that is rejected here.

    Raises:
        InputError: it is missing, truncated or otherwise damaged, or contains code.
    """
    from lungddpm.core.torch_files import load_checked

    try:
        return load_checked(path)
    except ValueError as error:
        raise InputError(path, str(error), "Delete it and run again.") from None


def _predictor(
    arm_dir: Path, folder: Path, device: torch.device, mirroring: bool
) -> tuple[nnUNetPredictor, BaseReaderWriter]:
    """nnU-Net's predictor with the replicate's last weights, and the reader of its images."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from lungddpm.segmentation.network import suit_to_device
    from lungddpm.segmentation.prediction import CpuPredictor, nnUNetPredictor

    preprocessed = arm_dir / "nnUNet_preprocessed" / DATASET
    plans = PlansManager(str(preprocessed / f"{PLANS}.json"))
    configuration = plans.get_configuration(CONFIGURATION)
    dataset_json = read_json(preprocessed / "dataset.json")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        input_channels=1,
        output_channels=2,
        deep_supervision=False,
    )
    checkpoint = _read_checkpoint(folder / _FINAL)
    suit_to_device(network, device)
    kind = CpuPredictor if device.type == "cpu" else nnUNetPredictor
    predictor = kind(use_mirroring=mirroring, device=device, allow_tqdm=False)
    predictor.manual_initialization(
        network,
        plans,
        configuration,
        [checkpoint["network_weights"]],
        dataset_json,
        TRAINER,
        checkpoint["inference_allowed_mirroring_axes"],
    )
    return predictor, plans.image_reader_writer_class()


def _read_arm(arm_dir: Path) -> dict[str, Any]:
    return read_json(arm_dir / "arm.json", "Run 'lungddpm compose' for this arm first.")


def _read_draw(config: Config, arm_dir: Path, fold: int, seed: int) -> dict[str, Any]:
    """The training cases of one replicate only; empty if it shares all its cases.

    Raises:
        InputError: the draw was not composed, or for an earlier form of the arm.
    """
    arm = _read_arm(arm_dir)
    if not arm["own_draws"]:
        return {}
    replicate = config.segmentation.replicate_name(fold, seed)
    remedy = f"Run 'lungddpm compose --arm {arm['arm']} --replicate {replicate}' first."
    path = draw_record(arm_dir, replicate)
    draw = read_json(path, remedy)
    if draw["arm_fingerprint"] != arm["fingerprint"]:
        raise InputError(path, "was composed for an earlier form of the arm", remedy)
    return draw


def _read_plan(arm_dir: Path) -> dict[str, Any]:
    return read_json(arm_dir / "plan.json", "Run 'lungddpm segment plan' for this arm first.")


def _training_settings(config: Config, arm_dir: Path, fold: int, seed: int) -> dict:
    """Everything that determines a replicate's weights, with a fingerprint; read by `LungDDPMTrainer`.

    Of an arm's cases, only those used by this replicate for training and validation count.

    Raises:
        InputError: the arm is not planned, was composed again since, has no such fold, or lacks the replicate's draw.
    """
    plan, arm = _read_plan(arm_dir), _read_arm(arm_dir)
    if plan["arm_fingerprint"] != arm["fingerprint"]:
        raise InputError(arm_dir, "was composed again after it was planned", "Run 'lungddpm segment plan' again.")
    if fold >= (n_folds := len(arm["folds"])):
        raise InputError(arm_dir, f"has {n_folds} folds, from 0, but not fold {fold}", "Train one of them.")
    options = config.segmentation
    drawn = _read_draw(config, arm_dir, fold, seed).get("cases", [])
    split = {"train": arm["folds"][fold]["train"] + [case["name"] for case in drawn], "val": arm["folds"][fold]["val"]}
    hashes = {case["name"]: case["sha256"] for case in [*arm["cases"], *drawn]}
    settings = {
        "steps": options.steps,
        "save_every": options.save_every,
        "optimizer": options.optimizer,
        "learning_rate": options.learning_rate,
        "foreground_prior": options.foreground_prior,
        "augmentation": options.augmentation,
        "seed": seed_from(config.seed, seed, fold),
        "split": split,
        "cases": fingerprint([[hashes[name] for name in names] for names in split.values()]),
        # Not the code of planning: a training under way survives its change.
        "plan": {key: plan[key] for key in ("plans_sha256", "nnunetv2")},
    }
    return settings | {"fingerprint": fingerprint(settings)}


def _is_trained(folder: Path, settings: dict) -> bool:
    return _settings_of(folder).get("fingerprint") == settings["fingerprint"] and (folder / _FINAL).exists()


def _settings_of(folder: Path) -> dict:
    """The settings of the training in a fold's folder; empty if there is none."""
    path = folder / "training.json"
    return read_json(path) if path.exists() else {}


@contextlib.contextmanager
def _environment(arm_dir: Path, processes: int, seed: int | None = None, loaders: int = 1) -> Iterator[None]:
    """nnU-Net's environment variables for one arm (and seed), set before its modules are loaded and then restored."""
    arm_dir = arm_dir.resolve()
    values = {
        "nnUNet_raw": arm_dir / "nnUNet_raw",
        "nnUNet_preprocessed": arm_dir / "nnUNet_preprocessed",
        "nnUNet_results": results_folder(arm_dir, seed) if seed is not None else arm_dir / "nnUNet_results",
        "nnUNet_extTrainer": TRAINERS,
        "nnUNet_def_n_proc": processes,
        "nnUNet_n_proc_DA": loaders,
        "nnUNet_compile": "f",
    }
    before = {name: os.environ.get(name) for name in values}
    # Compiling needs a C compiler and is not reproducible, so it is only on if the user sets the variable.
    values["nnUNet_compile"] = before["nnUNet_compile"] or values["nnUNet_compile"]
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet(log_file: Path) -> Iterator[None]:
    """Redirect nnU-Net's output from the terminal to a file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(_ShortenedPaths(log)):
        yield


class _ShortenedPaths(io.TextIOBase):
    """A text file without absolute paths (see `shorten_paths`)."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        """Write immediately, so that a killed run leaves its complete output."""
        self._file.write(shorten_paths(text))
        self._file.flush()
        return len(text)
