"""lungddpm: does synthetic CT from a layout-guided diffusion model make a lung-nodule segmenter better?

The Python interface (see `lungddpm.api`): `read_case`, `make_layout`, `synthesize`, `measure`, `compare`.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lungddpm.api import compare, make_layout, measure, read_case, synthesize

try:
    __version__ = metadata.version("lungddpm")
except metadata.PackageNotFoundError:  # the files alone, on the path of a Python
    __version__ = "0.0.0"
__all__ = ["compare", "make_layout", "measure", "read_case", "synthesize"]


def __getattr__(name: str) -> Any:
    # On demand: the command line imports the package for its version and must not wait for numpy.
    if name in __all__:
        from lungddpm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
