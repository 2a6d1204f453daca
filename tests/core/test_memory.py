"""The peak memory of a process, compared with what the kernel reports."""

import numpy as np
import psutil

from lungddpm.core.memory import peak_memory_mib


def test_the_peak_is_at_least_the_current_memory_and_does_not_fall():
    block = np.ones(2**25)
    now_mib = psutil.Process().memory_info().rss / 2**20
    peak_mib = peak_memory_mib()
    assert peak_mib >= now_mib - 1 >= block.nbytes / 2**20
    del block
    assert peak_memory_mib("cpu") >= peak_mib
