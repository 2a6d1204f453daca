"""The page and the manifest: complete in themselves, honest about what is missing, without a trace of the machine."""

import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from made_up_results import case_row
from matplotlib import pyplot

from lungddpm.config.loading import parse_config
from lungddpm.core.cases import CaseFolder, read_cases, write_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of, write_json
from lungddpm.core.volume import write_volume
from lungddpm.report import sections
from lungddpm.report.page import run_report
from lungddpm.report.samples import ranked_samples, samples_to_show, shared_sample
from lungddpm.report.sections import (
    covered_variation,
    extractors_of,
    p_text,
    show_arms,
    show_checks,
    show_costs,
    show_memorisation_and_diversity,
    show_sets,
)
from lungddpm.report.terminal import verdict_table_text
from lungddpm.segmentation.nnunet import fold_folder
from lungddpm.verdict.instrument import GENERATOR
from lungddpm.verdict.tables import write_tables


class Page(HTMLParser):
    """Collects text, images, what the page points to or would load from elsewhere, and open elements."""

    def __init__(self, html):
        super().__init__()
        self.words, self.images, self.links, self.open = [], [], [], []
        self.headings, self.heads_without_scope = [], 0
        self.scrolling = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "th" and "scope" not in values:
            self.heads_without_scope += 1
        if values.get("class") == "scroll" or tag == "pre":
            self.scrolling.append(values)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(values)
        elif address := values.get("href", values.get("src")):
            self.links.append(address)
        if tag not in ("img", "meta", "input", "source", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.words.append(data)


def page_of(results):
    return Page((results / "report.html").read_text(encoding="utf-8"))


def test_code_that_changed_while_a_training_was_under_way_is_named(make_results, read_manifest):
    config, results = make_results()
    model = [{"from_step": 1, "code": "a" * 64}]
    segmenter = [{"from_step": 1, "code": "b" * 64}, {"from_step": 501, "code": "c" * 64}]
    fold = fold_folder(results / "arms/real", 0, 0)
    write_json(results / "models/lung_ddpm/main/all/training.json", {"steps": 6, "code": model})
    write_json(fold / "training.json", {"steps": 1000, "code": segmenter})
    run_report(config, results)
    trained = {"models/lung_ddpm/main/all": model, "arms/real fold0_seed0": segmenter}
    assert read_manifest(results)["training_code"] == trained
    page = (results / "report.html").read_text()
    assert "arms/real fold0_seed0 (from step 501 on)" in page
    assert "models/lung_ddpm/main/all (from step" not in page


def test_full_report(make_results, read_manifest):
    config, results = make_results()
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert {f'id="{link[1:]}"' in html for link in page.links} == {True}
    assert len(html) < 25e6
    assert html.count("plotly.js v") == 1
    assert len(page.images) == 12
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    assert "real+lung_ddpm@1.0: better than real." in page.text
    assert "holds <b>no</b> lungs" in page.text  # escaped, not bold
    assert "patients are simulated" in page.text
    assert "anatomically aware sampling" in page.text
    assert "Cite: Lung-DDPM: Semantic Layout-guided Diffusion Models" in page.text
    assert "several roles" not in page.text
    # Sources and controls without a work to cite declare "None: ...".
    assert "None:" not in page.text
    assert html.index('class="checks"') < html.index('class="outcome stands"') < html.index('class="answers"')
    assert "Segmenters converged passed" in page.text
    assert "No positive control: add `reference` to arms.controls" in page.text
    assert "lung_ddpm against its references: lungs" in page.text
    assert "The answer stands: no check that affects it failed." in page.text
    assert "cannot tell: see the checks" not in page.text

    manifest = read_manifest(results)
    assert {"report.html", "tables/verdict.csv", "figures/forest.svg", "arms/real/arm.json"} <= set(manifest["sha256"])
    for name, recorded in manifest["sha256"].items():
        assert hashlib.sha256((results / name).read_bytes()).hexdigest() == recorded
    assert manifest["config"]["segmentation"]["folds"] == [0, 1]
    # The config is shown in full; jobs do not know which preset it began with.
    assert "preset" not in manifest["config"]
    assert manifest["versions"]["numpy"]


def test_a_screen_reader_finds_its_way(make_results):
    config, results = make_results(n_test=7, n_replicates=2, external={"task06": 8})
    run_report(config, results)
    html, page = (results / "report.html").read_text(encoding="utf-8"), page_of(results)
    # One title; no level is skipped on the way down; checks and answers have headings of their own.
    assert page.headings.count(1) == 1
    assert page.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.text.index("Can this run tell? ") < page.text.index("Arms compared with real ")
    # Every section that the contents list can be reached, and the other way round.
    contents = re.search("<nav.*?</nav>", html, re.DOTALL)[0]
    listed = set(re.findall('href="#([^"]+)"', contents))
    assert listed == set(re.findall('<(?:h2|h3|section)[^>]* id="([^"]+)"', html)) - {"external-task06"}
    assert page.heads_without_scope == 0


def test_what_scrolls_can_be_scrolled_by_keyboard_and_has_a_name(make_results):
    config, results = make_results(n_test=2, n_replicates=1)
    run_report(config, results)
    html, page = (results / "report.html").read_text(encoding="utf-8"), page_of(results)
    assert len(page.scrolling) == html.count('class="scroll"') + html.count("<pre") > 20
    for box in page.scrolling:
        assert (box["tabindex"], box["role"]) == ("0", "group")
        assert box["aria-label"].strip()


def test_signs_are_not_read_aloud(make_results):
    config, results = make_results(n_test=7, n_replicates=2)
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    signs = re.findall(r'<span class="(?:mark|sign)[^>]*>', html)
    assert len(signs) > 5
    assert all('aria-hidden="true"' in sign for sign in signs)


def contrast(one, other):
    """Contrast ratio of two colours (#rrggbb) by WCAG 2.2: 1 to 21."""

    def luminance(colour):
        shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast(make_results):
    # Figures that WCAG gives itself: black on white, and the greys on both sides of the limit.
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") > 4.5 > contrast("#777777", "#ffffff")
    config, results = make_results(n_test=2, n_replicates=1)
    run_report(config, results)
    # Own styles only: those of plotly come with its script.
    style = re.search("<style>(.*?)</style>", (results / "report.html").read_text(encoding="utf-8"), re.DOTALL)[1]
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", style))
    text = {named.get(name, name) for name in re.findall(r"[{;\s]color: (?:var\(--(\w+)\)|#[0-9a-f]+)", style) if name}
    text |= set(re.findall(r"[{;\s]color: (#[0-9a-f]{6})", style))
    assert {named["ink"], named["soft"], named["blue"], named["red"]} <= text
    # The page, the box of a configuration, a row under the mouse.
    grounds = {"#ffffff", *re.findall(r"background: (#[0-9a-f]{6})", style)}
    assert len(grounds) == 3
    assert {(colour, ground) for colour in text for ground in grounds if contrast(colour, ground) < 4.5} == set()


def test_what_paper_cannot_do_is_left_out_or_unfolded(make_results):
    config, results = make_results(n_test=2, n_replicates=1)
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    printed = re.search(r"@media print \{\n  html(.*?)\n\}", html, re.DOTALL)[1]
    assert "details::details-content { content-visibility: visible" in printed
    assert re.search(r"nav, \.screen \{ display: none; \}", printed)
    # Long lists for the screen only are in files that a note names.
    folded = re.findall(r'<details class="screen"><summary>([^<]+)', html)
    assert folded == [
        "Cases of every arm",
        "Published figures without a counterpart in this run",
        "Configuration",
        "SHA-256 of tables, figures and arms",
    ]
    note = page_of(results).text.partition("Not printed: ")[2]
    for name in ("arm.json", "tables/published_comparison.csv", "manifest.json"):
        assert name in note


def test_memory_is_in_the_unit_that_snakemake_measures():
    timing = pd.DataFrame(
        {"stage": ["train"], "job": ["a"], "seconds": [60.0], "max_rss_mb": [512.0], "device": ["CPU"]}
    )
    assert "peak memory, MiB" in sections.show_timing(timing).heads


def test_nothing_names_the_machine(make_results, tmp_path):
    config, results = make_results(n_test=2, n_replicates=1, source={"kind": "images", "path": str(tmp_path / "scans")})
    run_report(config, results)
    for path in [results / "report.html", results / "manifest.json", *results.glob("tables/*")]:
        text = re.sub(r"base64,[\w+/=]+", "", path.read_text(encoding="utf-8"))
        assert str(tmp_path) not in text
        assert str(tmp_path.home()) + "/" not in text


def test_synthetic_ct_of_other_systems_is_called_so(make_results, tmp_path):
    arms = {"generators": ["maisi"], "external": {"maisi": str(tmp_path)}, "controls": ["paste_constant"]}
    config, results = make_results(n_test=2, n_replicates=1, extras=False, arms=arms)
    run_report(config, results)
    text = page_of(results).text
    assert "maisi . external: samples of another system." in text
    assert "paste_constant . Control: lungs of one constant HU in the reference." in text
    assert "Cite:" not in text


def test_one_figure_is_open_at_a_time(make_results, recwarn):
    config, results = make_results()
    pyplot.close("all")  # what other tests have left open
    with pyplot.rc_context({"figure.max_open_warning": 1}):
        run_report(config, results)
    assert not [warning for warning in recwarn if "figures have been opened" in str(warning.message)]
    assert len(list((results / "figures").glob("*.svg"))) > 1


def test_two_cases_one_replicate_and_nothing_else(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    run_report(config, results)
    page = page_of(results)
    assert len(page.images) == 5
    for expected in (
        "Only 2 test cases: too few to decide anything.",
        "the run-to-run variance is not known",
        "With one replicate, the run-to-run variance is not known: nothing can be decided.",
        "This run cannot tell whether synthetic CT helps: it is too small.",
        "cannot tell: see the checks",
        "Image quality was not measured",
        "HU of lung_ddpm were not measured.",
        "No curve has four or more saved states",
        "Label fidelity was not measured",
        "No samples with a nodule",
    ):
        assert expected in page.text


def test_no_test_case_with_a_nodule(make_results):
    config, results = make_results(n_test=2, n_replicates=1, nodules=False, extras=False)
    run_report(config, results)
    assert "Dice was not measured because no test case has a nodule" in page_of(results).text
    assert "not measured" in verdict_table_text(results)


def test_shared_patients_raise_an_alarm(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, roles={"allow_shared_patients": True})
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    assert html.index('class="alarm"') < html.index('class="answers"')


def test_a_test_patient_with_another_role_is_named_on_the_page_and_in_the_terminal(make_results):
    config, results = make_results(n_replicates=3, roles={"allow_shared_patients": True})
    table = read_cases(results / "cases" / "cases.tsv")
    table.loc[table["role"] == "test", "patient_id"] = "patient-00"  # of the discovery case
    write_cases(results / "cases" / "cases.tsv", table.to_dict("records"))
    run_report(config, results)
    for text in (page_of(results).text, verdict_table_text(results)):
        assert "1 test patient also has another role (patient-00)" in " ".join(text.split())
        assert "test patients also have other roles" in " ".join(text.split())


def test_a_control_that_is_not_found_reads_as_cannot_tell(make_results):
    shares = {"real+lung_ddpm": 0.52, "real+reference": 0.52}
    arms, verdict = {"controls": ["real", "reference"]}, {"relevant_difference": 0.05}
    config, results = make_results(n_replicates=3, run_sd=0.1, shares=shares, learning=True, arms=arms, verdict=verdict)
    run_report(config, results)
    page, text = page_of(results).text, verdict_table_text(results)
    assert "real+lung_ddpm@1.0: no difference from real shown. cannot tell: see the checks" in page
    for said in (page, " ".join(text.split())):
        assert "the run does not even detect the gain from more real data" in said
        assert "the segmenters of real and real+lung_ddpm@1.0 were still learning" in said
        assert "It would need: " in said
        # Each job of half an hour, by the times of the run.
        assert " h of jobs, by this run's times)" in said


def test_an_arm_that_is_missing_is_named_before_the_answer(make_results):
    config, results = make_results(n_replicates=3, arms={"controls": ["real", "reference"]})
    shutil.rmtree(results / "segmentation" / "real+lung_ddpm@1.0")
    run_report(config, results)
    page = page_of(results).text
    assert "Not evaluated and left out: real+lung_ddpm@1.0, fold0_seed0, fold1_seed0, fold2_seed0." in page
    assert "This run cannot tell whether synthetic CT helps: " in page
    assert "runs or cases are missing" in page


def test_verdict_as_text(make_results):
    config, results = make_results(n_test=6, n_replicates=1, extras=False)
    run_report(config, results)
    text = verdict_table_text(results)
    lines = text.splitlines()
    assert ["arm", "Dice", "difference", "CI", "p", "verdict"] in [line.split() for line in lines]
    assert all(len(line) <= 100 for line in lines[:-1])
    assert lines[-1] == f"Report: {results / 'report.html'}"
    assert "- real+lung_ddpm@1.0: this run cannot tell whether it differs from real." in text
    assert lines[0] == "? positive control found: not measured"
    assert "! enough runs and cases: failed" in lines
    assert "! With one replicate, the run-to-run variance is not known" in text
    assert "\n> This run cannot tell whether synthetic CT helps: it is too small." in text


def test_checks_come_before_the_answers_and_a_run_with_copied_replicates_claims_nothing(make_results):
    config, results = make_results(verdict={"calibration": {"lungs_hu": 0.001, "nodules_hu": 0.001}})
    folder = results / "segmentation" / "real+real"
    shutil.rmtree(folder / "fold1_seed0")
    shutil.copytree(folder / "fold0_seed0", folder / "fold1_seed0")
    run_report(config, results)
    verdict = pd.read_csv(results / "tables" / "verdict.csv")
    assert not verdict["verdict"].isin(["better", "worse"]).any()
    html, page, text = (
        (results / "report.html").read_text(encoding="utf-8"),
        page_of(results).text,
        verdict_table_text(results),
    )
    assert html.index('class="checks"') < html.index('class="answers"')
    said = (
        "HU calibration of lung_ddpm failed: lungs too",
        "Identical measures in every case: real+real, fold0_seed0; real+real, fold1_seed0.",
        "This run cannot tell whether synthetic CT helps: ",
        "real+lung_ddpm@1.0: not trusted, because replicates of this run are copies.",
    )
    for words in (page, " ".join(text.split())):
        places = [words.index(sentence) for sentence in said]
        assert places == sorted(places)
        assert "better than real." not in words
    assert "! no run is a copy: failed" in text.splitlines()
    assert "runs are copies of others" in page


@pytest.mark.parametrize(
    ("p", "level", "shown"),
    [
        (0.04996, 0.05, "0.04996"), (0.0499999, 0.05, "0.0499999"), (0.05, 0.05, "0.050"), (0.05004, 0.05, "0.050"),
        (0.0499, 0.05, "0.0499"), (0.034, 0.05, "0.034"), (0.0004, 0.05, "< 0.001"), (0.0996, 0.1, "0.0996"),
        (0.21, 0.05, "0.21"), (0.00996, 0.01, "0.00996"), (float("nan"), 0.05, ""),
    ],
)  # fmt: skip
def test_p_shows_on_which_side_of_the_level_it_lies(p, level, shown):
    assert p_text(p, 1 - (1 - level)) == shown


def test_samples_to_show_are_ranked_by_their_error(make_results):
    config, results = make_results(n_test=1, n_replicates=1)
    cohorts = config.cohorts("lung_ddpm", None)
    quality = results / "quality" / "lung_ddpm.csv"
    mse = pd.read_csv(quality).query("image == 'synthetic' and metric == 'mse' and region == 'lungs'")
    by_error = mse.sort_values("value")["case_id"].tolist()
    assert [folder.path.name for folder in ranked_samples(results, "lung_ddpm", cohorts)] == by_error
    assert sorted(by_error) == ["sample-0", "sample-1"]
    quality.unlink()
    assert ranked_samples(results, "lung_ddpm", cohorts) == [
        CaseFolder(results / "synthetic" / "lung_ddpm" / cohorts[0].name / "sample-0")
    ]
    assert ranked_samples(results, "reference", cohorts) == []


def test_one_layout_is_shown_by_all_generators_that_drew_it(make_results):
    config, results = make_results(n_test=1, n_replicates=1, arms={"generators": ["lung_ddpm", "med_ddpm", "lefusion"]})
    first = results / "synthetic" / "lung_ddpm"
    for name in ("med_ddpm", "lefusion"):
        shutil.copytree(first, first.with_name(name), dirs_exist_ok=True)
    # Two draw the same layout; the third was given nodules elsewhere, so it is another sample of that name.
    for folder in map(CaseFolder, first.with_name("lefusion").glob("*/sample-*")):
        _, layout = folder.read()
        write_volume(folder.layout, layout.like(np.roll(layout.array, 1, axis=0)))
    shown = samples_to_show(config, results)
    shared = shared_sample(config, results, shown)
    assert list(shared.drawn) == ["lung_ddpm", "med_ddpm"]
    assert shared.case_id == shown[0].case_id
    only = config.model_copy(update={"arms": config.arms.model_copy(update={"generators": ["lung_ddpm"]})})
    assert shared_sample(only, results, samples_to_show(only, results)) is None


def test_sentences_about_a_primary_arm_do_not_run_together(make_results):
    config, results = make_results(n_test=7, n_replicates=2, verdict={"primary": ["real+lung_ddpm@1.0"]})
    run_report(config, results)
    assert "below that of a primary arm. Nothing is decided" in page_of(results).text


def test_arms_of_fewer_real_cases_are_next_to_their_own_baseline(make_results):
    arms = {"controls": ["real"], "real_cases": [1, "all"], "generators": ["lung_ddpm"]}
    config, results = make_results(n_replicates=3, arms=arms)
    table = pd.read_csv(results / "cases" / "cases.tsv", sep="\t", dtype=str, keep_default_na=False)
    more = table.iloc[[0]].assign(case_id="case-50", patient_id="patient-50")
    pd.concat([table, more]).to_csv(results / "cases" / "cases.tsv", sep="\t", index=False)
    run_report(config, results)
    verdict = pd.read_csv(results / "tables" / "verdict.csv")
    compared = verdict.query("metric == 'dice'").set_index("arm")[["baseline", "real_cases"]]
    assert {arm: tuple(row) for arm, row in compared.iterrows()} == {
        "real1": ("real1", 1), "real1+lung_ddpm@1.0": ("real1", 1), "real1+real": ("real1", 1),
        "real": ("real", 2), "real+lung_ddpm@1.0": ("real", 2), "real+real": ("real", 2),
    }  # fmt: skip
    html = (results / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert "real1+lung_ddpm@1.0: better than real1." in text
    assert "real1: mean" not in text
    assert "Fewer real cases, more gain?" in text
    assert "<code>real4</code>. Both the test patients" in " ".join(html.split())
    assert (results / "figures" / "real_cases.png").exists()


@pytest.mark.parametrize(
    ("overrides", "covered", "shared"),
    [
        ({}, "segmenter, draw of the samples.", ["training of the generator."]),
        (
            {"synthesis": {"draw_per_replicate": False}},
            "segmenter.",
            ["draw of the samples, training of the generator."],
        ),
        ({"synthesis": {"training_per_replicate": True}}, "draw of the samples, training of the generator.", []),
        (
            {"arms": {"generators": ["maisi"], "external": {"maisi": "maisi"}, "controls": []}},
            "segmenter.",
            ["randomness of the other system (maisi"],
        ),
        ({"arms": {"generators": ["reference"], "controls": []}}, "draw of the samples.", []),
    ],
)
def test_the_page_names_the_variation_that_is_covered(overrides, covered, shared):
    (text,) = covered_variation(parse_config(overrides))
    first, _, rest = text.partition("Not covered, because all replicates share it: ")
    assert first.strip().endswith(covered)
    assert bool(rest) == bool(shared)
    for words in shared:
        assert rest.startswith(words)
    assert covered_variation(parse_config({"arms": {"generators": [], "doses": [], "controls": ["real"]}})) == []


def test_samples_of_draws_are_distinguished_in_the_training_sets():
    entry = {"name": "a", "case_id": "a", "patient_id": "p", "source": "phantom", "trained_on": True}
    proof = {"shared_patients": []}
    draws = [
        {"cases": [entry | {"name": f"s{n}", "case_id": f"s{n}", "source": "lung_ddpm", "patient_id": f"r{n}"}]}
        | {"leak_guard": proof if n else {"shared_patients": ["t"]}}
        for n in (0, 1)
    ]
    table = show_arms({"real+lung_ddpm@1.0": {"cases": [entry], "leak_guard": proof, "draws": draws}})
    (row,) = table.rows
    assert row == [
        "real+lung_ddpm@1.0", "2", "1 phantom, 1 lung_ddpm (different ones in each of 2 replicates)", "3", "SHARED: t",
    ]  # fmt: skip


def test_a_run_without_cases_or_verdict_is_refused(make_results, tmp_path):
    config, _ = make_results(n_test=1, n_replicates=1, extras=False)
    with pytest.raises(InputError, match=r"cases\.tsv"):
        run_report(config, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"verdict\.csv"):
        verdict_table_text(tmp_path / "nowhere")


def test_sets_of_images_have_a_row_per_generator_and_image(make_results):
    config, results = make_results(n_test=1, n_replicates=1)
    tables, _ = write_tables(config, results)
    shown = show_sets(tables["image_quality"])
    cells = {row[1]: dict(zip(shown.heads, row, strict=True)) for row in shown.rows}
    floors = ["constant lungs", "shifted references", "other patients", "copies of the references"]
    assert list(cells) == ["synthetic", *floors]
    assert cells["copies of the references"]["step at the lungs' border"] == "1.00"
    assert cells["synthetic"]["FID, lungs"] == ""  # there is one reference only
    assert cells["synthetic"]["KID ± se, lungs"] == ""
    shown = show_memorisation_and_diversity(tables["image_quality"])
    cells = {row[1]: dict(zip(shown.heads, row, strict=True)) for row in shown.rows}
    assert list(cells) == ["synthetic", "constant lungs"]
    assert float(cells["synthetic"]["MS-SSIM of draws, lungs"]) > 0.9
    assert float(cells["synthetic"]["sd of a nodule's voxels, HU"]) > 10
    assert float(cells["synthetic"]["smallest"]) > 0.7
    (extractor,) = extractors_of(tables["image_quality"])
    assert extractor.startswith("ResNet-50, random weights")


def test_costs_are_next_to_what_they_buy(make_results):
    config, results = make_results(n_test=1, n_replicates=2)
    run_report(config, results)
    table = pd.read_csv(results / "tables" / "quality_and_cost.csv").set_index("generator")
    assert list(table.index) == ["(real CT)", "lung_ddpm"]
    row = table.loc["lung_ddpm"]
    # The published sampler visits all of its 250 noise levels.
    assert (row["function_evaluations"], row["seconds_per_volume"], row["memory_mib"]) == (250, 2.5, 810)
    fidelity = pd.read_csv(results / "tables" / "label_fidelity.csv").set_index("generator")["dice_mean"]
    assert row["label_fidelity_dice"] == fidelity["lung_ddpm"]
    assert table.loc["(real CT)", "label_fidelity_dice"] == fidelity["(real CT)"] == 1
    calibration = pd.read_csv(results / "tables" / "calibration.csv").query("measure == 'hu_difference'")
    assert row["nodule_hu_difference"] == calibration.set_index("region").loc["nodules", "mean"]
    shown = show_costs(table.reset_index().fillna({"device": ""})).rows
    assert [line[:5] for line in shown] == [["(real CT)", "", "", "", ""], ["lung_ddpm", "250", "2.5", "810", "cpu"]]
    page = page_of(results)
    assert "Quality against cost" in page.text
    assert any("over function evaluations" in image["alt"] for image in page.images)


def test_label_fidelity_has_the_ceiling_first(make_results):
    config, results = make_results(n_test=1, n_replicates=2)
    run_report(config, results)
    fidelity = pd.read_csv(results / "tables" / "label_fidelity.csv").set_index("generator")
    assert list(fidelity.index) == ["(real CT)", "lung_ddpm"]
    # Of the 27 voxels of each nodule one was lost in one replicate, two in the other.
    dice = [2 * 26 / 53, 2 * 25 / 52]
    assert fidelity.loc["(real CT)", "dice_mean"] == 1
    assert fidelity.loc["lung_ddpm", "difference"] == pytest.approx(sum(dice) / 2 - 1)
    runs = pd.read_csv(results / "tables" / "label_fidelity_runs.csv").query("generator == 'lung_ddpm'")
    assert runs["dice"].tolist() == pytest.approx(dice)
    page = page_of(results)
    assert page.text.index("Label fidelity Does the synthetic CT") > page.text.index("Image quality Floors are made")
    assert "lung_ddpm 2 0.971 ± 0.000 −0.029" in page.text
    assert (results / "figures" / "label_fidelity.svg").exists()


def test_label_fidelity_of_missing_replicates_is_that_of_the_others(make_results):
    config, results = make_results(n_test=1, n_replicates=2)
    shutil.rmtree(results / "label_fidelity" / "fold1_seed0")
    tables, _ = write_tables(config, results)
    row = tables["label_fidelity"].set_index("generator").loc["lung_ddpm"]
    assert row["n_replicates"] == 1
    assert row["dice_mean"] == pytest.approx(2 * 26 / 53)
    assert pd.isna(row["ci_low"])


def test_external_test_sets_are_next_to_the_verdict(make_results):
    config, results = make_results(n_test=7, n_replicates=2, extras=False, external={"task06": 8, "ours": 3})
    run_report(config, results)
    page, folder = page_of(results), results / "tables"
    assert {"#external", "#external-task06", "#external-ours"} <= set(page.links)
    assert "exploratory" in page.text
    assert "for the 2 sets by Bonferroni" in page.text
    external = pd.read_csv(folder / "external_verdict.csv")
    for sentence in external.query("arm == 'real+lung_ddpm@1.0' and metric == 'dice'")["sentence"]:
        claim, _, numbers = sentence.partition(". ")
        assert f"{claim}." in page.text
        assert numbers in page.text
    assert "8 test cases of 8 patients, 8 with a nodule" in page.text
    assert "Only 3 test cases: too few to decide anything." in page.text
    # The verdict of the run is that of its own test patients alone.
    verdict = pd.read_csv(folder / "verdict.csv")
    assert set(verdict["n_cases"]) == {7}
    assert not verdict["sentence"].str.contains("task06").any()
    assert "test, external: task06 8 8 8" in page.text
    assert "test 7 7 7" in page.text
    assert {"forest-task06.svg", "froc-task06.svg", "froc-ours.svg"} <= {path.name for path in results.rglob("*.svg")}
    shown = verdict_table_text(results)
    first = shown.index("On external test sets (exploratory")
    assert first < shown.index("- real+lung_ddpm@1.0 on task06: ") < shown.index("- real+lung_ddpm@1.0 on ours: ")
    # Each has its own checks: three cases decide nothing, and the page doubts the arm on that set.
    few = "3 test cases are too few to decide anything."
    assert f"! ours: enough runs and cases: failed. {few}" in shown.replace("\n  ", " ")
    assert few in page.text
    assert "ours : real+lung_ddpm@1.0 cannot tell (see its checks)" in page.text
    assert {"#checks-ours"} <= set(page.links)
    assert "at 1/8 at 1/4 at 1/2 at 1 at 2 at 4 at 8 CPM (95 % band)" in page.text
    assert "real 1.00 1.00 1.00 1.00 1.00 1.00 1.00 1.000 (1.000 to 1.000)" in page.text


def test_an_external_test_set_that_nothing_was_tested_on_is_named(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    ours = {"ours": {"kind": "lidc", "path": "/data/ours"}}
    config = parse_config(config.model_dump(exclude_unset=True) | {"external_tests": ours})
    table = results / "cases/cases.tsv"
    row = case_row("ours-1", "patient-ours-1", "test", data_set="ours")
    write_cases(table, pd.concat([read_cases(table), pd.DataFrame([row])]))
    run_report(config, results)
    said = "Test cases that no run segmented: ours-1."
    assert f"External test set ours has no result. {said}" in page_of(results).text
    assert f"! ours: nothing missing: failed. {said}" in verdict_table_text(results).replace("\n  ", " ")


def test_external_test_sets_have_the_limits_of_their_own_cases(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, external={"task06": 8})
    values = config.model_dump(exclude_unset=True)
    values["external_tests"] |= {"later": {"kind": "lidc", "path": "/data/later"}}
    config, table = parse_config(values), results / "cases/cases.tsv"
    cases = read_cases(table)
    cases.loc[cases["data_set"] == "task06", "patient_id"] = [f"p{n // 2}" for n in range(8)]
    write_cases(table, cases)
    for path in results.glob("segmentation/*/*/metrics.csv"):
        metrics = pd.read_csv(path)
        metrics["patient_id"] = metrics["case_id"].map(cases.set_index("case_id")["patient_id"])
        metrics.to_csv(path, index=False)
        record = json.loads(path.with_name("evaluation.json").read_text())
        record["sha256"]["metrics.csv"] = sha256_of(path)
        write_json(path.with_name("evaluation.json"), record)
    run_report(config, results)
    text = page_of(results).text
    assert "8 test cases come from 4 patients, but are treated as independent." in text
    # p is corrected for all sets of the config, tested or not.
    assert "for the 2 sets by Bonferroni" in text


def test_the_table_in_the_terminal_has_every_number_in_full(make_results):
    name = "latent_diffusion_with_hint_slice"
    arms = {
        "generators": [name],
        "doses": [0.25],
        "real_cases": [2, "all"],
        "external": {name: "/data/x"},
        "controls": [],
    }
    config, results = make_results(n_test=7, n_replicates=2, extras=False, arms=arms)
    run_report(config, results)
    text = verdict_table_text(results)
    assert "…" not in text
    row = pd.read_csv(results / "tables/verdict.csv").query(f"arm == 'real2+{name}@0.25' and metric == 'dice'").iloc[0]
    assert f"real2+{name}@0.25" in text
    assert f"{row['mean']:.3f}" in text


def test_a_run_without_external_test_sets_does_not_mention_them(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    run_report(config, results)
    page = page_of(results)
    assert "#external" not in page.links
    assert "xternal test set" not in page.text
    assert "xternal test set" not in verdict_table_text(results)


def test_a_p_that_rounds_to_zero_is_not_shown_as_zero():
    rows = [
        {"check": name, "subject": "", "measure": "p", "value": value, "status": "passed", "sentence": "so"}
        for name, value in (("small", 6.7e-8), ("none", 0.0), ("usual", 0.034))
    ]
    shown = show_checks(pd.DataFrame(rows).assign(limit_low=math.nan, limit_high=0.05))
    assert [check.lines[0]["figure"] for check in shown] == ["< 0.001", "0", "0.034"]


def test_a_check_of_many_generators_is_one_row_for_each():
    rows = [
        {
            "check": GENERATOR, "subject": f"rival_{n}", "measure": measure, "value": value, "sentence": "so",
            "limit_low": low, "limit_high": high, "status": status,
        }
        for n in range(5)
        for measure, value, low, high, status in (
            ("limits of HU exceeded", float(n), math.nan, 0.0, "failed" if n else "passed"),
            ("Dice on synthetic CT, over that on real CT", math.nan, 0.8, math.nan, "not measured"),
        )
        if (n, value) != (4, 4.0)
    ]  # fmt: skip
    (shown,) = show_checks(pd.DataFrame(rows))
    assert shown.overview.heads == ["", "limits of HU exceeded (limit: 0)", "label fidelity (limit: at least 0.8)"]
    assert shown.overview.rows[:2] == [["rival_0", "✓ 0", "–"], ["rival_1", "✗ 1", "–"]]
    assert shown.overview.rows[4] == ["rival_4", "", "–"]
    assert shown.status == "failed"
    (few,) = show_checks(pd.DataFrame(rows[:4]))
    assert few.overview is None


def test_a_check_passes_in_part_where_some_was_not_measured():
    def shown(*statuses):
        rows = [
            {
                "check": GENERATOR,
                "subject": f"rival_{n // 2}",
                "measure": str(n % 2),
                "status": status,
                "sentence": "so",
            }
            for n, status in enumerate(statuses)
        ]
        table = pd.DataFrame(rows).assign(value=1.0, limit_low=0.0, limit_high=2.0)
        (check,) = show_checks(table)
        return check.status, check.passed

    in_part = "passed in part, the rest not measured"
    assert shown(*["passed"] * 8) == ("passed", "Passed for all 4")
    some_open = ["passed", "not measured", "passed", "passed", "passed", "passed", "not measured", "passed"]
    assert shown(*some_open) == (in_part, f"Passed for 2 of 4; the others {in_part}")
    assert shown(*["not measured"] * 4)[0] == "not measured"
    assert shown("passed", "failed", "not measured", "passed")[0] == "failed"


def test_a_check_of_many_is_a_table_on_the_page_and_its_sentences_are_folded(make_results, monkeypatch):
    config, results = make_results()
    run_report(config, results)
    assert "In sentences" not in page_of(results).text
    monkeypatch.setattr(sections, "MANY", 0)
    run_report(config, results)
    text = page_of(results).text
    assert "In sentences" in text
    assert "Passed for all 1" in text
