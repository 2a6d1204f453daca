"""Seconds and peak memory of each stage from DICOM + XML to a case, to find slow ones.

    export OMP_NUM_THREADS=1
    python benchmarks/case_stages.py --configfile config.yaml --configfile mine.yaml --source /data/LIDC-IDRI [case ...]

Seconds are CPU time; a stage within another counts once, as itself. Memory is resident, sampled
every 10 ms; what an earlier stage leaves behind counts in the later ones, as it does in a real run.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from unittest import mock

import pandas as pd
import psutil

from lungddpm.config.loading import load_config
from lungddpm.core.cases import CaseFolder
from lungddpm.layouts import compose
from lungddpm.sources import images, lidc
from lungddpm.sources.index import index_source

INTERVAL_S = 0.01
STAGES = {
    "read the scan": ((lidc, "load_scan"), (images, "load_scan")),
    "lungs": ((compose, "segment_lungs"), (compose, "split_lungs")),
    "vessels": ((compose, "segment_vessels"),),
    "nodules": ((compose, "find_nodules"),),
    "model grid": ((compose, "resample_image"), (compose, "occupancy"), (compose, "nodules_on_grid")),
    "write": ((compose, "write_volume"), (compose, "write_json")),
    "picture": ((compose, "draw_case"), (compose, "save")),
}


class Meter:
    """Adds up CPU seconds and keeps the peak of resident memory of whatever stage is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._stack: list[str] = []
        self._since = time.process_time()
        self._stop = threading.Event()
        self._process = psutil.Process()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the time in the block to this stage, and not to the one around it."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample memory in the background."""
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its time charged to a stage."""

        @wraps(function)
        def call(*arguments, **options):
            with self.stage(name):
                return function(*arguments, **options)

        return call

    def _charge(self) -> None:
        now = time.process_time()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            if stack := self._stack[-1:]:
                used = self._process.memory_info().rss
                self.peak_bytes[stack[0]] = max(self.peak_bytes.get(stack[0], 0), used)


def measure(config, source: Path, row: dict) -> Meter:
    """Prepare one case in a temporary folder."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder, meter.sampling():
        patches = [
            mock.patch.object(module, function, meter.timed(name, getattr(module, function)))
            for name, functions in STAGES.items()
            for module, function in functions
            if hasattr(module, function)
        ]
        for patch in patches:
            patch.start()
        try:
            with meter.stage("everything else"):
                compose._write(config, source, pd.Series(row), CaseFolder(Path(folder) / row["case_id"]))
        finally:
            mock.patch.stopall()
    return meter


def main() -> None:
    """Print one table per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", action="append", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("cases", nargs="*", help="case ids; all that are usable by default")
    arguments = parser.parse_args()
    config = load_config(*arguments.config)
    for row in index_source(config.source.kind, arguments.source):
        if row["status"] != "ok" or (arguments.cases and row["case_id"] not in arguments.cases):
            continue
        meter = measure(config, arguments.source, row)
        print(f"\n{row['case_id']}: {row['size_x']} x {row['size_y']} x {row['size_z']} -> {config.grid.size}")
        print(f"{'stage':<18}{'CPU s':>8}{'peak GiB':>10}")
        for name in sorted(meter.seconds, key=meter.seconds.get, reverse=True):
            print(f"{name:<18}{meter.seconds[name]:8.2f}{meter.peak_bytes.get(name, 0) / 2**30:10.2f}")
        print(f"{'together':<18}{sum(meter.seconds.values()):8.2f}{max(meter.peak_bytes.values()) / 2**30:10.2f}")


if __name__ == "__main__":
    main()
