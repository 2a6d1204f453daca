"""The benchmark of layouts on a small cohort: three coarse scans with thick, thin, sharp and soft slices."""

import importlib.util

import pandas as pd
import pytest

SCANS = [("standard", 25.0, 2.0), ("sharp", 60.0, 3.0), ("soft", 12.0, 5.0)]
"""Kernel, noise in HU, slice thickness in mm."""


@pytest.fixture(scope="module")
def benchmark(repository):
    spec = importlib.util.spec_from_file_location("layout_accuracy", repository / "benchmarks/layout_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(benchmark):
    plain = benchmark.protocol(0, matrix=128, pixel_mm=2.75)
    return pd.DataFrame(
        benchmark.measure(plain.model_copy(update={"kernel": kernel, "noise_hu": noise, "slice_mm": thickness}), seed)
        for seed, (kernel, noise, thickness) in enumerate(SCANS)
    )


def test_lungs_and_vessels_are_those_of_the_truth(rows):
    assert rows["lung_dice"].mean() >= 0.97
    assert rows["lung_dice"].min() >= 0.94
    assert (rows["vessel_recall"] >= [0.9, 0.9, 0.8]).all()
    assert rows["vessel_precision"].min() >= 0.7


def test_every_nodule_is_in_the_layout(rows):
    assert (rows["nodules_present"] == 1).all()


def test_time_and_memory_are_measured(rows):
    assert (rows["seconds"] > 0).all()
    assert rows["gigabytes"].between(0.05, 8).all()


def test_the_table_has_a_line_for_each_thickness_and_one_for_all(benchmark, rows):
    table = benchmark.summary(rows)
    assert list(table.index) == ["2 mm", "3 mm", "5 mm", "all"]
    assert table.loc["all", "worst"] == rows["lung_dice"].min()


def test_the_protocol_mixes_thickness_kernel_and_noise(benchmark):
    protocols = [benchmark.protocol(number, matrix=256, pixel_mm=1.4) for number in range(20)]
    assert {protocol.slice_mm for protocol in protocols} == {1.0, 1.5, 2.0, 3.0, 5.0}
    assert len({(protocol.slice_mm, protocol.kernel) for protocol in protocols}) == 15
    assert min(p.noise_hu for p in protocols) < 15 < 50 < max(p.noise_hu for p in protocols)
