"""Wall time and peak resident memory of a command including all its processes.

    python benchmarks/cost_of.py lungddpm run --cores all --directory /tmp/demo

Memory is sampled every half second and summed over processes, so that pages they share count more than once: the true
peak is not higher than what is printed.
"""

import subprocess
import sys
import time

import psutil

INTERVAL_S = 0.5


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants; those that end meanwhile count as nothing."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> int:
    """Run the command given as arguments; its exit code is ours."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    began, peak = time.monotonic(), 0
    command = subprocess.Popen(sys.argv[1:])
    watched = psutil.Process(command.pid)
    while command.poll() is None:
        try:
            peak = max(peak, resident_bytes(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_S)
    code = command.wait()
    print(f"{time.monotonic() - began:.0f} s, peak {peak / 2**30:.2f} GiB resident, exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
