"""The language of all tracked text: codespell's list of misspellings, and a short list of the project's own."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

WORDS = "tests/house_words.toml"
NOT_PROSE = (".png", ".svg", ".json", ".csv")
ELSEWHERE = ("LICENSE", "constraints.txt", WORDS, "tests/test_words.py")


def texts_of(repository):
    """Tracked files with our own prose."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name and not name.endswith(NOT_PROSE)]
    return [name for name in names if name not in ELSEWHERE and (repository / name).is_file()]


def wrapped(pattern):
    """Prose wraps: a space of the pattern matches a line break, with the hash of a comment or the quotes of a
    string."""
    return re.compile(pattern.replace(" ", r"""[\s"'#]+"""), re.IGNORECASE)


def banned_in(text, words):
    """(line, what is written, what to write instead) for each hit of a pattern, its exceptions left out.

    Names of tests are read as the sentences that they are.
    """
    text = re.sub(r"\bdef test_\w+", lambda name: name[0].replace("_", " "), text)
    found = []
    for word in words:
        allowed = [hit.span() for each in word.get("allowed", []) for hit in wrapped(each).finditer(text)]
        for hit in wrapped(word["pattern"]).finditer(text):
            if not any(start <= hit.start() and hit.end() <= end for start, end in allowed):
                line = text.count("\n", 0, hit.start()) + 1
                found.append((line, " ".join(hit[0].split()), word["instead"]))
    return sorted(found)


@pytest.fixture(scope="module")
def words(repository):
    return tomllib.loads((repository / WORDS).read_text())["word"]


def test_no_text_has_a_banned_word(repository, words):
    hits = [
        f"{name}:{line}: '{written}' (write: {instead})"
        for name in texts_of(repository)
        for line, written, instead in banned_in((repository / name).read_text(encoding="utf-8"), words)
    ]
    assert not hits, "\n".join([*hits, f"The list and its exceptions are in {WORDS}."])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Run it anew.", [(1, "anew")]),
        ("# 2 false\n# positives a scan.", [(2, "positives a scan")]),
        ("# It goes\n# on where it stopped.", [(1, "goes # on")]),
        ('message = "the case is "\n    "no case"', [(1, 'is " "no c')]),
        ("A million page faults per pass; the fault is ours.", [(1, "fault")]),
        ("def test_noise_is_no_vessel():", [(1, "is no v")]),
        ("No difference\nto real.", [(1, "difference to")]),
        ("Write it in the formats of others.", [(1, "formats of others")]),
        ("It ends once it goes on.", [(1, "goes on")]),
        ("def test_the_run_goes_on():", [(1, "goes on")]),
        ("About 10 candidates a case, two passes\n# a step.", [(1, "candidates a case"), (1, "passes # a step")]),
        ("It draws a nodule, and samples a voxel.", []),
        ("Equal bytes, once\nmore.", [(1, "Equal bytes"), (1, "once more")]),
        ("The rules lie in the folder, which stands above it.", [(1, "lie in the folder"), (1, "stands above")]),
        ("A nodule lies in the lungs, and the answer stands.", []),
        ("# 36 bytes a voxel, 40 GFLOP/s\n# a core.", [(1, "GFLOP/s # a core"), (1, "bytes a voxel")]),
        ("There is no case, and it is no longer there.", []),
        ("One row per arm; this run cannot tell.", []),
    ],
)
def test_planted_words_are_found(words, text, expected):
    assert [hit[:2] for hit in banned_in(text, words)] == expected


def spelled(repository, names):
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(repository / "pyproject.toml"), *names]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_no_text_has_a_misspelling(repository):
    done = spelled(repository, texts_of(repository))
    assert (done.returncode, done.stdout) == (0, "")


def test_a_planted_misspelling_is_found(repository, tmp_path):
    planted = Path(tmp_path, "planted.md")
    planted.write_text("The segmenter recieves a layout.\n")
    done = spelled(repository, [str(planted)])
    assert done.returncode != 0
    assert "recieves ==> receives" in done.stdout
