"""Reads commands and forks for each: `fit` in the child, killed on request within its write of a checkpoint."""

import ast
import os
import signal
import sys
import warnings

import torch
import torch._dynamo  # else the first optimizer of every child would import it
import torch.utils.tensorboard

from sam_lightning.cli import main


def die_at_write(at, where):
    """Kills this process at its write number `at`: before it, with half the file written, or right behind it."""
    written = 0
    save, replace = torch.save, os.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_save(content, path):
        if written == at and where == "before":
            die()
        save(content, path)
        if written == at and where == "within":
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def dying_replace(source, target):
        nonlocal written
        replace(source, target)
        if str(target).endswith(".ckpt"):
            if written == at and where == "behind":
                die()
            written += 1

    torch.save, os.replace = dying_save, dying_replace


def child(command, log, kill_at_write):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if kill_at_write is not None:
        die_at_write(*kill_at_write)
    try:
        main(command)
    except SystemExit as error:
        print(error.code, file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(*ast.literal_eval(line))
        print(pid, flush=True)
        sys.stdin.readline()  # the one that asks for the end: until then the child's number stays its own
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
