"""Processes of this Python that start at once: forked from one that has imported everything, which takes seconds.

`Popen` and `run` are those of `subprocess`, but that a command `[sys.executable, "-m", module, ...]`, or one with a
script, becomes a fork of a process that has imported the package and run nothing. What such a process starts itself,
the ranks of a torchrun or a study's workers, it forks from itself in the same way. All else is as in a process of its
own: number, signals, exit code, files, environment, working directory. Where the kernel is not Linux, a command is
started as it stands.
"""

import ast
import atexit
import ctypes
import functools
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress

PR_SET_CHILD_SUBREAPER = 36
PACKAGE = [f"sam_lightning.studies.{name}" for name in ("command", "report", "worker")]
OTHERS = ["lightning.pytorch.cli", "sklearn.datasets", "torch.distributed.run", "torch.utils.tensorboard"]
OTHERS += ["torchmetrics.classification", "torchvision.models"]
OTHERS += ["torch._dynamo"]  # else the first optimizer of every child would import it


def words_of(command):
    """What follows the options of a command of this Python, or nothing if it is another one."""
    words = [os.fsdecode(word) for word in command] if isinstance(command, list | tuple) else []
    if not words or words[0] != sys.executable:
        return []
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    return rest if rest[:1] == ["-m"] or (rest[:1] and rest[0].endswith(".py")) else []


class _Forking(subprocess.Popen):
    """Replaces the start of a process; what Popen does with pipes, waiting and signals stays."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        words = words_of(args)
        if sys.platform != "linux" or not words or preexec_fn or pass_fds:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        files = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        new_session = rest[-2]
        self.pid = self._fork(
            words, dict(os.environ if env is None else env), os.fspath(cwd or os.getcwd()), files, new_session
        )
        self._child_created = True
        for descriptor, other in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if descriptor != -1 and other != -1:  # the child's end of a pipe
                os.close(descriptor)


class Popen(_Forking):
    """In a test: a fork of the server, which the kernel makes this process's child when its own parent ends.

    Args:
        imported: Whether this checkout's package is there already; else the command finds its own.
    """

    def __init__(self, *args, imported=True, **options):
        self._imported = imported
        super().__init__(*args, **options)

    def _fork(self, *request):
        *what, files, new_session = request
        connection = _server(self._imported)
        socket.send_fds(connection, [repr((*what, new_session)).encode() + b"\n"], files)
        return int(connection.recv(100))


class ForkingItself(_Forking):
    """In a process that was forked: a fork of that process."""

    def _fork(self, *request):
        pid = os.fork()
        if pid == 0:
            _become(*request)
        return pid


def run(command, timeout=None, check=False, **options):
    """`subprocess.run`, with its output always captured as text."""
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@functools.cache
def _server(imported):
    """The connection to this process's server with or without the package, which ends with it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(theirs.fileno()), *(["with the package"] if imported else [])]
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()

    def end():
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def _become(words, environment, folder, files, new_session):
    """Runs a command as if this process had just begun with it, and ends."""
    for own, given in enumerate(files):
        os.dup2(given, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdin, sys.stdout, sys.stderr = (
        open(own, mode, closefd=False, buffering=1)  # noqa: SIM115
        for own, mode in enumerate("rww")
    )
    is_module = words[0] == "-m"
    target, *arguments = words[1:] if is_module else words
    first = os.getcwd() if is_module else os.path.dirname(os.path.abspath(target))
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [target, *arguments]
    code = 0
    try:
        if is_module:
            sys.modules.pop(target, None)  # its own module, once more, as `__main__`
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        with suppress(Exception):
            end()
    os._exit(code or 0)


def _serve(connection):
    """Forks for every request, and forks twice: what has lost its parent becomes the child of the one who asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not request:
            return
        while not request.endswith(b"\n"):
            request += connection.recv(1 << 20)
        reading, writing = os.pipe()
        parent = os.fork()
        if parent == 0:
            child = os.fork()
            if child == 0:
                *what, new_session = ast.literal_eval(request.decode())
                _become(*what, files, new_session)
            os.write(writing, str(child).encode())
            os._exit(0)
        os.waitpid(parent, 0)  # only now is the child a child of the one who asked
        connection.send(os.read(reading, 100))
        for descriptor in (*files, reading, writing):
            os.close(descriptor)


if __name__ == "__main__":
    subprocess.Popen = ForkingItself  # before torchrun takes the name over
    with warnings.catch_warnings(action="ignore"):
        for name in (*OTHERS, *(PACKAGE if sys.argv[2:] else ())):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection of every child would copy all that was imported
    _serve(socket.socket(fileno=int(sys.argv[1])))
