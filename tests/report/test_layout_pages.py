"""The pages on which layouts are checked: every link leads somewhere, every figure is the record's."""

from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.core.cases import COLUMNS, write_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import write_json
from lungddpm.report.html import show_excluded
from lungddpm.report.layout_pages import run_qc, unusual

CONFIG = parse_config({"layouts": {"limits": {"lung_litres": [1.5, 9], "vessel_share": [0.01, 0.2]}}})


class Page(HTMLParser):
    """Addresses and words of a page."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.words.append(data)


def nodule(**changes):
    figures = {"readers": 3, "equivalent_diameter_mm": 12.34, "volume_mm3": 984.4, "layout_volume_mm3": 1001.0,
               "texture": None, "malignancy": 4.5, "subtlety": 3.0, "touches_pleura": True, "touches_vessel": False,
               "notes": "open contours: 2"}  # fmt: skip
    return figures | changes


def record(**changes):
    qc = {"lung_litres_right": 2.5, "lung_litres_left": 2.0, "smaller_lung_share": 0.444,
          "end_slice_share_bottom": 0.021, "end_slice_share_top": 0.0, "vessel_share_of_lungs": 0.0375,
          "nodule_share_in_or_touching_lungs": 0.97, "notes": [], "n_nodules": 1, "nodules": [nodule()]}  # fmt: skip
    return {"qc": qc | changes}


def row(case_id, **changes):
    values = dict.fromkeys(COLUMNS, "") | dict.fromkeys([c for c in COLUMNS if c.startswith(("size", "spacing"))], 1)
    state = {
        "case_id": case_id,
        "patient_id": f"P {case_id}",
        "role": "test",
        "n_nodules": 1,
        "status": "ok",
        "path": case_id,
    }
    return values | state | changes


@pytest.fixture
def make_pages(tmp_path):
    """(rows, {case id: qc changes}) -> the folder of the pages."""

    def make(rows, changes):
        folder = tmp_path / "cases"
        write_cases(folder / "cases.tsv", rows)
        for case in rows:
            if case["status"] == "ok":
                write_json(folder / case["path"] / "case.json", record(**changes.get(case["case_id"], {})))
                (folder / case["path"] / "qc.png").write_bytes(b"a picture")
        run_qc(CONFIG, folder / "cases.tsv", tmp_path / "qc")
        return tmp_path / "qc"

    return make


def test_every_address_leads_to_a_file(make_pages):
    folder = make_pages(
        [row("first"), row("a#b%41 c"), row("index"), row("lost", status="excluded", reason="no lungs", path="")], {}
    )
    pages = [folder / "index.html", *(folder / "cases").glob("*.html")]
    assert len(pages) == 4
    for page in pages:
        addresses = Page(page).addresses
        assert addresses
        for address in addresses:
            assert (page.parent / unquote(address)).is_file(), f"{page.name}: {address}"


def test_a_case_page_shows_figures_limits_and_nodules(make_pages):
    folder = make_pages([row("one"), row("two")], {"two": {"vessel_share_of_lungs": 0.0575}})
    text = Page(folder / "cases/one.html").text
    assert "both lungs, litres 4.50 1.5 to 9 4.50 to 4.50" in text
    assert "vessels, % of the lungs 3.8 1 to 20 4.2 to 5.2" in text
    assert "1 3 12.3 984 1001 4.5 3.0 yes no open contours: 2" in text
    assert "Patient P one" in text


def test_a_case_without_nodules_has_none_listed(make_pages):
    folder = make_pages(
        [row("none", n_nodules=0)], {"none": {"n_nodules": 0, "nodules": [], "nodule_share_in_or_touching_lungs": None}}
    )
    text = Page(folder / "cases/none.html").text
    assert "None." in text
    assert "nan" not in text


def test_the_overview_names_what_is_unusual_and_what_is_excluded(make_pages):
    rows = [row(f"case{number}") for number in range(9)] + [
        row("gone", status="excluded", reason="the lungs are cut off")
    ]
    litres = {f"case{number}": {"lung_litres_right": 2.0 + 0.1 * number} for number in range(8)}
    text = Page(make_pages(rows, litres | {"case8": {"lung_litres_right": 0.4}}) / "index.html").text
    assert "case8 : right lung, litres: 0.4; both lungs, litres: 2.4" in text
    assert "gone P gone the lungs are cut off" in text


def test_a_page_of_a_case_that_is_gone_is_removed(make_pages):
    make_pages([row("old"), row("kept")], {})
    folder = make_pages([row("kept")], {})
    assert [page.stem for page in (folder / "cases").iterdir()] == ["kept"]


def test_a_missing_record_is_reported(tmp_path):
    write_cases(tmp_path / "cases/cases.tsv", [row("one")])
    with pytest.raises(InputError, match=r"one/case\.json.*prepare"):
        run_qc(CONFIG, tmp_path / "cases/cases.tsv", tmp_path / "qc")


def test_unusual_follows_the_modified_z_score():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 30])
    # median 4.5, median distance 2, so 0.6745 * 25.5 / 2 = 8.6 for the last and 1.2 for the first.
    assert unusual(pd.DataFrame({"a": values, "same": 1.0}))["a"].tolist() == [False] * 7 + [True]
    assert not unusual(pd.DataFrame({"a": values[1:]})).to_numpy().any()


def test_many_exclusions_are_joined_by_the_kind_of_reason():
    rows = [
        row(f"c{n}", status="excluded", reason=f"folder {n}: {n} slices are missing. Copy it again.") for n in range(40)
    ]
    rows.append(row("x", status="excluded", reason="CT: no lungs were found. Use chest CT."))
    shown = show_excluded(pd.DataFrame(rows))
    assert shown.rows == [
        ["40", "folder 0: 0 slices are missing. Copy it again.", "c0, c1, c2"],
        ["1", "CT: no lungs were found. Use chest CT.", "x"],
    ]


def test_notes_on_how_a_scan_was_read_are_shown(make_pages):
    folder = make_pages([row("a"), row("b")], {"a": {"notes": ["sheared axes (tilted gantry) were resampled"]}})
    assert "Note: sheared axes (tilted gantry) were resampled." in Page(folder / "cases" / "a.html").text
    assert "Note:" not in Page(folder / "cases" / "b.html").text
