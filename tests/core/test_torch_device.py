"""Which device torch is asked for, on a machine that is made to seem to have GPUs."""

import pytest
import torch

from lungddpm.core.errors import ConfigError
from lungddpm.core.torch_device import device_name, select_device


@pytest.fixture
def gpus(monkeypatch):
    """A function that sets how many GPUs torch sees."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "asked", "expected"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
)
def test_auto_takes_a_gpu_where_there_is_one(gpus, count, asked, expected):
    gpus(count)
    assert select_device(asked) == torch.device(expected)


@pytest.mark.parametrize(
    ("count", "asked", "present"),
    [(0, "cuda", "cpu"), (0, "mps", "cpu"), (2, "cuda:2", "cpu, cuda, cuda:0, cuda:1"), (0, "gpu", "cpu")],
)
def test_what_is_not_there_is_refused_with_what_is(gpus, count, asked, present):
    gpus(count)
    with pytest.raises(ConfigError, match=rf"'{asked}' is not available here.*one of: {present}\."):
        select_device(asked)


def test_processes_of_torchrun_take_a_gpu_each(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("auto") == torch.device("cuda:1")
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'cuda:0' leaves process 1 without a GPU"):
        select_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="'auto' leaves process 2 without a GPU"):
        select_device("auto")


@pytest.mark.parametrize(("threads", "name"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_is_named_by_its_threads(monkeypatch, threads, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")) == name
