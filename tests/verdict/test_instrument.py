"""The checks above the answer, and what follows from each: the answer stands, or this run cannot tell."""

import math

import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Calibration
from lungddpm.core.arms import BASELINE
from lungddpm.quality.calibration import DIFFERENCE, LUNGS_ALONE, NODULES, SPREAD, calibration_table
from lungddpm.quality.image_quality import COPIED
from lungddpm.verdict.answer import CANNOT_TELL, STANDS, answer_row, doubted_arms
from lungddpm.verdict.convergence import DICE, LOSS
from lungddpm.verdict.design import Costs
from lungddpm.verdict.instrument import (
    ALIKE,
    COMPLETE,
    CONVERGED,
    DISTINCT,
    ENOUGH,
    FAILED,
    GENERATOR,
    MEMORISED,
    NAMED,
    NOT_MEASURED,
    NULL,
    OF_TEST_SET,
    PASSED,
    POSITIVE,
    UNSEEN,
    Missing,
    external_instrument_table,
    instrument_table,
)

ARM, MORE_REAL, REPEATED = "real+lung_ddpm@1.0", "real+reference@1.0", "real+real"
COSTS = Costs({"train_segmenter": 20.0, "prepare": 1.0}, 5, 16, 40)


def config_of(replicates=5, controls=("real", "reference"), roles=None, **verdict):
    settings = {"relevant_difference": 0.1} | verdict
    arms, folds = {"controls": list(controls)}, list(range(replicates))
    segmentation = {"folds": folds, "n_folds": max(5, replicates)}
    return parse_config({"arms": arms, "verdict": settings, "segmentation": segmentation, "roles": roles or {}})


def verdict_of(answer="no difference shown", positive="better", null="no difference shown"):
    """Rows of `verdict.csv`, Dice alone."""
    p = {"better": 0.01, "worse": 0.01, "no difference shown": 0.4}
    arms = {ARM: answer, REPEATED: null, MORE_REAL: positive}
    rows = [{"arm": "real", "verdict": "baseline", "p_holm": math.nan, "difference": math.nan}]
    rows += [
        {"arm": arm, "verdict": reported, "p_holm": p.get(reported, math.nan), "difference": 0.05}
        for arm, reported in arms.items()
    ]
    return pd.DataFrame(rows).assign(metric="dice", n_cases=16, run_df=12, baseline_mean=0.5)


def quality_of(lungs=2.0, spread=1.0, nodules=5.0, speckle=1.0, seam=1.05, nearest=(1.0, 0.9)):
    values = [(LUNGS_ALONE, DIFFERENCE, lungs), (LUNGS_ALONE, SPREAD, spread)]
    values += [(NODULES, DIFFERENCE, nodules), (NODULES, SPREAD, speckle)]
    names = ("nearest_training_ratio", "smallest_training_ratio", "n_nearer_than_any_real")
    values += [("lungs", name, value) for name, value in zip(names, (*nearest, 3.0), strict=True)]
    rows = [(region, metric, value) for region, metric, value in [*values, ("seam", "gradient_ratio", seam)]]
    table = pd.DataFrame(rows, columns=["region", "metric", "mean"]).assign(image="synthetic")
    smooth = {"region": "lungs", "metric": "nearest_training_ratio", "mean": 0.8, "image": "constant lungs"}
    table = pd.concat([table, pd.DataFrame([smooth])], ignore_index=True)
    note = table["metric"].map({"smallest_training_ratio": "s1 is 40 HU from case-3; real: 50 HU"}).fillna("")
    return table.assign(generator="lung_ddpm", n=8, sd=1.0, note=note)


