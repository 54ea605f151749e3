"""How many runs of a study go at once."""

import os

import torch

from sam_lightning.runs import threads
from sam_lightning.studies.devices import environments


def test_a_containers_share_of_the_cores_counts(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: 4)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert environments(None, 1, 2, "cpu") == [{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}] * 2
    assert len(environments(None, 1, 8, "cpu")) == 1
    assert len(environments(9, 1, 1, "cpu")) == 9  # as asked


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    dealt = [places["CUDA_VISIBLE_DEVICES"] for places in environments(None, 2, 1, "auto")]
    assert dealt == ["3", "5", "3", "5"]
    assert len(environments(9, 2, 1, "auto")) == 4
    assert "CUDA_VISIBLE_DEVICES" not in environments(1, 2, 1, "cpu")[0]
