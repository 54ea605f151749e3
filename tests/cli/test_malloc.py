"""Freed memory is kept: a second round of the same allocations has no page faults."""

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import ctypes, resource, sys, torch
# By default glibc moves this threshold to what was freed last; whether it then trims hangs on where small blocks lie.
assert ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, where it begins
if "keep" in sys.argv:
    from sam_lightning.cli.malloc import keep_freed_memory
    assert keep_freed_memory()
def allocate():
    held = [torch.ones(2**18 * n) for n in range(1, 9)]  # 1 to 8 MiB
    del held
for _ in range(3):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def faults(*words):
    done = subprocess.run([sys.executable, "-c", ROUNDS, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again():
    assert faults() > 5 * max(1, faults("keep"))  # fewer but larger ones where the system gives huge pages