def tables_of(
    verdict=None, quality=None, run_sd=0.02, fall=0.02, rise=0.0, scatter=0.001, learning=(BASELINE, ARM), spread_p=0.6,
    fidelity=(0.5, 0.55),
):  # fmt: skip
    """All that the checks read, of a run in which everything passes unless arguments change it; `fall` and `rise` are
    of the arms in `learning`, the others have converged."""
    quality = quality_of() if quality is None else quality
    components = {"n_independent": 5, "n_cases": 16, "run_df": 12, "run_sd": run_sd}
    names, curves = [ARM, REPEATED, MORE_REAL], []
    for arm in [BASELINE, *names]:
        falls, rises = (fall, rise) if arm in learning else (0.02, 0.0)
        curves.append((arm, LOSS, -0.01, falls, 0.001, 0.001 if falls > 0.02 else 0.5))
        curves.append((arm, DICE, rises, 0.1, scatter, 0.001 if rises else 0.5))
    tables = {
        "verdict": verdict_of() if verdict is None else verdict,
        "variance_components": pd.DataFrame(
            [{"arm": arm, "family": "", "metric": "dice", "residual_sd": 0.06, "arm_case_sd": 0.02} for arm in names]
        ).assign(**components),
        "run_spread": pd.DataFrame(
            [
                {"arm": arm, "n_replicates": 5, "sd": 0.01 * (1 + n), "p": spread_p}
                for n, arm in enumerate(["real", ARM])
            ]
        ),
        "convergence": pd.DataFrame(
            curves, columns=["arm", "measure", "change", "change_of_whole", "standard_error", "p"]
        ),
        "calibration": calibration_table(quality, ["lung_ddpm", "reference"], Calibration()),
        "image_quality": quality,
    }
    if fidelity:
        drawn, real = fidelity
        row = {"generator": "lung_ddpm", "dice_of_references": real, "difference": drawn - real}
        # The means over all samples and references are of other cases: the check is not about them.
        means = {"generator": ["lung_ddpm", "(real CT)"], "dice_mean": [0.9, 0.1]}
        tables["label_fidelity"] = pd.DataFrame(means).merge(pd.DataFrame([row]), how="left", on="generator")
    return tables


def judge(config=None, missing=None, copies=(), late=(), shared=(), costs=COSTS, **changes):
    """The checks' worst status and sentences by name, and the answer's row."""
    config, tables = config or config_of(), tables_of(**changes)
    checks = instrument_table(config, tables, missing or Missing({}, []), list(copies), list(late), list(shared))
    answer = answer_row(checks, tables["verdict"], tables["variance_components"], config, costs)
    statuses = {
        name: next(each for each in (FAILED, NOT_MEASURED, PASSED) if each in set(rows["status"]))
        for name, rows in checks.groupby("check", sort=False)
    }
    said = {name: " ".join(rows["sentence"]) for name, rows in checks.groupby("check", sort=False)}
    return statuses, said, answer


def test_a_run_in_which_everything_passes():
    statuses, said, answer = judge()
    names = [POSITIVE, NULL, CONVERGED, GENERATOR, MEMORISED, ENOUGH, COMPLETE, DISTINCT, ALIKE]
    assert statuses == dict.fromkeys(names, PASSED)
    assert answer["status"] == STANDS
    assert answer["sentence"] == "The answer stands: all checks passed."
    assert (
        "lungs +2 HU (limit ±10), HU spread in the lungs 1.00 times that of references (0.9 to 1.1), "
        "nodules +5 HU (limit ±40), HU spread in the nodules 1.00 times that of references (0.7 to 1.4)."
    ) in said[GENERATOR]
    assert "a Dice of 0.50 on lung_ddpm and of 0.55 on its references' real CT." in said[GENERATOR]


COPIES = [["real, fold0_seed0", "real+real, fold0_seed0"]]


