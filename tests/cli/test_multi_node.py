"""The command line in two launches of one process each, as on two machines, against one launch of two."""

import sys
from pathlib import Path

import pytest
import torch

import forking
from launch import ROOT, TORCHRUN, environment, free_port
from regression import assert_same

FIT = ["-m", "sam_lightning", "fit", "-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/data/digits.yaml"]
FIT += ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", "--trainer.max_epochs", "1"]
FIT += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.limit_train_batches", "6"]
FIT += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def run(folder: Path, *commands: list[str], environments=None) -> dict[str, torch.Tensor]:
    """Runs the commands beside one another; the weights of the checkpoint that they leave."""
    folder.mkdir()
    running = []
    try:
        for i, command in enumerate(commands):
            env = environment() | (environments[i] if environments else {})
            with (folder / f"output{i}").open("w") as output:
                running.append(forking.Popen(command, cwd=folder, env=env, stdout=output, stderr=output))
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * len(commands), [(folder / f"output{i}").read_text()[-2000:] for i in range(len(commands))]
    (checkpoint,) = folder.glob("runs/digits-sam-seed1/checkpoints/last.ckpt")
    return torch.load(checkpoint, weights_only=True)["state_dict"]


NODES = [*FIT, "--trainer.num_nodes", "2", "--trainer.devices", "1"]


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory):
    single = [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return run(tmp_path_factory.mktemp("one") / "run", [*single, *FIT, "--trainer.devices", "2"])


def test_two_nodes_by_torchrun(tmp_path, on_one_node):
    torchrun = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    torchrun += [f"--master-port={free_port()}"]
    nodes = run(tmp_path / "run", *([*torchrun, f"--node-rank={rank}", *NODES] for rank in range(2)))
    assert_same(nodes, on_one_node)


@pytest.mark.slow
def test_two_nodes_by_the_variables_that_srun_sets(tmp_path, on_one_node):
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [job | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    nodes = run(tmp_path / "run", *[[sys.executable, *NODES]] * 2, environments=tasks)
    assert_same(nodes, on_one_node)
