"""What a process took, beside what the kernel says it has."""

import numpy as np
import psutil

from lungddpm.core.memory import peak_memory_mib


def test_the_peak_is_no_less_than_what_the_process_has_now_and_stays():
    block = np.ones(2**25)
    now_mib = psutil.Process().memory_info().rss / 2**20
    peak_mib = peak_memory_mib()
    assert peak_mib >= now_mib - 1 >= block.nbytes / 2**20
    del block
    assert peak_memory_mib("cpu") >= peak_mib
