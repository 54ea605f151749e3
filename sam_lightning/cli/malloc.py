"""Keeps memory that was freed, instead of giving it back between two steps."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1  # bytes at the heap's end
_LARGEST_MMAP = 32 * 2**20  # bytes; glibc refuses more


def keep_freed_memory() -> bool:
    """Has glibc keep freed blocks of up to 32 MiB for the next allocation; whether it does.

    A training step frees its activations and gradients and needs as much again in the next one. By default glibc
    hands large blocks back to the system, which must then fill them with zeros, page by page.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP))
