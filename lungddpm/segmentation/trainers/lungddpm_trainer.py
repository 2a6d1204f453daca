"""The trainer that nnU-Net runs. nnU-Net imports every module in this folder: keep only trainers here."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from lungddpm.core.files import atomic_path, read_json, seed_from
from lungddpm.core.progress import Progress, shorten_paths
from lungddpm.segmentation.network import start_at_prior, suit_to_device

SETTINGS_FILE = "training.json"


class LungDDPMTrainer(nnUNetTrainer):
    """nnU-Net's trainer for a fixed number of optimizer steps, reproducible and resumable.

    The settings (`steps`, `save_every`, `optimizer`, `learning_rate`, `foreground_prior`, `augmentation`, `seed`,
    `split`) are read from `training.json` in the fold's result folder; without that file it trains like nnU-Net. On a
    CPU with the loader in the process (`nnUNet_n_proc_DA=0`), equal settings give equal weights, and so does a run that
    was killed and resumed.
    """

    initial_lr: float
    num_iterations_per_epoch: int

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        settings_file = Path(self.output_folder) / SETTINGS_FILE
        settings: dict[str, Any] = read_json(settings_file) if settings_file.exists() else {}
        self.seed = settings.get("seed", 0)
        self.split: dict[str, list[str]] | None = settings.get("split")
        self.optimizer_name = settings.get("optimizer", "sgd")
        self.initial_lr = settings.get("learning_rate", self.initial_lr)
        self.foreground_prior: float | None = settings.get("foreground_prior")
        self.augmentation: str = settings.get("augmentation", "nnunet")
        self.num_iterations_per_epoch = settings.get("save_every", self.num_iterations_per_epoch)
        self.num_epochs = settings.get("steps", 1000 * self.num_iterations_per_epoch) // self.num_iterations_per_epoch
        # As many as nnU-Net's 50 per 250. They only give a curve: the last weights are always used.
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)
        self.save_every = 1
        # nnU-Net gives the coarsest output zero weight; with two stages there is no other auxiliary output.
        self.enable_deep_supervision = len(self.configuration_manager.pool_op_kernel_sizes) > 2
        self.progress: Progress | None = None

    def initialize(self) -> None:
        """Build network, optimizer and loss from the seed."""
        self._seed_all("start")
        super().initialize()
        if self.foreground_prior is not None:
            start_at_prior(self.network, self.foreground_prior)
        suit_to_device(self.network, self.device)

    def do_split(self) -> tuple[list[str], list[str]]:
        """The cases of this replicate, which may have its own samples; otherwise those of nnU-Net's
        splits_final.json."""
        if self.split is None:
            train, val = super().do_split()
            return train, val
        return self.split["train"], self.split["val"]

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """nnU-Net's SGD, or AdamW, which learns within hundreds of steps."""
        if self.optimizer_name == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(  # noqa: N802 (nnU-Net's name)
        self,
    ) -> tuple[Any, bool, Any, tuple[int, ...] | None]:
        """nnU-Net's larger patches are for rotation and scaling only; a network that has never seen a mirrored image
        does not predict mirrored copies either."""
        rotation, as_2d, initial_patch, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.augmentation != "nnunet":
            initial_patch = self.configuration_manager.patch_size
        if self.augmentation == "none":
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, as_2d, initial_patch, axes

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's augmentation or part of it, with a blur that does not choose its algorithm by timing."""
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        if self.augmentation != "nnunet":
            transforms.transforms = [
                transform
                for transform in transforms.transforms
                # nnU-Net changes intensity and resolution with a probability each.
                if not isinstance(transform, SpatialTransform | RandomTransform)
            ]
        for transform in transforms.transforms:
            if isinstance(transform, RandomTransform) and isinstance(transform.transform, GaussianBlurTransform):
                transform.transform.benchmark = False
        return transforms

    def on_train_epoch_start(self) -> None:
        """Seed the random numbers from seed and epoch alone, so that a resumed run equals an uninterrupted one."""
        self._seed_all(self.current_epoch)
        self.step_in_epoch = 0
        super().on_train_epoch_start()

    def on_validation_epoch_start(self) -> None:
        """Draw the same patches every time, so that the curve shows what the network learned between them."""
        self._seed_all("validation")
        super().on_validation_epoch_start()

    def train_step(self, batch: dict) -> dict:
        """One optimizer step; the learning rate decays by the step, not by the epoch."""
        self.lr_scheduler.step(self.current_epoch + self.step_in_epoch / self.num_iterations_per_epoch)
        self.step_in_epoch += 1
        outputs = super().train_step(batch)
        if self.progress is not None:
            self.progress.advance()
        return outputs

    def on_epoch_end(self) -> None:
        """Log and save; nnU-Net's best-so-far checkpoint and its plot of each epoch (seconds) are left out."""
        loss = float(self.logger.get_value("train_losses", step=-1))
        pseudo_dice = float(self.logger.get_value("mean_fg_dice", step=-1))
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        self.print_to_log_file(f"train_loss {loss:.4f}, pseudo Dice {pseudo_dice:.4f}")
        if self.progress is not None:
            self.progress.note(loss=loss, pseudo_dice=pseudo_dice)
        if self.current_epoch + 1 < self.num_epochs:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        """Save atomically: a killed run leaves the last complete checkpoint."""
        with atomic_path(Path(filename)) as temporary, temporary.open("wb") as file:
            # nnU-Net passes it to torch.save, which reports a full disk if we open the file.
            super().save_checkpoint(file)

    def print_to_log_file(self, *args: object, also_print_to_console: bool = False, add_timestamp: bool = True) -> None:
        """Write to nnU-Net's own log file, without absolute paths, never to the terminal."""
        shortened = [shorten_paths(str(arg)) for arg in args]
        super().print_to_log_file(*shortened, also_print_to_console=False, add_timestamp=add_timestamp)

    def plot_network_architecture(self) -> None:
        """Left out: it needs an unmaintained library."""

    def _save_debug_information(self) -> None:
        """Left out: it records the host name and absolute paths."""

    def _seed_all(self, moment: int | str) -> None:
        seed = seed_from(self.seed, moment)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
