"""The page and the manifest: complete in themselves, honest about what is missing, without a trace of the machine."""

import hashlib
import re
from html.parser import HTMLParser

import pytest

from lungddpm.errors import InputError
from lungddpm.verdict.report import run_report, typical_sample, verdict_table_text


class Page(HTMLParser):
    """Collects text, image sources, references to other files, and open elements."""

    def __init__(self, html):
        super().__init__()
        self.words, self.images, self.links, self.open = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        elif tag in ("script", "link", "iframe") or "href" in values:
            self.links.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(results):
    return Page((results / "report.html").read_text(encoding="utf-8"))


def test_full_report(make_results, read_manifest):
    config, results = make_results()
    run_report(config, results)
    page = page_of(results)
    assert page.open == []
    assert page.links == []
    assert len(page.images) == 4
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    assert "real+lung_ddpm@1.0: better than real." in page.text
    assert "holds <b>no</b> lungs" in page.text  # escaped, not bold
    assert "computed phantoms" in page.text
    assert "anatomically aware sampling" in page.text
    assert "several roles" not in page.text

    manifest = read_manifest(results)
    assert {"report.html", "tables/verdict.csv", "figures/forest.svg", "arms/real/arm.json"} <= set(manifest["sha256"])
    for name, recorded in manifest["sha256"].items():
        assert hashlib.sha256((results / name).read_bytes()).hexdigest() == recorded
    assert manifest["config"]["segmentation"]["folds"] == [0, 1]
    assert manifest["versions"]["numpy"]


def test_nothing_names_the_machine(make_results, tmp_path):
    config, results = make_results(n_test=2, n_replicates=1, source={"kind": "nifti", "path": str(tmp_path / "scans")})
    run_report(config, results)
    for path in [results / "report.html", results / "manifest.json", *results.glob("tables/*")]:
        text = re.sub(r"base64,[\w+/=]+", "", path.read_text(encoding="utf-8"))
        assert str(tmp_path) not in text
        assert str(tmp_path.home()) + "/" not in text


def test_two_cases_one_replicate_and_nothing_else(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    run_report(config, results)
    page = page_of(results)
    assert len(page.images) == 2
    for expected in (
        "With 2 test cases nothing can be decided",
        "luck of a training run is not covered",
        "Image quality was not measured",
        "No samples with a nodule",
    ):
        assert expected in page.text


def test_no_test_case_with_a_nodule(make_results):
    config, results = make_results(n_test=2, n_replicates=1, nodules=False, extras=False)
    run_report(config, results)
    assert "Dice was not measured, no test case has a nodule" in page_of(results).text
    assert "not measured" in verdict_table_text(results)


def test_shared_patients_are_shouted(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, roles={"allow_shared_patients": True})
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    assert html.index('class="alarm"') < html.index('class="answers"')


def test_verdict_as_text(make_results):
    config, results = make_results(n_test=6, n_replicates=1, extras=False)
    run_report(config, results)
    text = verdict_table_text(results)
    lines = text.splitlines()
    assert lines[0].split() == ["arm", "Dice", "difference", "CI", "p", "verdict"]
    assert all(len(line) <= 100 for line in lines[:-1])
    assert lines[-1] == f"Report: {results / 'report.html'}"
    assert "- real+lung_ddpm@1.0: better than real in one training run." in text


def test_the_sample_shown_is_the_typical_one(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    quality = results / "quality" / "lung_ddpm.csv"
    assert typical_sample(results, "lung_ddpm").parent == results / "synthetic" / "lung_ddpm"
    quality.unlink()
    assert typical_sample(results, "lung_ddpm").name == "sample-0"
    assert typical_sample(results, "reference") is None


def test_a_run_without_cases_or_verdict_is_refused(make_results, tmp_path):
    config, _ = make_results(n_test=1, n_replicates=1, extras=False)
    with pytest.raises(InputError, match=r"cases\.tsv"):
        run_report(config, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"verdict\.csv"):
        verdict_table_text(tmp_path / "nowhere")
