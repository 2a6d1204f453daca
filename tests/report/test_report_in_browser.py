"""The report in a real browser: it loads alone, without an error, can be browsed, fits a phone, and prints."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from jinja2 import Environment, PackageLoader

from lungddpm.core.cases import CaseFolder
from lungddpm.core.drawing import PLANES, oriented_slice
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.quality.image_quality import Sample, read_sample
from lungddpm.report.page import run_report
from lungddpm.report.samples import DisplaySample
from lungddpm.report.viewer import viewer_values

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Before all other scripts: what goes wrong, and what the page would have fetched.
WATCH = """<script>
const errors = [];
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(kind + ": " + words.join(" "));
addEventListener("error", event => errors.push("error: " + (event.message || event.target.src)), true);
addEventListener("unhandledrejection", event => errors.push("rejection: " + event.reason));
addEventListener("securitypolicyviolation", event => errors.push("outside: " + event.blockedURI));
</script>"""

# After all other scripts: use the page as a reader would, and record what it then shows.
PROBE = """<script>
addEventListener("load", async () => {
  const shows = async wanted => {
    while (document.getElementById("viewer").dataset.shows !== wanted) await new Promise(done => setTimeout(done, 50));
    return shown();
  };
  const panels = name => document.getElementById("viewer-" + name).data.slice(0, 4);
  const shown = () => Object.fromEntries(["axial", "coronal", "sagittal"].map(name => [name, {
    z: panels(name).map(panel => panel.z.map(line => [...line])),
    range: panels(name).map(panel => [panel.zmin, panel.zmax]),
    reported: document.getElementById("viewer-at-" + name).textContent,
    drawn: document.querySelectorAll(`#viewer-${name} .heatmaplayer image`).length,
    bottom: document.querySelector(`#viewer-${name} .main-svg`).getBoundingClientRect().bottom,
    slider: document.querySelector(`#viewer-slice-${name}`).closest(".slider").getBoundingClientRect().top,
  }]));
  const seen = {start: await shows("0 9 7 6 -1350 150")};
  for (const name of Object.keys(seen.start)) {
    const slider = document.getElementById("viewer-slice-" + name);
    slider.value = 2;
    slider.dispatchEvent(new Event("input"));
  }
  seen.moved = await shows("0 2 2 2 -1350 150");
  document.querySelector("[name=viewer-window][value=mediastinum]").click();
  seen.mediastinum = await shows("0 2 2 2 -160 240");
  document.querySelector("#viewer-nodules button").click();
  seen.nodule = await shows("0 9 7 6 -160 240");
  const picker = document.getElementById("viewer-sample");
  picker.value = 1;
  picker.dispatchEvent(new Event("change"));
  seen.other = await shows("1 9 7 6 -160 240");
  seen.samples = [...picker.options].map(option => option.textContent);
  seen.images = [...document.images].map(image => image.complete && image.naturalWidth > 0);
  seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  const note = document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify({...seen, errors});
  document.body.append(note);
});
</script>"""

# What is written of the slices, and of the axial voxel (12, 3), found by where plotly has drawn it.
PROBE_POSITIONS = """<script>
addEventListener("load", async () => {
  while (!document.getElementById("viewer").dataset.shows) await new Promise(done => setTimeout(done, 50));
  const axial = document.getElementById("viewer-axial"), {x0, dx, y0, dy} = axial.data[0];
  axial.emit("plotly_hover", {points: [{x: x0 + 12 * dx, y: y0 + 3 * dy}]});
  const note = document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify({
    slices: ["axial", "coronal", "sagittal"].map(name => document.getElementById("viewer-at-" + name).textContent),
    hovered: document.getElementById("viewer-values").textContent,
  });
  document.body.append(note);
});
</script>"""

# A phone of 420 px, narrower than a window can be: a frame, and what the page in it reports about its widths.
PHONE = """<!DOCTYPE html><body><iframe src="framed.html" width="420" height="900"></iframe><script>
addEventListener("message", ({data}) => {
  const note = document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify(data);
  document.body.append(note);
});
</script></body>"""
MEASURE_WIDTHS = """<script>
addEventListener("load", async () => {
  while (!document.getElementById("viewer").dataset.shows) await new Promise(done => setTimeout(done, 50));
  document.querySelectorAll("details").forEach(folded => { folded.open = true; });
  const page = document.documentElement, scrolls = element => element.closest(".scroll, pre");
  const wider = [...document.body.querySelectorAll("*")]
    .filter(element => !scrolls(element) && element.getBoundingClientRect().right > page.clientWidth + 1);
  parent.postMessage({
    phone: innerWidth,
    excess: page.scrollWidth - page.clientWidth,
    wider: wider.map(element => element.outerHTML.slice(0, 80)),
    scrolled: [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
  }, "*");
});
</script>"""


@pytest.fixture
def chromium(tmp_path):
    """A function that opens a page in Chromium with options; what Chromium writes to standard output and error."""
    if CHROMIUM is None:
        pytest.skip("no chromium or chrome is installed")

    def chromium(page, *options):
        # Ten minutes of the page's own clock, which runs ahead whenever the page is idle.
        common = [
            "--headless=new",
            "--disable-gpu",
            "--disable-background-networking",
            "--virtual-time-budget=600000",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        if os.geteuid() == 0:
            common.append("--no-sandbox")  # Chromium refuses to run as root with it
        command = [CHROMIUM, *common, *options, page.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout, run.stderr

    return chromium


@pytest.fixture
def open_page(chromium):
    """A function that opens a page in Chromium and returns what its scripts wrote into the element `seen`."""

    def open_page(page):
        shown, errors = chromium(page, "--dump-dom", "--window-size=1400,1000")
        found = re.search(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL)
        assert found, f"the probe did not end: {errors[-2000:]}"
        return json.loads(unescape(found[1]))

    return open_page


@pytest.fixture
def count_printed(chromium, tmp_path):
    """A function that prints a page to PDF and counts the sheets."""

    def count_printed(html):
        page, pdf = tmp_path / "printed.html", tmp_path / "printed.pdf"
        page.write_text(html, encoding="utf-8")
        pdf.unlink(missing_ok=True)
        _, errors = chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
        assert pdf.exists(), errors[-2000:]
        return len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))

    return count_printed


@pytest.fixture
def browse(tmp_path, open_page):
    """A function that opens a page with the watch and the probe in it, and returns what the probe recorded."""

    def browse(page):
        html = page.read_text(encoding="utf-8")
        probed = tmp_path / "probed.html"
        html = html.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{PROBE}</body>")
        probed.write_text(html, encoding="utf-8")
        return open_page(probed)

    return browse


def test_slices_in_a_browser(make_results, browse):
    config, results = make_results(n_test=2, n_replicates=1)
    run_report(config, results)
    seen = browse(results / "report.html")
    assert seen["errors"] == []
    assert seen["images"]
    assert all(seen["images"])
    assert [address for address in seen["fetched"] if not address.startswith(("data:", "blob:"))] == []

    titles = [re.match(r"lung_ddpm: (\S+) from (\S+)", title) for title in seen["samples"]]
    assert len(titles) == 2
    samples = [
        read_sample(
            CaseFolder(results / "synthetic" / "lung_ddpm" / "all-fold0_seed0" / title[1]),
            results / "cases" / "cases.tsv",
        )
        for title in titles
    ]
    assert [sample.reference.case_id for sample in samples] == [title[2] for title in titles]

    def check(state, sample, voxel, window):
        difference = sample.ct.array.astype(int) - sample.reference.ct.array
        volumes = (sample.reference.ct.array, sample.layout.array, sample.ct.array, difference)
        for plane in PLANES:
            panels = seen[state][plane.name]
            for shown, volume in zip(panels["z"], volumes, strict=True):
                # plotly draws lines upwards and, here, columns from right to left.
                np.testing.assert_array_equal(
                    np.array(shown)[::-1, ::-1], oriented_slice(volume, plane, voxel[plane.axis])
                )
            assert panels["drawn"] == 4
            assert panels["bottom"] == pytest.approx(panels["slider"], abs=10)
            assert panels["range"][0] == panels["range"][2] == window
            assert panels["reported"].startswith(f"slice {voxel[plane.axis] + 1} of {volumes[0].shape[plane.axis]}, ")

    lung, mediastinum, nodule = [-1350, 150], [-160, 240], (9, 7, 6)
    check("start", samples[0], nodule, lung)
    check("moved", samples[0], (2, 2, 2), lung)
    check("mediastinum", samples[0], (2, 2, 2), mediastinum)
    check("nodule", samples[0], nodule, mediastinum)
    check("other", samples[1], nodule, mediastinum)


def test_positions_are_those_of_a_rotated_grid(open_page, tmp_path):
    """As of a patient who lay 10 degrees askew: a voxel's x depends on its row, too."""
    shape, spacing, angle = (40, 36, 30), (5.0, 6.0, 7.0), np.radians(10)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, :3] *= spacing
    affine[:3, 3] = [-90, -120, -400]
    layout = np.zeros(shape, np.uint8)
    layout[30, 25, 8] = Label.NODULE
    sample = Sample(Volume(np.zeros(shape, np.int16), affine), Volume(layout, affine), reference=None)
    template = '<!DOCTYPE html><body>{% from "viewer.html.jinja" import view %}{{ view(viewer) }}'
    page = Environment(loader=PackageLoader("lungddpm.report", "templates"), autoescape=True).from_string(template)
    html = page.render(viewer=viewer_values([DisplaySample("external", "a", "", sample)]))
    (tmp_path / "page.html").write_text(html + PROBE_POSITIONS, encoding="utf-8")
    seen = open_page(tmp_path / "page.html")

    def shown_mm(voxel):
        return [f"{value:.0f}".replace("-", "−") for value in np.rint(affine @ [*voxel, 1])[:3]]

    x, y, z = shown_mm((30, 25, 8))
    assert seen["slices"] == [
        f"slice 9 of 30, z = {z} mm",
        f"slice 26 of 36, y = {y} mm",
        f"slice 31 of 40, x = {x} mm",
    ]
    x, y, z = shown_mm((12, 3, 8))
    assert seen["hovered"].startswith(f"x {x}, y {y}, z {z} mm: ")


def test_the_page_fits_a_phone(make_results, open_page, tmp_path):
    config, results = make_results(n_test=2, n_replicates=1)
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8").replace("</body>", f"{MEASURE_WIDTHS}</body>")
    (tmp_path / "framed.html").write_text(html, encoding="utf-8")
    (tmp_path / "phone.html").write_text(PHONE, encoding="utf-8")
    seen = open_page(tmp_path / "phone.html")
    assert seen["phone"] == 420
    assert seen["excess"] == 0
    assert seen["wider"] == []
    # Wide tables and figures scroll in their own boxes.
    assert seen["scrolled"] > 10


def test_paper_shows_what_the_screen_folds(make_results, count_printed):
    config, results = make_results(n_test=60, n_replicates=1)
    run_report(config, results)
    html = (results / "report.html").read_text(encoding="utf-8")
    # Without a class: those with the class `screen` are left out on paper.
    folded = re.compile("<details>(.*?)</details>", re.DOTALL)
    assert len(folded.findall(html)) > 2
    sheets = count_printed(html)
    assert 8 <= sheets <= 40
    assert sheets == count_printed(folded.sub(r"<details open>\1</details>", html))
    assert sheets > count_printed(folded.sub("", html))
