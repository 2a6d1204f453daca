"""nnU-Net behind its adapter, on bright balls that a small network learns in a minute of steps."""

import json
import logging
import os
import signal
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lungddpm.arms.compose import DATASET, run_compose, run_compose_draw
from lungddpm.config.loading import parse_config
from lungddpm.config.models import Network
from lungddpm.core.cases import CaseFolder, read_cases, usable, write_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import read_volume
from lungddpm.segmentation import nnunet
from lungddpm.segmentation.network import start_at_prior
from lungddpm.segmentation.trainers.lungddpm_trainer import LungDDPMTrainer

MIXED = "real+lung_ddpm@0.5"


def configured(**segmentation):
    settings = {
        "network": {"patch": [16, 32, 16], "features": [8, 16, 32]},
        "steps": 100,
        "save_every": 25,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "test_time_mirroring": False,
        "n_folds": 2,
        "folds": [0],
    }
    return parse_config({"segmentation": settings | segmentation, "synthesis": {"draw_per_replicate": False}})


CONFIG = configured()
SHORT = configured(steps=8, save_every=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_blob_case) -> Path:
    """A run's folder with two composed and planned arms."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    roles = ["discovery"] * 4 + ["reference"] + ["test"] * 2
    rows = [write_blob_case(root / "cases" / f"P{i}", f"P{i}", role) for i, role in enumerate(roles)]
    write_cases(root / "cases" / "cases.tsv", rows)
    rows = [
        write_blob_case(root / "synthetic" / f"s{i}", "P4", source="lung_ddpm", reference_case_id="P4") for i in (0, 1)
    ]
    write_cases(root / "synthetic" / "samples.tsv", rows)
    for arm in ("real", MIXED):
        run_compose(
            CONFIG, arm, root / "cases" / "cases.tsv", [root / "synthetic" / "samples.tsv"], root / "arms" / arm
        )
    nnunet.run_plan_segmenter(CONFIG, root / "arms" / "real")
    nnunet.run_plan_segmenter(CONFIG, root / "arms" / MIXED, root / "arms" / "real")
    return root


def checkpoint(arm: Path, name: str = "checkpoint_final.pth") -> dict:
    return torch.load(nnunet.fold_folder(arm, 0, 0) / name, weights_only=False)


def test_the_patch_follows_nnunets_order_of_axes():
    planned = {"architecture": {"network_class_name": "unet", "arch_kwargs": {"conv_op": "conv3d"}}}
    network = Network(patch=(16, 32, 48), features=[8, 16, 32])
    small = nnunet.small_configuration(planned, [1, 0, 2], network, 3)
    assert small["patch_size"] == [32, 48, 16]
    assert small["batch_size"] == 3
    assert small["architecture"]["arch_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert small["architecture"]["arch_kwargs"]["conv_op"] == "conv3d"
    assert nnunet.small_configuration(planned, [0, 1, 2], None, 2) == {"inherits_from": "3d_fullres", "batch_size": 2}


def test_all_arms_have_the_plans_made_on_real(run):
    real, mixed = (run / "arms" / arm / "nnUNet_preprocessed" / DATASET for arm in ("real", MIXED))
    for name in ("nnUNetPlans.json", "dataset_fingerprint.json"):
        assert (real / name).read_bytes() == (mixed / name).read_bytes()
    plans = json.loads((real / "nnUNetPlans.json").read_text())
    # The blobs' spacing is 5, 3, 4 mm along x, y, z: SimpleITK's (z, y, x) with the largest spacing first.
    assert plans["transpose_forward"] == [2, 0, 1]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [5.0, 4.0, 3.0]
    assert plans["configurations"]["lungddpm"]["patch_size"] == [16, 16, 32]
    assert len(list((mixed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 6
    assert (mixed / "gt_segmentations" / "s0.nii.gz").exists()


def test_planning_again_does_nothing_until_the_arm_or_the_config_changes(run, monkeypatch):
    real = run / "arms" / "real"
    before = (real / "plan.json").stat().st_mtime_ns
    nnunet.run_plan_segmenter(CONFIG, real)
    assert (real / "plan.json").stat().st_mtime_ns == before
    mixed = run / "arms" / "again"
    copytree(run / "arms" / MIXED, mixed, symlinks=True)
    planned = []
    monkeypatch.setattr(nnunet, "_preprocess", lambda *_: planned.append(1))
    nnunet.run_plan_segmenter(CONFIG, mixed, real)
    assert not planned
    arm = json.loads((mixed / "arm.json").read_text())
    (mixed / "arm.json").write_text(json.dumps(arm | {"fingerprint": "another"}))
    nnunet.run_plan_segmenter(CONFIG, mixed, real)
    assert planned


def test_a_trained_arm_finds_the_balls_of_patients_it_never_saw(run, tmp_path):
    arm, table = run / "arms" / "real", run / "cases" / "cases.tsv"
    nnunet.run_train_segmenter(CONFIG, arm, 0, 0, "cpu")
    (tmp_path / "gone.nii.gz").touch()
    nnunet.run_predict(CONFIG, arm, 0, 0, table, tmp_path, "cpu")
    test = usable(read_cases(table), "test")["case_id"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz")) == sorted(
        f"{prefix}{case}.nii.gz" for case in test for prefix in ("", "probability/")
    )
    for case in test:
        _, layout = CaseFolder(run / "cases" / case).read()
        mask, probability = (read_volume(tmp_path / f"{prefix}{case}.nii.gz") for prefix in ("", "probability/"))
        assert mask.same_grid(layout)
        assert (mask.array.dtype, probability.array.dtype) == (np.uint8, np.uint16)
        # nnU-Net keeps logits in half precision: ties at one half may fall either way.
        unlike = mask.array != (probability.array > 32767)
        assert (np.abs(probability.array[unlike].astype(int) - 32767) <= 1).all()
        truth = layout.array == Label.NODULE
        dice = 2 * (mask.array & truth).sum() / (mask.array.sum() + truth.sum())
        # Marking everything gives 2 x 0.013 / 1.013 = 0.03.
        assert dice > 0.6
        with nnunet.open_segmenter(CONFIG, arm, 0, 0, "cpu") as segmenter:
            alone = segmenter.mask(run / "cases" / case / "ct.nii.gz")
        assert alone.same_grid(layout)
        # Without probabilities ties may fall the other way.
        assert (alone.array[~unlike] == mask.array[~unlike]).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_gpu_trains_and_predicts_as_a_cpu_does(run, stand_in_gpu, tmp_path, monkeypatch, mirrored):
    arm, table = copied_arm(run, f"mirrored_{mirrored}"), run / "cases" / "cases.tsv"
    config = configured(steps=8, save_every=4, augmentation="left_right", test_time_mirroring=mirrored)
    monkeypatch.setenv("nnUNet_compile", "f")  # the compiler would ask the stand-in for a driver
    with stand_in_gpu():
        nnunet.run_train_segmenter(config, arm, 0, 0, "cuda")
        nnunet.run_predict(config, arm, 0, 0, table, tmp_path / "gpu", "cuda")
    nnunet.run_predict(config, arm, 0, 0, table, tmp_path / "cpu", "cpu")
    other = configured(steps=8, save_every=4, augmentation="left_right", test_time_mirroring=not mirrored)
    nnunet.run_predict(other, arm, 0, 0, table, tmp_path / "other", "cpu")

    def probability(device, case):
        # On a GPU nnU-Net sums logits in half precision, weighted by a Gaussian over each tile: coarse in the corners
        # of the volume, which are only in the corners of tiles.
        return read_volume(tmp_path / device / f"probability/{case}.nii.gz").array[8:-8, 8:-8, 8:-8] / 65535

    for case in usable(read_cases(table), "test")["case_id"]:
        np.testing.assert_allclose(probability("gpu", case), probability("cpu", case), atol=2**-8)
        assert np.abs(probability("cpu", case) - probability("other", case)).max() > 0.02


def test_a_gpu_that_nnunet_would_not_take_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arm = run / "arms" / "real"
    with pytest.raises(ConfigError, match=r"only uses the first visible GPU.*CUDA_VISIBLE_DEVICES=1"):
        nnunet.run_train_segmenter(CONFIG, arm, 0, 0, "cuda:1")
    with pytest.raises(ConfigError, match=r"only uses the first visible GPU"):
        nnunet.run_predict(CONFIG, arm, 0, 0, run / "cases" / "cases.tsv", tmp_path, "cuda:1")


def test_the_training_curve_is_read_from_the_logs(run):
    real = run / "arms" / "real"
    nnunet.run_train_segmenter(SHORT, real, 0, 3, "cpu")
    steps, losses, dice = zip(*nnunet.segmenter_curve(real, 0, 3, save_every=2), strict=True)
    assert steps == (2, 4, 6, 8)
    logged = torch.load(nnunet.fold_folder(real, 0, 3) / "checkpoint_final.pth", weights_only=False)["logging"]
    assert losses == pytest.approx(logged["train_losses"], abs=5e-5)
    assert dice == pytest.approx(logged["mean_fg_dice"], abs=5e-5)
    # A resumed training logs again what it had not saved.
    again = nnunet.fold_folder(real, 0, 3) / "training_log_9999.txt"
    again.write_text("9: Epoch 3 \n9: Current learning rate: 0.1 \n9: train_loss -0.7500, pseudo Dice 0.1 \n")
    before = [*zip(steps[:3], losses[:3], dice[:3], strict=True)]
    assert nnunet.segmenter_curve(real, 0, 3, save_every=2) == [*before, (8, -0.75, 0.1)]
    assert nnunet.segmenter_curve(real, 0, 99, save_every=2) == []


def test_of_several_logs_the_latest_wins_and_a_new_training_keeps_none(run):
    real = run / "arms" / "real"
    folder = nnunet.fold_folder(real, 0, 5)
    folder.mkdir(parents=True)
    # As nnU-Net names them, without zeros in front of month and day.
    for date, loss in (("2026_11_9", -0.25), ("2026_11_10", -0.5), ("2026_9_30", -0.125)):
        log = folder / f"training_log_{date}_12_00_00.txt"
        log.write_text(f"9: Epoch 7 \n9: Current learning rate: 0.1 \n9: train_loss {loss:.4f}, pseudo Dice 0.1 \n")
    assert nnunet.segmenter_curve(real, 0, 5, save_every=2) == [(16, -0.5, 0.1)]
    # They are of a training that was killed before it saved anything: the next one starts over.
    nnunet.run_train_segmenter(SHORT, real, 0, 5, "cpu")
    assert [step for step, _, _ in nnunet.segmenter_curve(real, 0, 5, save_every=2)] == [2, 4, 6, 8]


def test_every_arm_takes_the_same_steps_from_the_same_seed(run):
    for arm in ("real", MIXED):
        nnunet.run_train_segmenter(SHORT, run / "arms" / arm, 0, 7, "cpu")
    settings, steps = [], []
    for arm in ("real", MIXED):
        folder = nnunet.fold_folder(run / "arms" / arm, 0, 7)
        settings.append(json.loads((folder / "training.json").read_text()))
        state = torch.load(folder / "checkpoint_final.pth", weights_only=False)["optimizer_state"]["state"]
        steps.append({int(parameter["step"]) for parameter in state.values()})
    assert steps == [{8}, {8}]
    assert settings[0]["seed"] == settings[1]["seed"]
    assert settings[0]["fingerprint"] != settings[1]["fingerprint"]


def test_a_killed_training_resumes_bit_identically(run, monkeypatch):
    whole, killed = (run / "arms" / name for name in ("whole", "killed"))
    for copy in (whole, killed):
        copytree(run / "arms" / "real", copy, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    nnunet.run_train_segmenter(SHORT, whole, 0, 0, "cpu")
    taken = stop_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_train_segmenter(SHORT, killed, 0, 0, "cpu")
    assert checkpoint(killed, "checkpoint_latest.pth")["current_epoch"] == 2
    nnunet.run_train_segmenter(SHORT, killed, 0, 0, "cpu")
    assert len(taken) == 6 + 4
    ours, theirs = checkpoint(whole), checkpoint(killed)
    for name, weights in ours["network_weights"].items():
        assert torch.equal(weights, theirs["network_weights"][name])
    assert ours["logging"]["train_losses"] == theirs["logging"]["train_losses"]
    assert ours["optimizer_state"]["param_groups"] == theirs["optimizer_state"]["param_groups"]


def copied_arm(run, name):
    """The planned arm `real` under another name, without trainings."""
    arm = run / "arms" / name
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    return arm


def stop_at(monkeypatch, *numbers):
    """Let training stop before these steps, from 1 over all trainings; returns the steps taken so far."""
    taken, step = [], LungDDPMTrainer.train_step

    def step_or_stop(trainer, batch):
        taken.append(trainer.current_epoch)
        if len(taken) in numbers:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(LungDDPMTrainer, "train_step", step_or_stop)
    return taken


def test_a_training_under_way_survives_changed_code(run, monkeypatch, caplog):
    whole, changed = copied_arm(run, "undisturbed"), copied_arm(run, "changed code")
    nnunet.run_train_segmenter(SHORT, whole, 0, 0, "cpu")
    folder = nnunet.fold_folder(changed, 0, 0)
    own = json.loads((nnunet.fold_folder(whole, 0, 0) / "training.json").read_text())["code"]
    assert [entry["from_step"] for entry in own] == [1]
    taken = stop_at(monkeypatch, 6, 9)
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_train_segmenter(SHORT, changed, 0, 0, "cpu")
    assert "The code has changed" not in caplog.text
    # The code of the plan as well: the arm is preprocessed again, from the same plans.
    monkeypatch.setattr(nnunet, "stage_fingerprint", lambda stage: f"changed {stage}")
    before = (changed / "plan.json").read_text()
    nnunet.run_plan_segmenter(CONFIG, changed)
    assert (changed / "plan.json").read_text() != before
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_train_segmenter(SHORT, changed, 0, 0, "cpu")
    assert "The code has changed since step 4" in caplog.text
    nnunet.run_train_segmenter(SHORT, changed, 0, 0, "cpu")
    assert taken == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    record = json.loads((folder / "training.json").read_text())["code"]
    assert record == [*own, {"from_step": 5, "code": "changed train_segmenter"}]
    ours, theirs = checkpoint(whole)["network_weights"], checkpoint(changed)["network_weights"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_states_are_kept_until_a_training_of_other_settings_has_saved(run, monkeypatch):
    arm = copied_arm(run, "other settings")
    other = configured(steps=8, save_every=4)
    taken = stop_at(monkeypatch, 6, 8, 14)
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    with pytest.raises(KeyboardInterrupt):  # before it has saved
        nnunet.run_train_segmenter(other, arm, 0, 0, "cpu")
    assert taken[6:] == [0, 0]
    with pytest.raises(KeyboardInterrupt):  # after it has saved
        nnunet.run_train_segmenter(other, arm, 0, 0, "cpu")
    assert taken[8:] == [0, 0, 0, 0, 1, 1]
    nnunet.run_train_segmenter(other, arm, 0, 0, "cpu")
    assert taken[14:] == [1, 1, 1, 1]
    assert [path.name for path in nnunet.fold_folder(arm, 0, 0).parent.glob("*fold_*")] == ["fold_0"]


def test_a_training_resumes_where_other_settings_were_a_slip(run, monkeypatch):
    arm = copied_arm(run, "slip")
    taken = stop_at(monkeypatch, 6, 8)
    for config in (SHORT, configured(steps=8, save_every=4)):
        with pytest.raises(KeyboardInterrupt):
            nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")
    nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    assert taken[8:] == [2, 2, 3, 3], "it resumes from the state that the other training found"


def test_sigterm_ends_a_training_in_order_and_it_continues(run, monkeypatch, caplog):
    arm = run / "arms" / "terminated"
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    steps = 0
    step = LungDDPMTrainer.train_step

    def reach_the_time_limit(trainer, batch):
        nonlocal steps
        steps += 1
        if steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    monkeypatch.setattr(LungDDPMTrainer, "train_step", reach_the_time_limit)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), caplog.at_level(logging.WARNING, "lungddpm"):
        nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    assert "resumes from the last saved state" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    assert steps == 6 + 4


def test_code_in_a_checkpoint_is_not_run(run, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    arm = run / "arms" / "code"
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    final = nnunet.fold_folder(arm, 0, 0) / "checkpoint_final.pth"
    torch.save(checkpoint(arm) | {"trainer_name": Code()}, final)
    with pytest.raises(InputError, match=r"checkpoint_final.pth: holds code"):
        nnunet.run_predict(SHORT, arm, 0, 0, run / "cases" / "cases.tsv", tmp_path / "masks", "cpu")
    final.rename(final.with_name("checkpoint_latest.pth"))
    nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    assert final.exists()
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoints_are_reported_and_trained_again(run, tmp_path, monkeypatch, caplog):
    arm = run / "arms" / "damaged"
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    final = nnunet.fold_folder(arm, 0, 0) / "checkpoint_final.pth"
    whole, weights = final.read_bytes(), checkpoint(arm)["network_weights"]
    final.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"checkpoint_final.pth: is truncated or damaged .* Delete it"):
        nnunet.run_predict(SHORT, arm, 0, 0, run / "cases" / "cases.tsv", tmp_path, "cpu")
    final.unlink()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    final.with_name("checkpoint_latest.pth").write_bytes(flipped)
    with caplog.at_level(logging.WARNING, "lungddpm"):
        nnunet.run_train_segmenter(SHORT, arm, 0, 0, "cpu")
    assert "differs from its checksum" in caplog.text
    again = checkpoint(arm)["network_weights"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_two_stages_train_without_deep_supervision(run):
    arm = run / "arms" / "two_stages"
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    path = arm / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["lungddpm"] = nnunet.small_configuration(
        plans["configurations"]["3d_fullres"], plans["transpose_forward"], Network(patch=(8, 8, 8), features=[4, 8]), 2
    )
    path.write_text(json.dumps(plans))
    nnunet.run_train_segmenter(configured(steps=2, save_every=1), arm, 0, 0, "cpu")
    assert all(np.isfinite(checkpoint(arm)["logging"]["train_losses"]))


@pytest.mark.parametrize("seed", range(3))
def test_a_network_starts_at_the_prior_whatever_the_seed(run, seed):
    plans = PlansManager(str(run / "arms" / "real" / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"))
    torch.manual_seed(seed)
    network = LungDDPMTrainer.build_network_architecture(plans, plans.get_configuration("lungddpm"), 1, 2)
    patches = torch.randn(2, 1, 16, 16, 32)

    def probability():
        with torch.no_grad():
            return [torch.softmax(output, 1)[:, 1].median().item() for output in network(patches)]

    assert min(probability()) > 0.1
    start_at_prior(network, 0.01)
    assert probability() == pytest.approx([0.01] * len(probability()), rel=0.4)


def test_the_prior_of_the_config_reaches_the_training(run):
    arm = run / "arms" / "prior"
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    first_loss = {}
    for prior in (None, 0.01):
        config = configured(steps=1, save_every=1, learning_rate=1e-6, foreground_prior=prior)
        nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")
        first_loss[prior] = checkpoint(arm)["logging"]["train_losses"][0]
    # Cross-entropy of voxels that are nearly all background: ln 2 at one half, ln(1 / 0.99) at the prior.
    assert first_loss[0.01] < first_loss[None] - 0.4


def train_and_record(run, name: str, step: str, **segmentation) -> tuple[Path, list[np.ndarray]]:
    """Train a new copy of the arm `real`: its folder, and the image patches of every call of this step."""
    arm = run / "arms" / name
    copytree(run / "arms" / "real", arm, symlinks=True, ignore=lambda *_: ["nnUNet_results"])
    patches, original = [], getattr(nnUNetTrainer, step)

    def record(self, batch):
        patches.extend(batch["data"].numpy().copy()[:, 0])
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnUNetTrainer, step, record)
        nnunet.run_train_segmenter(configured(**segmentation), arm, 0, 0, "cpu")
    return arm, patches


@pytest.mark.parametrize("augmentation", ["nnunet", "mirror", "left_right", "none"])
def test_patches_are_changed_only_as_the_augmentation_says(run, augmentation, monkeypatch):
    load = nnUNetDatasetBlosc2.load_case

    def numbered(self, name):
        """The case with its voxels numbered from 1, so that a voxel of a patch says where it was."""
        image, *others = load(self, name)
        return np.arange(1, np.prod(image.shape) + 1, dtype=np.float32).reshape(image.shape), *others

    monkeypatch.setattr(nnUNetDatasetBlosc2, "load_case", numbered)
    settings = {"steps": 16, "save_every": 16, "augmentation": augmentation}
    _, patches = train_and_record(run, f"augmented-{augmentation}", "train_step", **settings)
    # Along an axis of the case (32 voxels), the numbers rise by these; 0 pads a patch that reaches beyond it.
    signs = []
    for axis, rise in enumerate((32 * 32, 32, 1)):
        steps = [
            np.diff(patch, axis=axis)[(np.delete(patch, 0, axis) > 0) & (np.delete(patch, -1, axis) > 0)]
            for patch in patches
        ]
        signs.append(set((np.concatenate(steps) / rise).tolist()))
    if augmentation == "nnunet":
        assert all(len(found) > 2 for found in signs)
    else:
        either, same = {1, -1}, {1}
        # The plans transpose nnU-Net's (z, y, x) by [2, 0, 1]: x, left to right, comes first.
        expected = {"mirror": [either] * 3, "left_right": [either, same, same], "none": [same] * 3}
        assert signs == expected[augmentation]


def test_a_network_predicts_mirrored_copies_only_if_it_has_seen_some(run):
    for augmentation, axes in (("mirror", (0, 1, 2)), ("left_right", (0,)), ("none", None)):
        arm, _ = train_and_record(
            run, f"axes-{augmentation}", "train_step", steps=1, save_every=1, augmentation=augmentation
        )
        assert checkpoint(arm)["inference_allowed_mirroring_axes"] == axes


def test_every_epoch_validates_on_the_same_patches(run):
    _, patches = train_and_record(run, "validated", "validation_step", steps=20, save_every=10)
    first, second = np.split(np.stack(patches), 2)
    assert np.array_equal(first, second)
    assert len(first) == 4
    assert len(np.unique(first, axis=0)) > 1


def test_a_finished_training_is_kept_and_one_of_other_settings_discarded(run, caplog):
    caplog.set_level(logging.INFO, "lungddpm")
    arm = run / "arms" / MIXED
    final = nnunet.fold_folder(arm, 0, 1) / "checkpoint_final.pth"
    nnunet.run_train_segmenter(SHORT, arm, 0, 1, "cpu")
    first = final.stat().st_mtime_ns
    nnunet.run_train_segmenter(SHORT, arm, 0, 1, "cpu")
    assert final.stat().st_mtime_ns == first
    nnunet.run_train_segmenter(configured(steps=2, save_every=1, optimizer="sgd"), arm, 0, 1, "cpu")
    assert final.stat().st_mtime_ns != first
    assert "is already trained" in caplog.text
    assert "is discarded" in caplog.text


def test_a_replicate_trains_on_its_own_draw_and_one_more_leaves_the_others_alone(run, caplog):
    caplog.set_level(logging.INFO, "lungddpm")
    config = parse_config({"segmentation": SHORT.segmentation.model_dump() | {"seeds": [0, 1]}})
    table, arm, name = run / "cases" / "cases.tsv", run / "arms" / "drawn", "real+lung_ddpm@0.25"
    samples = read_cases(run / "synthetic" / "samples.tsv")
    run_compose(config, name, table, [], arm)
    nnunet.run_plan_segmenter(config, arm, run / "arms" / "real")
    with pytest.raises(InputError, match=r"draw\.json.*compose --arm .* --replicate fold0_seed0"):
        nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")

    def draw(seed):
        path = run / "synthetic" / f"samples-{seed}.tsv"
        write_cases(path, samples.iloc[seed : seed + 1])
        run_compose_draw(config, name, f"fold0_seed{seed}", table, [path], arm)

    read = []
    dataset = nnUNetDatasetBlosc2.load_case
    for seed in (0, 1):
        draw(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nnUNetDatasetBlosc2, "load_case", lambda self, key: read.append(key) or dataset(self, key))
            nnunet.run_train_segmenter(config, arm, 0, seed, "cpu")
        training = json.loads((nnunet.fold_folder(arm, 0, seed) / "training.json").read_text())
        shared = json.loads((arm / "arm.json").read_text())["folds"][0]
        assert training["split"] == {"train": [*shared["train"], f"s{seed}"], "val": shared["val"]}
        assert set(read) == {*training["split"]["train"], *training["split"]["val"]}
        read.clear()
    before = (nnunet.fold_folder(arm, 0, 0) / "checkpoint_final.pth").stat().st_mtime_ns
    nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")
    assert (nnunet.fold_folder(arm, 0, 0) / "checkpoint_final.pth").stat().st_mtime_ns == before
    assert "is already trained" in caplog.text


def test_a_killed_training_on_a_draw_of_its_own_continues(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lungddpm")
    config = parse_config({"segmentation": SHORT.segmentation.model_dump()})
    table, arm, name = run / "cases" / "cases.tsv", run / "arms" / "drawn_and_killed", "real+lung_ddpm@0.25"
    path = run / "synthetic" / "sample.tsv"
    write_cases(path, read_cases(run / "synthetic" / "samples.tsv").iloc[:1])
    run_compose(config, name, table, [], arm)
    nnunet.run_plan_segmenter(config, arm, run / "arms" / "real")
    run_compose_draw(config, name, "fold0_seed0", table, [path], arm)
    stop_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")
    # As a kill in the middle of preprocessing leaves it.
    preprocessed = arm / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_3d_fullres" / "s0.b2nd"
    preprocessed.write_bytes(preprocessed.read_bytes()[:300])
    nnunet.run_train_segmenter(config, arm, 0, 0, "cpu")
    assert "resumes after epoch" in caplog.text
    assert len(checkpoint(arm)["logging"]["train_losses"]) == 4


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(run, tmp_path, monkeypatch):
    target = tmp_path / "checkpoint_latest.pth"
    target.write_bytes(b"complete")

    def fill_the_disk(_trainer, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(LungDDPMTrainer.__base__, "save_checkpoint", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        LungDDPMTrainer.save_checkpoint(object.__new__(LungDDPMTrainer), str(target))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"complete"]


def test_what_is_missing_is_named(run, tmp_path):
    arm, table = run / "arms" / MIXED, run / "cases" / "cases.tsv"
    recomposed = run / "arms" / "recomposed"
    recomposed.mkdir()
    (recomposed / "plan.json").write_bytes((arm / "plan.json").read_bytes())
    (recomposed / "arm.json").write_text(json.dumps({"fingerprint": "another", "folds": []}))
    with pytest.raises(InputError, match=r"arm\.json.*compose"):
        nnunet.run_plan_segmenter(CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"plan\.json.*segment plan"):
        nnunet.run_train_segmenter(CONFIG, tmp_path, 0, 0)
    with pytest.raises(InputError, match="composed again after"):
        nnunet.run_train_segmenter(CONFIG, recomposed, 0, 0)
    with pytest.raises(InputError, match="not fold 2"):
        nnunet.run_train_segmenter(CONFIG, arm, 2, 0)
    with pytest.raises(InputError, match="no finished training"):
        nnunet.run_predict(CONFIG, arm, 1, 0, table, tmp_path)
    with pytest.raises(ConfigError, match="'quantum' is not available"):
        nnunet.run_train_segmenter(CONFIG, arm, 0, 0, "quantum")
