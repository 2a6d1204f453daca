"""The site, built by `make docs-site` into build/site: opens from the disk, loads nothing from the network.

Pages are the repository's own Markdown, written for a code host: they hold no markup of Sphinx. What a site needs
beside them (the order of the pages, docstrings) is here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import lungddpm

project = "lungddpm"
author = "The lungddpm developers"
copyright = "2026, The lungddpm developers"
version = release = lungddpm.__version__

# The source folder is the repository's root, so that links between its files lead to the same places here and there.
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "config/README.md",
    "docs/*.md",
    "docs/*/*.md",
]
exclude_patterns = [".*", "build", "dist", "results", "tests"]
root_doc = "docs/README"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Anchors of headings, as code hosts make them.
myst_heading_anchors = 4
# Indented blocks are commands, YAML and Python by turns.
highlight_language = "text"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"lungddpm {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"font-stack": "system-ui, sans-serif"},
    "dark_css_variables": {"font-stack": "system-ui, sans-serif"},
}

NAVIGATION = {
    "Start": ["README", "docs/getting-started/demo", "docs/getting-started/read-the-report"],
    "How-to": [
        "docs/how-to/run-on-lidc-idri",
        "docs/how-to/run-on-lidc-idri-from-idc",
        "docs/how-to/run-on-luna16",
        "docs/how-to/run-on-image-files",
        "docs/how-to/run-on-nnunet-or-decathlon",
        "docs/how-to/run-on-a-cluster",
        "docs/how-to/continue-a-run",
        "docs/how-to/design-a-study",
        "docs/how-to/test-on-an-external-cohort",
        "docs/how-to/vary-the-real-cases",
        "docs/how-to/compare-generators",
        "docs/how-to/bring-your-own-synthetic-ct",
        "docs/how-to/view-in-a-pacs",
        "docs/how-to/use-as-a-module",
        "docs/how-to/add-a-generator-or-source",
        "docs/how-to/add-a-measure",
        "docs/how-to/solve-problems",
    ],
    "Reference": [
        "docs/reference/glossary",
        "config/README",
        "docs/reference/command-line",
        "docs/reference/python-api",
        "docs/reference/input",
        "docs/reference/dicom",
        "docs/reference/files",
        "docs/reference/measures",
        "docs/reference/cost",
        "docs/reference/differences-to-the-paper",
        "docs/reference/dependencies",
    ],
    "Explanation": [
        "docs/explanation/architecture",
        "docs/explanation/experiment",
        "docs/explanation/layouts",
        "docs/explanation/diffusion",
        "docs/explanation/performance",
        "docs/explanation/interruption",
        "docs/explanation/calibration",
        "docs/explanation/rivals",
    ],
    "Project": ["CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT"],
}
"""Captions of the sidebar and the pages below them, in their order. Other pages of their folders follow."""
FOLDERS = {"How-to": "docs/how-to/", "Reference": "docs/reference/", "Explanation": "docs/explanation/"}
_PYTHON_API = "docs/reference/python-api"
_TREE = """

```{{toctree}}
:hidden:
:caption: {caption}

{pages}
```
"""
_DOCSTRINGS = """

## In full

```{eval-rst}
.. currentmodule:: lungddpm

.. autofunction:: lungddpm.read_case
.. autofunction:: lungddpm.make_layout
.. autofunction:: lungddpm.synthesize
.. autofunction:: lungddpm.measure
.. autofunction:: lungddpm.compare
.. autofunction:: lungddpm.config.loading.parse_config
.. autofunction:: lungddpm.core.volume.read_volume
.. autoclass:: lungddpm.core.volume.Volume
   :members:
.. autoexception:: lungddpm.core.errors.InputError
.. autoexception:: lungddpm.core.errors.ConfigError
.. autoexception:: lungddpm.core.errors.ExcludedCaseError
```
"""
"""What docs/reference/python-api.md names as public."""


def add_what_a_site_needs(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the navigation to the entry page, and the docstrings to the page of the Python interface."""
    if page == root_doc:
        listed = {page for pages in NAVIGATION.values() for page in pages}
        for caption, pages in NAVIGATION.items():
            folder = FOLDERS.get(caption)
            others = sorted(page for page in app.env.found_docs - listed if folder and page.startswith(folder))
            source[0] += _TREE.format(caption=caption, pages="\n".join(f"/{page}" for page in [*pages, *others]))
    if page == _PYTHON_API:
        source[0] += _DOCSTRINGS


def pages_to_read_again(app: Sphinx, *_: object) -> list[str]:
    """These two depend on more than their own text."""
    return [root_doc, _PYTHON_API]


def add_index(app: Sphinx, failed: Exception | None) -> None:
    """Lead from the site's folder to its entry page."""
    if failed is None:
        shutil.copyfile(Path(__file__).with_name("index.html"), Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("env-get-outdated", pages_to_read_again)
    app.connect("source-read", add_what_a_site_needs)
    app.connect("build-finished", add_index)
