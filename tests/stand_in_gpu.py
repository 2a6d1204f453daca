"""A stand-in for a GPU: its tensors report `cuda:0`, are computed on the CPU, and refuse to mix with those of the CPU.

It finds tensors and random generators that were left on the CPU, and results that were not fetched. It does not find
errors of half precision (autocast passes it by), of memory, of CUDA's own kernels, or of anything asynchronous: those
need a GPU (`needs_gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_DEVICE = torch.device("cuda", 0)
# For the engine of autograd, which would start a thread and streams for a CUDA device. Nothing else uses this kind.
_INSIDE = torch.device("lazy", 0)
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
# As on a GPU, the indices of these (their second argument) may be on the CPU.
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class _Tensor(torch.Tensor):
    """A tensor on the stand-in; `held` has its values."""

    held: torch.Tensor
    device = property(lambda self: _DEVICE)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=_INSIDE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor):
        self.held = held.detach()

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on the stand-in"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that says where it is; on the stand-in it draws what one of the CPU would."""

    def __new__(cls, device: str | torch.device = "cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device: str | torch.device = "cpu"):
        self.where = _DEVICE if torch.device(device).type == "cuda" else torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.where


class _Dispatch(TorchDispatchMode):
    """Every operation, below autograd."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Calls of Python that would not reach `_Dispatch`, or without their device or generator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            where = kwargs.get("device") or getattr(args[0], "device", "cpu")
            kinds = torch.device(where).type, generator.device.type
            assert kinds[0] == kinds[1], f"{function} on {kinds[0].upper()} with a generator on {kinds[1].upper()}"
        if function is torch.tensor:
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if function is torch.Tensor.type:
            return _type_of(*args)
        return function(*args, **kwargs)


def _type_of(tensor: torch.Tensor, name: str | torch.dtype | None = None) -> Any:
    """Types by name, as MONAI's adversarial loss uses them."""
    if name is None:
        here = isinstance(tensor, _Tensor)
        return tensor.held.type().replace("torch.", "torch.cuda.") if here else tensor.type()
    if isinstance(name, str) and ".cuda." in name:
        return tensor.to(_DEVICE, torch.zeros(()).type(name.replace(".cuda", "")).dtype)
    return tensor.type(name)


def _compute(function: Any, args: tuple, kwargs: dict) -> Any:
    """What a GPU would return or refuse."""
    leaves = tree_leaves((args, kwargs))
    ours = any(isinstance(leaf, _Tensor) for leaf in leaves)
    asked = kwargs.get("device")
    here = torch.device(asked).type in (_DEVICE.type, _INSIDE.type) if asked is not None else ours
    if not ours and not here:
        return function(*args, **kwargs)
    if ours and function not in _COPIES:
        same = tree_leaves([arg for place, arg in enumerate(args) if place != 1 or function not in _INDEXING])
        # Single numbers may be on the CPU, as on a GPU.
        left = [leaf for leaf in same if isinstance(leaf, torch.Tensor) and not isinstance(leaf, _Tensor) and leaf.ndim]
        assert not left, f"{function} of tensors on the GPU and on the CPU; on the CPU: {left}"
    if function in _COPIES and asked is None:
        here = isinstance(args[0], _Tensor)
    held_args, held_kwargs = tree_map_only(_Tensor, lambda tensor: tensor.held, (args, kwargs))
    if asked is not None:
        held_kwargs["device"] = torch.device("cpu")
    held_kwargs.pop("pin_memory", None)
    made = function(*held_args, **held_kwargs)
    if not here:
        return made
    made = tree_map_only(torch.Tensor, _Tensor, made)
    return return_and_correct_aliasing(function, args, kwargs, made) if ours else made


def _patch(patch: pytest.MonkeyPatch) -> None:
    """Replace what would ask the driver, or takes a way around the dispatcher."""
    torch._C._ensureCUDADeviceGuardSet()  # torch's own fake tensors use it without a driver
    for name, value in {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": "stand-in", "get_device_capability": (9, 0), "is_bf16_supported": True,
        "max_memory_allocated": 0, "synchronize": None, "empty_cache": None,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)  # also in the threads of loaders
    # Inference mode does not let us wrap views of tensors that were made outside it.
    patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())


@pytest.fixture
def stand_in_gpu() -> Callable[[], AbstractContextManager[None]]:
    """A context in which the device `cuda` is the stand-in."""
    from accelerate.state import AcceleratorState

    @contextmanager
    def present() -> Iterator[None]:
        AcceleratorState._reset_state(True)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with pytest.MonkeyPatch.context() as patch, _Calls(), _Dispatch():
                _patch(patch)
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
            AcceleratorState._reset_state(True)

    return present
