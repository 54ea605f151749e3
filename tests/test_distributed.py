"""Two gloo processes on the CPU against written-out references in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from regression import SAM_SGD, SGD, assert_same, bare_loop, loader, make_network, state_of

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks ended with, for every case, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def joined_batches():
    """What both ranks see in a step: their samples are interleaved, so it is 8 in a row."""
    return loader(batch_size=8, samples=160)


def m_sharpness_loop(network, optimizer, micro=1):
    """Each half of a batch climbs along its own gradient; the mean of the two perturbed gradients descends."""
    for x, y in joined_batches():
        gradients = []
        for rank in range(2):
            halves = x[rank::2], y[rank::2]
            pairs = list(zip(*(torch.tensor_split(half, micro) for half in halves), strict=True))
            optimizer.zero_grad()
            for xs, ys in pairs:
                (mse_loss(network(xs), ys) * len(xs) / 4).backward()
            with optimizer.perturbed():
                optimizer.zero_grad()
                for xs, ys in pairs:
                    (mse_loss(network(xs), ys) * len(xs) / 4).backward()
            gradients.append([p.grad.clone() for p in network.parameters()])
        for parameter, a, b in zip(network.parameters(), *gradients, strict=True):
            parameter.grad = (a + b) / 2
        optimizer.step()


@pytest.mark.parametrize("case", ["sync", "sync-accumulate", "sgd"])
def test_synchronised_ranks_equal_one_process_on_the_joined_batch(ranks, case):
    network = make_network(norm=False)
    bare_loop(network, (SGD if case == "sgd" else SAM_SGD)(list(network.named_parameters())), joined_batches())
    for name, value in state_of(network).items():
        torch.testing.assert_close(ranks[0][case]["state"][f"network.{name}"], value, rtol=0, atol=1e-6)
    assert ranks[0][case]["steps"] == 20


@pytest.mark.parametrize("case", ["local", "local-accumulate"])
def test_local_perturbation_equals_m_sharpness(ranks, case):
    network = make_network(norm=False)
    m_sharpness_loop(network, SAM_SGD(list(network.named_parameters())), micro=2 if "accumulate" in case else 1)
    difference = 0.0
    for name, value in state_of(network).items():
        torch.testing.assert_close(ranks[0][case]["state"][f"network.{name}"], value, rtol=0, atol=1e-6)
        difference += (ranks[0]["sync"]["state"][f"network.{name}"] - value).abs().max().item()
    assert difference > 1e-4, "the synchronised perturbation is another method"


@pytest.mark.parametrize("case", ["sync", "local", "sync-accumulate", "local-accumulate", "sgd", "overflow"])
def test_ranks_hold_the_same_weights_and_optimizer_state(ranks, case):
    a, b = (
        {k: v for k, v in rank[case]["state"].items() if "running" not in k and "tracked" not in k} for rank in ranks
    )
    assert_same(a, b)
    for index, state in ranks[0][case]["optimizer"].items():
        assert torch.equal(state["momentum_buffer"], ranks[1][case]["optimizer"][index]["momentum_buffer"])


@pytest.mark.parametrize(
    ("case", "per_step"), [("sgd", 1), ("local", 1), ("local-accumulate", 1), ("sync", 2), ("sync-accumulate", 2)]
)
def test_gradients_are_averaged_once_per_synchronised_pass(ranks, case, per_step):
    assert ranks[0][case]["reductions"] == per_step * ranks[0][case]["steps"]  # of one bucket


def test_ranks_validate_with_the_same_running_statistics(ranks):
    assert_same(ranks[0]["norm"]["validated"], ranks[1]["norm"]["validated"])
    assert ranks[0]["norm"]["validated"]["network.1.running_mean"].abs().sum() > 0


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    for rank in ranks:
        after = rank["overflow"]["after"]
        assert torch.equal(after[2], after[1])
        assert not torch.equal(after[3], after[2])
        assert rank["overflow"]["scale"] == 512