@pytest.mark.parametrize(
    ("check", "changes", "doubts_difference", "doubts_none", "said"),
    [
        (
            POSITIVE,
            {"positive": "no difference shown"},
            False,
            True,
            "does not even detect the gain from more real data",
        ),
        (POSITIVE, {"positive": "worse"}, False, True, "was not called better"),
        (NULL, {"null": "better"}, True, False, "which adds nothing, was called better"),
        (NULL, {"null": "worse"}, True, False, "which adds nothing, was called worse"),
        (
            CONVERGED,
            {"fall": 0.3, "scatter": 0.05},
            True,
            True,
            "30 % of the fall of its training loss",
        ),
        (CONVERGED, {"rise": 0.1}, True, True, "validation Dice rose by +0.10"),
        (GENERATOR, {"quality": quality_of(lungs=60)}, False, True, "lungs too bright, +60 HU"),
        (GENERATOR, {"quality": quality_of(seam=1.4)}, False, True, "1.40 times that of its references"),
        (GENERATOR, {"fidelity": (0.3, 0.6)}, False, True, "do not look like nodules"),
        (MEMORISED, {"quality": quality_of(nearest=(0.69, 0.9))}, False, False, "0.69 times as far"),
        (
            MEMORISED,
            {"quality": quality_of(nearest=(1.0, 0.2))},
            False,
            False,
            "s1 is 40 HU from case-3; real: 50 HU; 3 of 8",
        ),
        (ENOUGH, {"run_sd": 0.1}, False, True, "the relevant one, 0.1, with"),
        (COMPLETE, {"missing": Missing({ARM: ["fold1_seed0"]}, [])}, True, True, f"{ARM}, fold1_seed0"),
        (COMPLETE, {"missing": Missing({"real": ["fold1_seed0"]}, [])}, True, True, "real, fold1_seed0"),
        (COMPLETE, {"missing": Missing({REPEATED: ["fold1_seed0"]}, [])}, False, False, "real+real, fold1_seed0"),
        (COMPLETE, {"missing": Missing({}, ["case-1"])}, True, True, "no run segmented: case-1"),
        (DISTINCT, {"copies": COPIES}, True, True, "real, fold0_seed0; real+real, fold0_seed0"),
        (ALIKE, {"spread_p": 0.01}, True, False, "scatter more than those of the other arms"),
    ],
)
def test_a_failed_check_doubts_the_answers_that_it_bears_on(check, changes, doubts_difference, doubts_none, said):
    for answer, doubted in (("better", doubts_difference), ("no difference shown", doubts_none)):
        controls = {name: changes[name] for name in ("positive", "null") if name in changes}
        others = {name: value for name, value in changes.items() if name not in controls}
        statuses, sentences, reported = judge(verdict=verdict_of(answer, **controls), **others)
        assert [name for name, status in statuses.items() if status == FAILED] == [check]
        assert said in sentences[check]
        assert reported["status"] == (CANNOT_TELL if doubted else STANDS)
        harmless = "Failed checks that do not affect it: "
        text = "This run cannot tell whether synthetic CT helps: " if doubted else harmless
        assert text in reported["sentence"]
        assert ("It would need: " in reported["sentence"]) == doubted


@pytest.mark.parametrize("outcome", ["better", "worse", "no difference shown"])
@pytest.mark.parametrize("learning", [ARM, BASELINE, MORE_REAL])
def test_segmenters_that_still_learn_cannot_explain_why_they_are_better(learning, outcome):
    statuses, said, answer = judge(verdict=verdict_of(outcome), rise=0.1, learning=[learning])
    assert statuses[CONVERGED] == FAILED
    assert said[CONVERGED].startswith(f"{learning}: validation Dice rose by +0.10")
    # What is called better with segmenters that would improve further is better; the controls have their own checks.
    firm = {("better", ARM), ("worse", BASELINE)} | {(each, MORE_REAL) for each in ("better", "worse", outcome)}
    if (outcome, learning) in firm:
        assert answer["status"] == STANDS
        assert f"Failed checks that do not affect it: validation Dice of {learning}." in answer["sentence"]
    else:
        assert answer["status"] == CANNOT_TELL
        assert f": the segmenters of {learning} were still learning." in answer["sentence"]


def test_the_reasons_of_several_arms_are_one():
    _, said, answer = judge(verdict=verdict_of("no difference shown"), rise=0.1)
    assert f"the segmenters of {BASELINE} and {ARM} were still learning. It would need: longer" in answer["sentence"]
    assert said[CONVERGED].count("validation Dice rose by +0.10") == 2


@pytest.mark.parametrize("outcome", ["better", "worse", "no difference shown"])
def test_test_patients_with_another_role_answer_nothing(outcome):
    allowed = config_of(roles={"allow_shared_patients": True})
    statuses, said, answer = judge(config=allowed, shared=["P1", "P2"], verdict=verdict_of(outcome))
    assert statuses[UNSEEN] == FAILED
    assert said[UNSEEN].startswith("2 test patients also have another role (P1; P2)")
    assert answer["status"] == CANNOT_TELL
    assert "test patients also have other roles" in answer["sentence"]
    statuses, _, answer = judge(config=allowed, verdict=verdict_of(outcome))
    assert statuses[UNSEEN] == PASSED
    assert "other roles" not in answer["sentence"]
    assert UNSEEN not in judge(verdict=verdict_of(outcome))[0]  # the leak guard stops such a run


def test_many_subjects_are_counted_instead_of_named():
    tables, config = tables_of(), config_of()
    checks = instrument_table(config, tables, Missing({}, []), [], [])
    seam = checks[checks["measure"].str.contains("border")].iloc[0]
    names = ["a", "b", "c", "d"]
    more = pd.DataFrame([seam.to_dict() | {"subject": name, "status": NOT_MEASURED} for name in names])
    for rows, said in ((more, "seam of 4 generators"), (more[:3], "seam of a, b and c")):
        table = pd.concat([checks, rows])
        answer = answer_row(table, tables["verdict"], tables["variance_components"], config, COSTS)
        assert answer["sentence"].endswith(f"Not measured: {said}.")


