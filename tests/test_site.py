"""The site: built strictly, whole in its links, without a network, and in step with what it describes."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest


def script(repository, name):
    """A script of docs/site, as a module."""
    spec = importlib.util.spec_from_file_location(name, repository / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(repository, source, output):
    """Run Sphinx as `make docs-site` does."""
    pytest.importorskip("furo", reason="the site needs the extra: pip install 'lungddpm[docs]'")
    pytest.importorskip("myst_parser", reason="the site needs the extra: pip install 'lungddpm[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{output}-cache"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(
        [*command, "-c", str(repository / "docs/site"), str(source), str(output)],
        env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip


class Page(HTMLParser):
    """What a page links to, what it loads, and where one can link to."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors, self.without_alt = path, [], [], {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in {"img", "script", "iframe", "source", "video"} and values.get("src"):
            self.loaded.append(values["src"])
        # Others, such as rel=next, load nothing.
        if tag == "link" and values.get("rel") in {"stylesheet", "icon", "preload", "preconnect", "shortcut icon"}:
            self.loaded.append(values["href"])
        if tag == "img" and not values.get("alt"):
            self.without_alt.append(values.get("src"))


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site") / "site"
    run = build(repository, repository, folder)
    assert (run.returncode, run.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_link_and_anchor_leads_somewhere(site, pages):
    lost = []
    for page in pages.values():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            # The search page and its like make their anchors themselves.
            known = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.is_file() or unquote(parts.fragment) not in known:
                lost.append(f"{page.path.relative_to(site)}: {link}")
    assert lost == []


def test_no_page_loads_anything_from_the_network(site, pages):
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc] == []
    styles = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    imported = [
        (path, found) for path, text in styles.items() for found in re.findall(r"(?:url\(|@import)[^;)]*//", text)
    ]
    assert [(path, found) for path, found in imported if "data:" not in found] == []


def test_the_docs_are_all_there_and_their_pictures_described(site, pages, repository):
    written = {path.relative_to(repository).with_suffix(".html") for path in (repository / "docs").rglob("*.md")}
    assert written <= {path.relative_to(site) for path in pages}
    assert (site / "index.html").is_file()
    assert {str(path): page.without_alt for path, page in pages.items() if page.without_alt} == {}


def test_the_python_interface_is_shown_from_its_docstrings(pages, site):
    import lungddpm

    page = pages[site / "docs/reference/python-api.html"]
    assert {f"lungddpm.{name}" for name in lungddpm.__all__} <= page.anchors


def test_a_broken_link_and_a_broken_anchor_stop_the_build(repository, tmp_path):
    (tmp_path / "source/docs").mkdir(parents=True)
    text = "# Title\n\n[a](no-such-page.md), [b](#no-such-anchor)\n"
    (tmp_path / "source/docs/README.md").write_text(text)
    run = build(repository, tmp_path / "source", tmp_path / "site")
    assert run.returncode != 0
    assert "no-such-page.md" in run.stderr
    assert "no-such-anchor" in run.stderr


def templates(folder):
    """All text in a package's code, with … instead of what is filled in."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_page_of_typical_problems_has_the_messages_of_the_code(repository):
    page = (repository / "docs/how-to/solve-problems.md").read_text(encoding="utf-8")
    messages = re.findall(r"^    (?:error|excluded): (.*)$", page, re.MULTILINE)
    assert len(messages) > 15
    known = "\n".join(templates(repository / "lungddpm"))
    # A message is put together from the file or key, what is wrong, and what to do.
    pieces = [piece.strip(" .") for message in messages for piece in re.split(r"…|: |\. ", message)]
    assert [piece for piece in pieces if piece not in known] == []


def test_the_page_of_costs_has_what_plan_estimates_for_the_demo(repository):
    cost = script(repository, "cost")
    (demo,) = re.findall(r"^\| `config.yaml` \|.*$", cost.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert demo == f"| {' | '.join(cost.row(*cost.ROWS[0]))} |", "run: python docs/site/cost.py"


def test_the_drawn_pipeline_is_that_of_its_script(repository):
    drawn = (repository / "docs/images/pipeline.svg").read_text(encoding="utf-8")
    assert drawn == script(repository, "pipeline").draw() + "\n", "run: python docs/site/pipeline.py"


def test_the_tables_of_the_rivals_are_those_of_the_recorded_run(repository):
    rivals = script(repository, "rivals")
    page = rivals.PAGE.read_text(encoding="utf-8")
    assert rivals.fill(page) == page, "run: python docs/site/rivals.py"
