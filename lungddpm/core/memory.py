"""Memory allocation of this process, its peak, and what to do if there is too little."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lungddpm.core.errors import ConfigError

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process reuse freed memory for its next arrays; does nothing without glibc.

    By default every large array is fresh memory from the kernel, which hands it out page by page.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


@contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of numpy or torch into a message that names the options.

    Args:
        what: needed the memory.
        remedy: see `UserError`.

    Raises:
        ConfigError: memory ran out inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = "out of memory" in str(error)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(what, f"{'the GPU' if on_gpu else 'this machine'} ran out of memory", remedy) from None


def peak_memory_mib(device: str = "cpu") -> float:
    """Peak memory in MiB so far: of tensors on a GPU, otherwise of the whole process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