def test_longer_training_is_suggested_with_its_hours():
    # The default is nnU-Net's 250,000 steps.
    _, _, answer = judge(verdict=verdict_of("no difference shown"), rise=0.1)
    assert "such as segmentation.steps: 500000 (20 h more, by this run's times)." in answer["sentence"]
    _, _, untimed = judge(verdict=verdict_of("no difference shown"), rise=0.1, costs=None)
    assert untimed["sentence"].endswith("such as segmentation.steps: 500000.")


def test_what_would_be_able_is_said_with_its_hours():
    _, _, answer = judge(run_sd=0.06)
    assert "it is too small. It would need: " in answer["sentence"]
    assert "folds (or seeds of one fold) with these 16 test cases (" in answer["sentence"]
    assert " h of jobs, by this run's times)" in answer["sentence"]
    _, _, untimed = judge(run_sd=0.06, costs=None)
    assert "folds (or seeds of one fold) with these 16 test cases" in untimed["sentence"]
    assert "jobs" not in untimed["sentence"]


def test_patients_who_differ_more_than_any_design_can_average_are_named():
    tables = tables_of()
    tables["variance_components"]["arm_case_sd"] = 5.0
    checks = instrument_table(config_of(), tables, Missing({}, []), [], [])
    answer = answer_row(checks, tables["verdict"], tables["variance_components"], config_of(), COSTS)
    assert "It would need: a larger design than is feasible for a difference of 0.1" in answer["sentence"]


def test_a_run_without_controls_says_that_it_has_none():
    controls = verdict_of().query(f"arm in ['real', '{ARM}']")
    statuses, said, answer = judge(config=config_of(controls=()), verdict=controls)
    assert (statuses[POSITIVE], statuses[NULL]) == (NOT_MEASURED, NOT_MEASURED)
    assert said[POSITIVE].startswith("No positive control: add `reference` to arms.controls")
    assert said[NULL].startswith("No null control: add `real` to arms.controls")
    assert answer["status"] == STANDS
    assert answer["sentence"].endswith("Not measured: positive control found, null control quiet.")


def test_one_replicate_shows_nothing():
    verdict = verdict_of("cannot tell", "cannot tell", "cannot tell").assign(run_df=0)
    statuses, said, answer = judge(config=config_of(replicates=1), verdict=verdict, run_sd=math.nan)
    assert (statuses[POSITIVE], statuses[NULL], statuses[ENOUGH]) == (NOT_MEASURED, NOT_MEASURED, FAILED)
    assert said[ENOUGH].startswith("With one replicate, the run-to-run variance is not known")
    assert answer["status"] == CANNOT_TELL
    assert "at least three replicates" in answer["sentence"]


def test_too_few_test_cases_show_nothing():
    config, tables = config_of(), tables_of(verdict=verdict_of("cannot tell").assign(n_cases=5))
    tables["variance_components"]["n_cases"] = 5
    checks = instrument_table(config, tables, Missing({}, []), [], []).set_index("check")
    assert checks.loc[ENOUGH, "sentence"] == "5 test cases are too few to decide anything."


def test_one_test_case_is_too_few_and_more_are_needed():
    tables = tables_of(verdict=verdict_of("cannot tell").assign(n_cases=1), run_sd=math.nan)
    tables["variance_components"]["n_cases"] = 1
    checks = instrument_table(config_of(), tables, Missing({}, []), [], [])
    answer = answer_row(checks, tables["verdict"], tables["variance_components"], config_of(), COSTS)
    assert checks.set_index("check").loc[ENOUGH, "sentence"] == "1 test case is too few to decide anything."
    assert "It would need: more test cases with a nodule" in answer["sentence"]


def test_a_run_of_which_one_replicate_is_done_has_enough_test_cases():
    verdict = verdict_of("cannot tell", "cannot tell", "cannot tell").assign(run_df=0)
    _, said, answer = judge(verdict=verdict, run_sd=math.nan)
    assert said[ENOUGH].startswith("No arm has two replicates in common with its baseline yet")
    assert "at least three replicates" in answer["sentence"]


