"""The most memory that this process has had resident, by the system's own count; no library is imported."""

import ctypes
import gc
import pathlib
import re
import resource

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_resident() -> int:
    """Largest resident set of this process in bytes since its start, or since `forget_peak`."""
    if STATUS.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Start a new peak at what is resident now; whether the system can (Linux), else the peak is since the start.

    What the allocator holds back of memory that was freed, such as a compiler's, is given back first.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True
