"""Seeds, a quiet trainer, and a check that no test leaves anything behind."""

import os
from pathlib import Path

import pytest
import sklearn.model_selection  # noqa: F401  # exports environment variables, better here than in some test
import torch
from lightning.pytorch import Trainer

from fake_cifar10 import fake_cifar10, fake_files  # noqa: F401  # fixtures, for every test

REPOSITORY = Path(__file__).parents[1]
# Networks this small are slower with more threads, and far slower on a busy machine; here and in what tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """A test may leak neither a process group, nor environment variables, nor files into the checkout."""
    environment, files = dict(os.environ), set(os.listdir(REPOSITORY))
    torch.manual_seed(0)
    yield
    assert not torch.distributed.is_initialized()
    # What Lightning's seed_everything and GPU strategies, and torch.compile export.
    exported = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUDA_DEVICE_ORDER", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")
    for key in exported:
        os.environ.pop(key, None)
    changed = {key for key, _ in environment.items() ^ os.environ.items() if not key.startswith("PYTEST_")}
    assert not changed, f"environment variables changed: {changed}"
    assert set(os.listdir(REPOSITORY)) - files <= {".pytest_cache"}


@pytest.fixture
def trainer(tmp_path):
    """A factory of quiet CPU trainers that write into the test's own folder."""

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **options})

    return make