def test_hounsfield_units_of_unmeasured_nodules_do_not_pass():
    quality = quality_of().query("region != @NODULES")
    statuses, said, answer = judge(quality=quality)
    assert statuses[GENERATOR] == NOT_MEASURED
    assert "lungs +2 HU (limit ±10), HU spread in the lungs 1.00 times" in said[GENERATOR]
    assert "; nodules not measured." in said[GENERATOR]
    assert answer["sentence"].endswith("Not measured: HU of lung_ddpm.")
    statuses, _, _ = judge(quality=quality_of(lungs=60).query("region != @NODULES"))
    assert statuses[GENERATOR] == FAILED


def test_samples_without_a_reference_have_no_constant_lungs_to_compare_with():
    _, said, _ = judge(quality=quality_of().query("image != 'constant lungs'"))
    assert said[MEMORISED].startswith("Samples of lung_ddpm are 1.00 times as far")
    assert "nan" not in said[MEMORISED]


def test_fewer_real_cases_are_advised_also_where_the_run_is_too_small():
    _, _, answer = judge(verdict=verdict_of(positive="no difference shown"), run_sd=0.1)
    assert "fewer real cases, so that more data make a difference" in answer["sentence"]
    assert "or more replicates" not in answer["sentence"]


def test_the_loss_decides_only_where_validation_scatters_too_much_to_show_a_rise():
    for scatter, status, rows in ((0.03, PASSED, 1), (0.031, FAILED, 2)):
        tables = tables_of(fall=0.3, scatter=scatter, learning=[ARM])
        checks = instrument_table(config_of(), tables, Missing({}, []), [], [])
        converged = checks[checks["check"] == CONVERGED]
        assert len(converged) == rows
        assert (converged["status"] == FAILED).any() == (status == FAILED)
        assert "30 % of the fall of its training loss" in " ".join(converged["sentence"])


def test_what_was_not_measured_neither_passes_nor_fails():
    tables = tables_of(fidelity=None, spread_p=math.nan)
    del tables["image_quality"]
    tables["calibration"] = calibration_table(None, ["lung_ddpm"], Calibration())
    tables["convergence"] = tables["convergence"].iloc[:0]
    checks = instrument_table(config_of(), tables, Missing({}, []), [], [])
    unknown = checks[checks["status"] == NOT_MEASURED]
    assert unknown["check"].value_counts().to_dict() == {CONVERGED: 2, GENERATOR: 3, MEMORISED: 2, ALIKE: 1}
    answer = answer_row(checks, tables["verdict"], tables["variance_components"], config_of(), None)
    assert answer["sentence"] == (
        "The answer stands: no check that affects it failed. Not measured: training loss, validation Dice, "
        "HU of lung_ddpm, seam of lung_ddpm, label fidelity of lung_ddpm, median distance to training cases of "
        "lung_ddpm, smallest distance to a training case of lung_ddpm, runs scatter alike."
    )


def test_segmenters_that_know_too_little_do_not_judge_a_generator():
    statuses, said, _ = judge(fidelity=(0.2, 0.29))
    assert statuses[GENERATOR] == NOT_MEASURED
    assert "reach a Dice of 0.290 on real CT (limit 0.3): too low to judge lung_ddpm" in said[GENERATOR]
    statuses, _, _ = judge(fidelity=(0.2, 0.29), config=config_of(instrument={"label_fidelity_ceiling": 0.25}))
    assert statuses[GENERATOR] == FAILED


def test_nodules_of_speckle_fail_whose_mean_is_right():
    statuses, said, _ = judge(quality=quality_of(speckle=1.83))
    assert statuses[GENERATOR] == FAILED
    assert "the spread of HU in the nodules is 1.83 times that of the references" in said[GENERATOR]


def test_the_limit_of_memorisation_is_the_configs():
    config, quality = config_of(instrument={"training_distance": 0.95}), quality_of()
    statuses, said, _ = judge(config=config, quality=quality)
    assert statuses[MEMORISED] == FAILED
    assert "(constant lungs, which contain no memorised texture: 0.80)." in said[MEMORISED]
    assert said[MEMORISED].endswith("than any real case is: check whether this pair is a copy.")


def test_samples_that_copy_the_lungs_are_not_called_far_from_training_cases():
    quality = quality_of(nearest=(math.nan, math.nan))
    ratios = quality["metric"].isin(["nearest_training_ratio", "smallest_training_ratio"])
    quality.loc[ratios & quality["mean"].isna(), "note"] = COPIED
    statuses, said, answer = judge(quality=quality)
    assert statuses[MEMORISED] == NOT_MEASURED
    assert said[MEMORISED].count(f"training cases was not measured: {COPIED}.") == 2
    assert "median distance to training cases of lung_ddpm" in answer["sentence"]


