"""The readers on mutated files: they raise nothing but errors for users, in bounded time and memory."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lidc_files import STORED, enhance, nodule, roi, write_case, write_series, xml
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.volume import Volume
from lungddpm.layouts.nodules import find_nodules
from lungddpm.sources import Scan, lidc
from lungddpm.sources.index import index_source
from lungddpm.sources.lidc import pairing, readings
from lungddpm.sources.lidc.headers import read_headers
from lungddpm.sources.lidc.slices import stack_of

NUMBERS = [
    b"-1", b"1e999", b"nan", b"-inf", b"0x10", b"9" * 30, b"9" * 5000, b"1_0", b"", b" ", b"2147483648", b"3.5", b"-0",
    b"\xd9\xa3", b"99999",
]  # fmt: skip
INSERTED = [
    b"<a>" * 3000,
    b"<readingSession>" * 500,
    b"</a>",
    b"x" * 100_000,
    b"&#0;",
    b"&amp;" * 1000,
    b"&nbsp;",
    b"<![CDATA[" + b"]" * 999 + b"]]>",
    b"<!-- -- -->",
    b"<?xml version='1.0' encoding='utf-7'?>",
    b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b" xmlns:q='u'",
]
ENCODINGS = [
    b"utf-16",
    b"utf-7",
    b"latin-1",
    b"rot13",
    b"zip",
    b"idna",
    b"no-such",
    b"ascii",
    b"UTF-8" * 99,
    b"punycode",
]


def flip(draw, data):
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 20))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


def _span(draw, data):
    start = draw(st.integers(0, len(data) - 1))
    return start, start + draw(st.integers(1, max(1, len(data) // 4)))


def delete(draw, data):
    start, stop = _span(draw, data)
    return data[:start] + data[stop:]


def double(draw, data):
    start, stop = _span(draw, data)
    return data[:stop] + data[start:stop] * draw(st.integers(1, 4)) + data[stop:]


def truncate(draw, data):
    return data[: draw(st.integers(0, len(data)))]


def insert(draw, data):
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.sampled_from(INSERTED)) + data[at:]


def renumber(draw, data):
    for _ in range(draw(st.integers(1, 3))):
        numbers = list(re.finditer(rb">\s*[-+.0-9]+\s*<", data))
        if not numbers:
            break
        found = numbers[draw(st.integers(0, len(numbers) - 1))]
        data = data[: found.start()] + b">" + draw(st.sampled_from(NUMBERS)) + b"<" + data[found.end() :]
    return data


def swap_elements(draw, data):
    names = sorted({name for name in re.findall(rb"<(\w+)", data)})
    if not names:
        return data
    old, new = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    return re.sub(rb"(</?)" + old + rb"\b", rb"\g<1>" + new, data)


def recode(draw, data):
    body = data.partition(b"?>")[2] or data
    how = draw(st.sampled_from(["declared", "utf-16", "utf-16-be", "utf-8-sig"]))
    if how == "declared":
        return b'<?xml version="1.0" encoding="' + draw(st.sampled_from(ENCODINGS)) + b'"?>' + body
    return body.decode("latin-1").encode(how)


MUTATIONS = [flip, delete, double, truncate, insert, renumber, swap_elements, recode]


@st.composite
def mutated(draw, originals):
    """One to three mutations of one of the files."""
    data = draw(st.sampled_from(originals))
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        data = mutate(draw, data) or b"<"
    return data


@pytest.fixture(scope="module")
def phantom_files(cohort):
    """XML of the phantom, and one small file that fits `STORED`."""
    own = xml(nodule(roi(1), roi(2)), nodule(roi(1), roi(1, [(4, 4)], inclusion="FALSE")), nodule(roi(3)))
    return [*(file.read_bytes() for file in sorted(cohort.rglob("*.xml"))), own.encode()]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """The slices that belong to `lidc_files`' XML."""
    folder = write_series(tmp_path_factory.mktemp("fuzz"))
    slices, _ = read_headers(sorted(folder.iterdir()))
    return stack_of(slices["1.2.3"])


def problem_of(data, path, stack):
    """The message to the user about a file; reading and using it may only raise errors for users."""
    path.write_bytes(data)
    try:
        readings.named_series(path)
        reads = lidc.read_xml(path)
        pairing._marked(path)
        annotations = tuple(readings.in_scan(mark, stack, path) for mark in readings.merged([reads, reads]))
        find_nodules(Scan(Volume(STORED, stack.affine), annotations=annotations), Layouts())
    except InputError as error:
        return str(error)
    return ""


