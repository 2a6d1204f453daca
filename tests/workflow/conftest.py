"""Fixtures of the tests that run the workflow."""

import os

import pytest
from tiny import TINY, Benchmark, merged

from lungddpm.core.files import exclusive_lock


@pytest.fixture(scope="session")
def make_benchmark(repository):
    """Factory: (folder, overlay over the tiny config) -> `Benchmark`, not yet run."""
    return lambda folder, overlay=None: Benchmark(repository, folder, merged(TINY, overlay or {}))


@pytest.fixture(scope="session")
def tiny_benchmark(make_benchmark, tmp_path_factory):
    """The finished tiny benchmark (about 1.5 minutes); tests read it, they do not change it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first process makes it for all
        folder = folder.parent
    benchmark = make_benchmark(folder / "tiny")
    with exclusive_lock(folder / "tiny.lock", "making the tiny benchmark"):
        if not (benchmark.results / "SHA256SUMS").exists():
            run = benchmark.run()
            assert run.returncode == 0, run.stdout[-8000:]
    return benchmark
