"""`dying_fit.py N ROOT fit ...`: the command, killed right before its N-th change of the files in ROOT.

Between two changes a kill leaves the same files behind, so these are all the moments there are. The last line of what
it prints, if it lives, is the number of changes.
"""

import os
import signal
import sys

import torch

from sam_lightning.cli import main

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
changes = 0


def is_last(kind, path, *more):
    """Counts a change, if it is one; whether the process is to die there."""
    global changes
    writes = kind == "open" and len(more) == 2 and more[1] & (os.O_WRONLY | os.O_RDWR)
    if not (kind in CHANGES or writes) or not os.path.abspath(os.fsdecode(path)).startswith(root):
        return False
    changes += 1
    return changes - 1 == last


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hook(kind, values):
    if values and isinstance(values[0], str | bytes | os.PathLike) and is_last(kind, *values):
        die()


def save_or_die(content, path):
    """torch writes a file without a word to Python: before it, and with half of it written."""
    hook("os.truncate", (path,))
    save(content, path)
    if is_last("os.truncate", path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()


if __name__ == "__main__":
    last, root = int(sys.argv[1]), sys.argv[2]
    save, torch.save = torch.save, save_or_die
    sys.addaudithook(hook)
    main(sys.argv[3:])
    print(changes)
