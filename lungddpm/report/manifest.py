"""The manifest: code, configuration and inputs behind a verdict."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lungddpm.arms.compose import draw_record
from lungddpm.config.models import Config
from lungddpm.core.code import CodeFromStep
from lungddpm.core.files import read_json, sha256_of
from lungddpm.core.versions import git_commit, installed_versions
from lungddpm.segmentation.nnunet import fold_folder
from lungddpm.verdict.tables import named_late


def arm_files(config: Config, results: Path) -> dict[str, Path]:
    """The `arm.json` of every arm that has one."""
    paths = {arm: results / "arms" / arm / "arm.json" for arm in config.arms.names()}
    return {arm: path for arm, path in paths.items() if path.exists()}


def draw_files(config: Config, results: Path) -> dict[str, list[Path]]:
    """The `draw.json` of every replicate that has its own draw, by arm."""
    paths = {
        arm: [draw_record(results / "arms" / arm, name) for name in config.segmentation.replicates()]
        for arm in config.arms.names()
    }
    return {arm: [path for path in records if path.exists()] for arm, records in paths.items()}


def read_arms(config: Config, results: Path) -> dict[str, dict[str, Any]]:
    """The content of `arm.json` of every arm that has one, with that of each `draw.json` under `draws`."""
    draws = draw_files(config, results)
    return {
        arm: {**read_json(path), "draws": [read_json(draw) for draw in draws[arm]]}
        for arm, path in arm_files(config, results).items()
    }


def describe_run(config: Config, results: Path, files: list[Path]) -> dict[str, Any]:
    """Code, configuration and inputs of the verdict, without any machine or user name or absolute path.

    Args:
        config: the run's config.
        results: its folder.
        files: the files to hash, in that folder.

    Returns:
        JSON-like: written (UTC), git_commit, platform, versions, config, primary (the arms tested first, and replicates
        evaluated before these were named), training_code (see there), sha256 by relative path.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": installed_versions(),
        # In full, so it does not need the preset, which jobs no longer know.
        "config": config.without_folders().model_dump(mode="json", exclude={"preset"}),
        "primary": {"arms": config.primary_arms(), "evaluated_before": named_late(results, config)},
        "training_code": training_code(config, results),
        "sha256": {path.relative_to(results).as_posix(): sha256_of(path) for path in files},
    }


def training_code(config: Config, results: Path) -> dict[str, list[CodeFromStep]]:
    """Which code version ran which steps of every training, by folder; for segmenters by arm and replicate."""
    records = {
        path.parent.relative_to(results).as_posix(): path for path in sorted(results.glob("models/*/*/*/training.json"))
    }
    for arm in config.arms.names():
        for fold in config.segmentation.folds:
            for seed in config.segmentation.seeds:
                folder = fold_folder(results / "arms" / arm, fold, seed)
                name = config.segmentation.replicate_name(fold, seed)
                records[f"arms/{arm} {name}"] = folder / "training.json"
    return {name: read_json(path).get("code", []) for name, path in records.items() if path.exists()}
