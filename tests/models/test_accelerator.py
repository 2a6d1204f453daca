"""The precision that `auto` means, by the GPU."""

from types import SimpleNamespace

import pytest
import torch

from lungddpm.models import accelerator


@pytest.mark.parametrize(("major", "expected"), [(7, "no"), (8, "bf16"), (9, "bf16")])
def test_auto_takes_bf16_only_where_the_gpu_computes_it(monkeypatch, major, expected):
    """From compute capability 8.0 on (CUDA C++ Programming Guide, table of arithmetic throughput); torch also emulates
    it on older GPUs."""
    made = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    taken = []
    monkeypatch.setattr(accelerator, "select_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(accelerator, "Accelerator", lambda **options: taken.append(options["mixed_precision"]) or made)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value in (
        ("is_available", True), ("current_device", 0), ("get_device_properties", SimpleNamespace(major=major)),
        ("_check_bf16_tensor_supported", True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    accelerator.make_accelerator("cuda", "auto")
    assert taken == [expected]
