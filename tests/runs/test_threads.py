"""Threads by the size of the work, and never more than the user set or the process may use."""

import math
import os

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sam_lightning.data.augment import CropAndFlip
from sam_lightning.data.images import Images
from sam_lightning.data.normalise import Normalise
from sam_lightning.runs import threads
from sam_lightning.runs.threads import OPERATIONS_PER_THREAD, threads_for, usable_cores
from sam_lightning.sharpness import worst_case_sharpness


@pytest.fixture(autouse=True)
def _four_threads_of_eight_cores(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("operations", "expected"), [(0, 1), (1e6, 1), (3.5e9, 3), (1e15, 4), (math.inf, 4)])
def test_a_thread_for_every_so_many_operations(operations, expected):
    with threads_for(operations) as count:
        assert torch.get_num_threads() == count == expected
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), threads_for(operations):
        raise KeyError
    assert torch.get_num_threads() == 4


def test_no_more_than_the_process_may_use(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    with threads_for(100 * OPERATIONS_PER_THREAD):
        assert torch.get_num_threads() == 2


def test_cores_are_those_of_affinity_container_and_allocation(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: None)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert usable_cores() == 6
    monkeypatch.setattr(threads, "_quota", lambda: 4)
    assert usable_cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert usable_cores() == 3


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
        # A job's group, of which the machine is seen as a whole: its own limit and those of the groups around it.
        ({"own": "0::/slurm/job1/step0\n", "slurm/job1/cpu.max": "300000 100000\n"}, 3),
        ({"own": "0::/a/b\n", "a/b/cpu.max": "900000 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ({"own": "0::/a\n", "a/cpu.max": "max 100000\n"}, None),
        ({"own": "0::/elsewhere\n", "cpu.max": "400000 100000\n"}, 4),
        ({"own": "4:cpu,cpuacct:/a\n0::/\n", "cpu/a/cpu.cfs_quota_us": "5", "cpu/a/cpu.cfs_period_us": "2"}, 2),
        ({"own": "4:memory:/a\n", "a/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_a_containers_or_a_jobs_quota(tmp_path, files, cores):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert threads._quota(tmp_path, tmp_path / "own") == cores


@pytest.mark.parametrize(("width", "expected"), [(8, 1), (2000, 4)])
def test_small_networks_are_measured_with_one_thread(width, expected):
    network, seen = nn.Linear(width, width), []

    def loss(batch):
        seen.append(torch.get_num_threads())
        return network(batch).square().mean()

    worst_case_sharpness(network, loss, [torch.randn(500, width)], rho=0.1)
    assert seen[-1] == expected
    assert torch.get_num_threads() == 4


class LargeResults(TorchFunctionMode):
    """Sees with how many threads results of so many entries and more are computed."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.threads = entries, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.entries:
            self.threads.add(torch.get_num_threads())
        return result


def test_batches_are_prepared_with_one_thread():
    images = Images(torch.randint(256, (200, 3, 16, 16), dtype=torch.uint8), torch.arange(200) % 10)
    augment = CropAndFlip(len(images), seed=0, crop=True, flip=True)
    normalise = Normalise("half", 255.0, (0.5,), (0.5,))
    with LargeResults(128 * 3 * 16 * 16) as results:
        batch, _, samples = images.__getitems__(list(range(128)))
        assert results.threads == {1}
        results.threads.clear()
        batch = augment(batch, samples, epoch=0)
        assert results.threads == {1}
        results.threads.clear()
        normalise(batch)
        assert results.threads == {1}
    assert torch.get_num_threads() == 4
