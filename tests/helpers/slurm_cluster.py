"""A real SLURM with one node: its daemons, key, sockets and logs in one temporary folder, all on loopback."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
# A requeued job waits until the credential of its former start has expired: 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000
PartitionName=main Nodes={host} Default=YES MaxTime=60
"""


@pytest.fixture(scope="module", name="slurm")
def slurm_with_one_node():
    """SLURM's commands reach it, in this process and in its children; `slurm(*words)` is what one of them prints."""
    missing = [name for name in NEEDED if shutil.which(name) is None] + ["root"] * (os.geteuid() != 0)
    if missing:
        pytest.skip(f"no {', '.join(missing)}; as root: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o711)  # munged wants its socket to be within everyone's reach
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=free_ports(2)))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("TMPDIR", str(folder))  # for the jobs: a process that is killed leaves its sockets
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
        stack.enter_context(daemon(folder, "munged", "--foreground", f"--socket={folder}/munge.socket", *files))
        stack.enter_context(daemon(folder, "slurmctld", "-D"))
        stack.enter_context(daemon(folder, "slurmd", "-D"))
        until(lambda: output("sinfo", "-h", "-o", "%T", check=False) == "idle", 60, folder)
        yield output
        output("scancel", "--user=root")
        until(lambda: not output("squeue", "-h"), 60, folder)


def output(*words, check=True):
    return subprocess.run(words, capture_output=True, text=True, check=check).stdout.strip()


def until(holds, seconds, folder):
    """Waits; what takes too long is shown with the ends of all logs in the folder."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > end:
            logs = (f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.rglob("*log*")) if path.is_file())
            pytest.fail(f"nothing in {seconds} s. " + "\n".join(logs))
        time.sleep(0.1)
    return value


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def daemon(folder, *words):
    """Runs while the body does; Ctrl-C is for pytest alone, which stops the daemons in their order."""
    with (
        (folder / f"{words[0]}.log").open("w") as log,
        subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