QUICK = settings(
    max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_mutated_files_of_the_phantom(phantom_files, stack, tmp_path_factory):
    path = tmp_path_factory.mktemp("mutants") / "reads.xml"
    reported = []

    @QUICK
    @given(mutated(phantom_files))
    def check(data):
        reported.append(problem_of(data, path, stack))

    check()
    # Not more: which examples hypothesis draws depends on the modules that other tests have loaded.
    assert "" in reported
    assert any("cannot be read as LIDC XML" in problem for problem in reported)
    assert max(map(len, reported)) < 600


def test_mutated_files_of_the_release(shared_data, stack, tmp_path_factory):
    files = [
        *(shared_data / "lidc-xml").glob("*.xml"),
        *(shared_data / "lidc").glob("*/*/*/*.xml"),
    ]
    path = tmp_path_factory.mktemp("mutants") / "reads.xml"

    @settings(QUICK, max_examples=60)
    @given(mutated([file.read_bytes() for file in sorted(files)]))
    def check(data):
        problem_of(data, path, stack)

    check()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_slices(syntax, tmp_path_factory):
    top = tmp_path_factory.mktemp("slices")
    write_case(top, syntax=syntax)
    slices = sorted(top.rglob("*.dcm"))
    original = slices[2].read_bytes()
    reported = []

    @settings(QUICK, max_examples=40)
    @given(st.data())
    def check(data):
        mutate = data.draw(st.sampled_from([flip, delete, double, truncate]))
        slices[2].write_bytes(mutate(data.draw, original))
        row, *_ = index_source("lidc", top)
        try:
            lidc.load_scan(top, row)
        except ExcludedCaseError as error:
            reported.append(str(error))
        else:
            reported.append(row["reason"])

    check()
    # Not more: which examples hypothesis draws depends on the modules that other tests have loaded.
    assert any(reported)


@pytest.mark.parametrize("kind", ["multi-frame", "JPEG 2000", "JPEG Lossless", "deflated", "bare"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_slices_of_other_kinds(kind, tmp_path_factory):
    top = tmp_path_factory.mktemp("slices")
    folder = write_case(top, syntax=DeflatedExplicitVRLittleEndian if kind == "deflated" else ExplicitVRLittleEndian)
    if kind == "multi-frame":
        enhance(folder)
    slices = sorted(top.rglob("*.dcm"))
    if kind.startswith("JPEG"):
        for file in slices:
            code(file, *CODECS[kind])
    mutant = slices[len(slices) // 2]
    original = mutant.read_bytes()[132:] if kind == "bare" else mutant.read_bytes()

    @settings(QUICK, max_examples=40)
    @given(st.data())
    def check(data):
        mutate = data.draw(st.sampled_from([flip, delete, double, truncate]))
        mutant.write_bytes(mutate(data.draw, original))
        row, *_ = index_source("lidc", top)
        with contextlib.suppress(ExcludedCaseError):
            lidc.load_scan(top, row)

    check()


CODECS = {
    "JPEG 2000": (JPEG2000Lossless, imagecodecs.jpeg2k_encode, {"codecformat": "j2k", "reversible": True}),
    "JPEG Lossless": (JPEGLosslessSV1, imagecodecs.jpeg8_encode, {"lossless": True, "bitspersample": 16}),
}


def code(file, syntax, encode, options):
    """Compress one slice."""
    dataset = dcmread(file)
    dataset.PixelData = encapsulate([encode(dataset.pixel_array.astype(np.uint16), **options)])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(file)


SIZE_BYTES = 2 << 20
BOMBS = {
    "deep": lambda: b"<a>" * (SIZE_BYTES // 7) + b"</a>" * (SIZE_BYTES // 7),
    "sessions in sessions": lambda: b"<readingSession>" * 52_000 + b"</readingSession>" * 52_000,
    "nodules in nodules": lambda: (
        b"<r><readingSession>"
        + b"<unblindedReadNodule><roi><edgeMap>" * 20_000
        + b"</edgeMap></roi></unblindedReadNodule>" * 20_000
        + b"</readingSession></r>"
    ),
    "wide": lambda: b"<a>" + b"<b/>" * (SIZE_BYTES // 4) + b"</a>",
    "long namespace": lambda: b'<a xmlns="' + b"n" * (SIZE_BYTES // 2) + b'">' + b"<b/>" * (SIZE_BYTES // 8) + b"</a>",
    "long name": lambda: b"<" + b"n" * SIZE_BYTES + b"/>",
    "long text": lambda: b"<a>" + b"x\r\n&amp;" * (SIZE_BYTES // 8) + b"</a>",
    "long number": lambda: xml(nodule(roi(1, z="9" * SIZE_BYTES))).encode(),
    "many attributes": lambda: (
        b"<a " + b" ".join(b'a%d=""' % number for number in range(SIZE_BYTES // 11)) + b"/>"
    ),
    "open names": lambda: b"<SeriesInstanceUid>1" * (SIZE_BYTES // 20),
    "long identifier": lambda: b"<SeriesInstanceUid>" + b"1" * SIZE_BYTES,
    "spaces": lambda: b"<SeriesInstanceUid>" + b" " * SIZE_BYTES,
    "entities": lambda: b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 10**6 + b'">]><a>' + b"&b;" * 10**6 + b"</a>",
}  # fmt: skip
READ_IN_BOUNDS = r"""
import re, resource, sys, time
from pathlib import Path
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.sources.lidc import pairing, readings

resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name in sys.argv[1:]:
    began = time.process_time()
    try:
        readings.named_series(Path(name))
        pairing._marked(Path(name))
    except InputError:
        pass
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    print(Path(name).stem, round(time.process_time() - began, 1), "s", round(peak, 2), "GiB", flush=True)
    assert time.process_time() - began < 3
    assert peak < 1
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_bombs_are_read_in_bounded_time_and_memory(tmp_path):
    for name, make in BOMBS.items():
        (tmp_path / f"{name}.xml").write_bytes(make())
    run = subprocess.run(
        [sys.executable, "-c", READ_IN_BOUNDS, *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
