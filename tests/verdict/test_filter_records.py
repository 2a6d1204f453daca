"""What the report shows of quality filters, from the records of arms and draws."""

import math

import pytest

from lungddpm.arms.compose import draw_record
from lungddpm.config.loading import parse_config
from lungddpm.core.files import write_json
from lungddpm.report.sections import show_filter
from lungddpm.verdict.records import KEPT_COLUMNS, filter_table

ARM = "real+lung_ddpm.filtered@1.0"


def config_of(own_draws):
    arms = {"generators": ["lung_ddpm"], "filtered": ["lung_ddpm"], "controls": ["real"]}
    segmentation = {"n_folds": 3, "folds": [0, 1, 2]}
    return parse_config(
        {"arms": arms, "segmentation": segmentation, "synthesis": {"draw_per_replicate": own_draws}}
    )  # fmt: skip


def entry(judged, kept, taken, mean, wanted=4):
    """As `compose` writes it, with what the table leaves out."""
    held = {"judged": judged, "kept": kept, "taken": taken, "wanted": wanted, "found_mean": mean, "found": 0.7}
    return {"filter": {**held, "segmenters": [], "leak_guard": {"disjoint": True}}}


def test_a_row_for_each_draw_that_was_filtered(tmp_path):
    """One replicate kept fewer than wanted, and another was not composed: its filter kept nothing."""
    folder = tmp_path / "arms" / ARM
    write_json(folder / "arm.json", {"arm": ARM, "cases": []})
    write_json(draw_record(folder, "fold0_seed0"), entry(judged=8, kept=6, taken=4, mean=0.8125))
    write_json(draw_record(folder, "fold2_seed0"), entry(judged=8, kept=1, taken=1, mean=0.3))
    # Neither an arm without a filter nor a file that has no entry is listed.
    write_json(tmp_path / "arms" / "real+lung_ddpm@1.0" / "arm.json", entry(9, 9, 9, 1.0))
    table = filter_table(config_of(own_draws=True), tmp_path)
    assert list(table.columns) == KEPT_COLUMNS
    assert table.to_dict("records") == [
        {
            "arm": ARM, "replicate": "fold0_seed0", "found_limit": 0.7, "found_mean": 0.8125, "judged": 8, "kept": 6,
            "share_kept": 0.75, "wanted": 4, "taken": 4,
        },
        {
            "arm": ARM, "replicate": "fold2_seed0", "found_limit": 0.7, "found_mean": 0.3, "judged": 8, "kept": 1,
            "share_kept": 0.125, "wanted": 4, "taken": 1,
        },
    ]  # fmt: skip
    shown = show_filter(table)
    assert shown.heads == ["arm", "replicate", "judged", "nodule voxels found, mean", "kept", "taken"]
    assert shown.rows == [
        [ARM, "fold0_seed0", "8", "81 %", "6 (75 %)", "4 of 4"],
        [ARM, "fold2_seed0", "8", "30 %", "1 (12 %)", "1 of 4"],
    ]


def test_a_shared_draw_is_of_all_replicates(tmp_path):
    write_json(tmp_path / "arms" / ARM / "arm.json", {"arm": ARM, **entry(judged=6, kept=5, taken=4, mean=0.5)})
    table = filter_table(config_of(own_draws=False), tmp_path)
    assert table["replicate"].tolist() == [""]
    assert table["share_kept"].tolist() == [pytest.approx(5 / 6)]
    assert not math.isnan(table["found_limit"][0])
    assert show_filter(table).rows == [[ARM, "all", "6", "50 %", "5 (83 %)", "4 of 4"]]


def test_without_a_filtered_arm_there_is_no_row(tmp_path):
    assert filter_table(config_of(own_draws=True), tmp_path).empty
    assert filter_table(parse_config({}), tmp_path).empty