def test_an_arm_that_was_not_measured_leaves_the_others_their_answer():
    config = parse_config(config_of().model_dump() | {"arms": {"doses": [0.5, 1.0], "controls": ["real", "reference"]}})
    verdict = pd.concat([verdict_of("better"), verdict_of().query(f"arm == '{ARM}'").assign(arm="real+lung_ddpm@0.5")])
    verdict.loc[verdict["arm"] == "real+lung_ddpm@0.5", "verdict"] = "not measured"
    missing = Missing({"real+lung_ddpm@0.5": config.segmentation.replicates()}, [])
    tables = tables_of(verdict=verdict)
    checks = instrument_table(config, tables, missing, [], [])
    assert list(doubted_arms(checks, verdict, config)) == ["real+lung_ddpm@0.5"]
    answer = answer_row(checks, verdict, tables["variance_components"], config, COSTS)
    expected = f"The answer stands for {ARM}. This run cannot tell about real+lung_ddpm@0.5: runs or cases are missing."
    assert answer["sentence"].startswith(expected)
    assert "the missing runs (start the same 'lungddpm run' again)" in answer["sentence"]


def test_a_primary_arm_has_to_be_named_before():
    config = config_of(primary=ARM)
    statuses, _, _ = judge(config=config)
    assert statuses[NAMED] == PASSED
    statuses, said, answer = judge(config=config, late=["real, fold0_seed0"], verdict=verdict_of("better"))
    assert statuses[NAMED] == FAILED
    assert "1 replicate had been evaluated" in said[NAMED]
    assert answer["status"] == CANNOT_TELL


def test_a_run_without_synthetic_ct_has_nothing_to_answer():
    config = parse_config({"arms": {"generators": [], "doses": [], "controls": ["real", "reference"]}})
    statuses, _, answer = judge(config=config)
    assert ENOUGH not in statuses
    assert GENERATOR not in statuses
    assert answer["sentence"] == "No arm has synthetic CT, so there is no question to answer."


def test_the_published_gain_is_relevant_where_nothing_else_is_said():
    _, said, _ = judge(config=config_of(relevant_difference=None), run_sd=0.01)
    assert "the relevant one, 0.032 (the published gain), with " in said[ENOUGH]


def external_checks(sets=("clinic",), confidence=0.95, missing=None, **verdict):
    """The checks of an external test set, by their name."""
    config = config_of(confidence=confidence)
    config = config.model_copy(update={"external_tests": dict.fromkeys(sets)})
    components = tables_of()["variance_components"]
    found = external_instrument_table(config, verdict_of(**verdict), components, missing or Missing({}, []))
    return found.set_index("check")


@pytest.mark.parametrize(
    ("check", "changes", "said"),
    [
        (
            POSITIVE,
            {"positive": "no difference shown"},
            "the gain from more real data on this test set",
        ),
        (NULL, {"null": "worse"}, "which adds nothing, was called worse"),
        (COMPLETE, {"missing": Missing({ARM: ["fold1_seed0"]}, [])}, f"{ARM}, fold1_seed0"),
        (COMPLETE, {"missing": Missing({}, ["clinic-1"])}, "no run segmented: clinic-1"),
    ],
)
def test_checks_of_an_external_test_set(check, changes, said):
    assert external_checks()["status"].to_dict() == dict.fromkeys(OF_TEST_SET, PASSED)
    found = external_checks(**changes)
    assert [name for name, status in found["status"].items() if status == FAILED] == [check]
    assert said in found.loc[check, "sentence"]


def test_what_is_detectable_on_external_test_sets_is_corrected_for_their_number():
    """Bonferroni: two sets at 5 % are each tested as one set at 2.5 %."""
    one, two = external_checks(), external_checks(("clinic", "task06"))
    stricter = external_checks(confidence=0.975)
    assert one.loc[ENOUGH, "value"] < two.loc[ENOUGH, "value"]
    assert two.loc[ENOUGH, "value"] == pytest.approx(stricter.loc[ENOUGH, "value"])


def test_a_set_that_nothing_was_tested_on_lacks_its_cases():
    columns = list(verdict_of()), list(tables_of()["variance_components"])
    nothing = (pd.DataFrame(columns=names) for names in columns)
    found = external_instrument_table(config_of(), *nothing, Missing({}, ["clinic-1", "clinic-2"]))
    assert found[["check", "status", "value"]].to_numpy().tolist() == [[COMPLETE, FAILED, 2.0]]
