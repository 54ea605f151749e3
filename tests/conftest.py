"""Seeds, a quiet trainer, and a check that no test leaves anything behind."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from fake_cifar10 import fake_cifar10, fake_files  # noqa: F401  # fixtures, for every test

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(monkeypatch):
    """A test may leak neither a process group, nor environment variables, nor files into the checkout."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    environment = dict(os.environ)
    files = set(os.listdir(REPOSITORY))
    torch.manual_seed(0)
    yield
    assert not torch.distributed.is_initialized()
    # Lightning's own seed_everything exports its seed; pytest names the running test.
    for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "PYTEST_CURRENT_TEST"):
        environment.pop(key, None)
    leaked = {key for key in environment.keys() ^ os.environ.keys() if not key.startswith(("PL_", "PYTEST_"))}
    for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(key, None)
    assert not leaked, f"environment variables changed: {leaked}"
    assert set(os.listdir(REPOSITORY)) - {".pytest_cache"} <= files | {".pytest_cache"}


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
