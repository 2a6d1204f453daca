import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from lungddpm.core.errors import ConfigError
from lungddpm.models.denoiser import Convolution, GroupNorm32, UNet, _group_norm, convolve_winograd, place_on_device
from lungddpm.operations import bench
from lungddpm.operations.bench import BASE, MEASURED, OPTIONS, SAMPLERS, USED, Option, Problem, Workbench, ratios

TINY = Problem("cpu", 16, 32)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_precision_yet():
    """Accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def base_output():
    AcceleratorState._reset_state(True)
    output = Workbench(TINY, BASE).output()
    AcceleratorState._reset_state(True)
    return output


def test_ratios_by_hand():
    # Rounds of 2, 3 and 1.5 times: the median is not the ratio of the medians (4 / 2).
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4 / 1.5]) == (2.0, 1.5, 3.0)


def test_options_have_names_of_their_own_and_stay_on_their_device():
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    assert OPTIONS[0].name == "base"
    assert Option(bf16=True, batch=2).name == "bf16 + batch 2"
    assert [Option(graphs=True).exists_on(device) for device in ("cpu", "cuda")] == [False, True]
    assert [Option(keep_memory=True).exists_on(device) for device in ("cpu", "cuda")] == [True, False]
    assert all(option in OPTIONS and option.exists_on(device) for device, option in USED.items())


# All options of a CPU but `compile`, which takes a C++ compiler minutes.
@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        (Option(keep_memory=True), 1e-4),
        (Option(channels_last=True), 1e-4),
        (Option(channels_last=True, winograd=True), 1e-4),
        (Option(batch=2), 1e-4),
        (Option(bf16=True), 0.1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_options_give_the_output_of_the_base(base_output, option, tolerance):
    output = Workbench(TINY, option).output()
    assert base_output.std() > 0.01
    assert abs(output - base_output).max() < tolerance


def test_training_with_the_options_of_a_cpu_has_the_losses_of_the_base():
    losses = []
    for option in (BASE, USED["cpu"]):
        workbench = Workbench(TINY, option)
        assert workbench.training_seconds() > 0
        losses.append(workbench.optimization.take_step(2)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_winograd_convolution_is_the_convolution(depth):
    generator = torch.Generator().manual_seed(depth)
    h = torch.randn(2, 3, depth, 6, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(h, weight, bias, padding=1)
    torch.testing.assert_close(convolve_winograd(h, weight, bias), expected, rtol=0, atol=1e-12)


def test_placed_on_a_cpu_the_golden_output_stays(golden, golden_denoiser):
    plain = {key: tensor.clone() for key, tensor in golden_denoiser.state_dict().items()}
    denoiser = UNet(3, 32, [1, 1, 2, 3, 4], 32, attention_factor=2)
    denoiser.load_state_dict(plain)
    placed = place_on_device(denoiser, "cpu").eval()
    assert all(module.winograd for module in placed.modules() if isinstance(module, Convolution))
    assert {key: tensor.shape for key, tensor in placed.state_dict().items()} == {k: t.shape for k, t in plain.items()}
    with torch.inference_mode():
        predicted = placed(golden["denoiser_in"], golden["denoiser_t"])
    torch.testing.assert_close(predicted, golden["denoiser_out"], rtol=0, atol=1e-4)


def test_gradients_stay_the_same_by_winograd():
    def gradients(winograd):
        torch.manual_seed(0)
        denoiser = UNet(3, 4, [1, 2], 2, attention_factor=1)
        for parameter in denoiser.parameters():
            parameter.data.normal_(0, 0.2)
        denoiser.arrange(winograd, winograd)(torch.randn(1, 3, 8, 8, 8), torch.tensor([3])).square().mean().backward()
        return {name: parameter.grad for name, parameter in denoiser.named_parameters()}

    plain, winograd = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(winograd[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_norm_for_gpus_is_the_norm():
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm32(4, 8)
    for parameter in norm.parameters():
        parameter.data = torch.randn(8, generator=generator)
    h = torch.randn(2, 8, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last_3d)
    normed = _group_norm(h, norm)
    torch.testing.assert_close(normed, norm(h), rtol=0, atol=1e-5)
    assert normed.is_contiguous(memory_format=torch.channels_last_3d)


def test_figures_follow_from_the_timings(monkeypatch):
    """An option's process and the base's, played by tables of what they would answer."""

    def plays(answers):
        return lambda method, *arguments: answers[method].pop(0) if method in answers else pytest.fail(method)

    base = plays({"output": [torch.zeros(2).numpy()], "pass_seconds": [2.0, 9.0, 4.0]})
    call = plays({
        "output": [torch.tensor([0.5, -1.0]).numpy()],
        "pass_seconds": [1.0, 3.0, 2.0],
        "matrix_rate": [400.0, 100.0, 200.0],
        "sampling_seconds": [6.0, 90.0, 45.0],
        "memory_mib": [123.0],
    })  # fmt: skip
    row = bench._measure(call, base, Option(batch=2), 3, 120.0, False, flop=100)
    assert (row.ratio, row.ratio_least, row.ratio_most) == (2.0, 2.0, 3.0)
    assert (row.pass_seconds, row.max_difference, row.flop_per_second) == (2.0, 1.0, 50.0)
    assert row.matrix_fraction == 0.25
    # 250 steps of 2 s are too long: two steps took 6 s. The others were drawn in full.
    assert row.sampling_seconds == {"ddpm 250": 750.0, "dpmsolver++ 50": 90.0, "dpmsolver++ 20": 45.0}
    assert row.extrapolated == ["ddpm 250"]
    assert (row.sampling_memory_mib, row.training_steps_per_second) == (123.0, None)


def test_an_option_that_the_device_lacks_or_that_fails_gets_a_row(monkeypatch):
    def fail(*_):
        raise RuntimeError("No compiler.\nA long story.")

    monkeypatch.setattr(bench, "_process", lambda *_: nullcontext(fail))
    rows = [bench._row(TINY, fail, option, 1, 0.0, False, 1) for option in (Option(graphs=True), Option(compile=True))]
    assert [row.status for row in rows] == ["not on this device", "failed: No compiler."]
    assert rows[0].ratio is rows[1].ratio is None


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no option 'magic'\. Available: base; memory kept"):
        bench.run_bench("cpu", 16, 32, ["magic"], 1, 0.0, False, tmp_path / "bench.json")


def test_the_command_writes_a_table_and_json(tmp_path):
    lungddpm = Path(sys.executable).with_name("lungddpm")
    options = ["--size", "16", "--base", "32", "--rounds", "1", "--longest", "0", "--device", "cpu", "--threads", "1"]
    run = subprocess.run(
        [lungddpm, "bench", *options, "--no-training", "--option", "CUDA graphs", "--output", "bench.json"],
        cwd=tmp_path, text=True, capture_output=True, check=True,
    )  # fmt: skip
    result = json.loads((tmp_path / "bench.json").read_text())
    base, graphs = result["options"]
    assert (base["option"], base["status"], base["max_difference"]) == ("base", MEASURED, 0)
    assert base.keys() == graphs.keys() == bench.Row.__dataclass_fields__.keys()
    assert base["sampling_seconds"].keys() == SAMPLERS.keys()
    assert base["extrapolated"] == list(SAMPLERS)
    assert min(base[name] for name in ("pass_seconds", "ratio", "matrix_fraction")) > 0
    assert base["training_ratio"] is None
    assert (graphs.pop("option"), graphs.pop("status")) == ("CUDA graphs", "not on this device")
    assert set(graphs.values()) == {None}
    assert result["samplers"] == []
    assert re.search(r"^base +\d\S* +\d", run.stdout, re.MULTILINE)


def test_samplers_take_turns(monkeypatch):
    seconds = iter([26.0, 5.0, 2.0, 25.0, 5.0, 2.0, 30.0, 5.0, 2.5])
    answers = {"pass_seconds": lambda: 0.1, "sampling_seconds": lambda *_: next(seconds)}
    process = nullcontext(lambda method, *arguments: answers[method](*arguments))
    monkeypatch.setattr(bench, "_process", lambda *_: process)
    rows = bench._measure_samplers(TINY, 3, 120.0)
    assert [row.sampler for row in rows] == list(SAMPLERS)
    assert [(row.seconds, row.ratio) for row in rows] == [(26.0, 1.0), (5.0, 5.2), (2.0, 12.5)]
    assert bench._measure_samplers(TINY, 3, 24.9) == []
