"""What only a GPU shows."""

from functools import partial

import pytest
import torch

from sam_lightning import ASAM, SAM
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", [SAM, ASAM])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_never_waits_for_the_gpu(trainer, variant, precision):
    """But in steps that log, and at an epoch's end."""

    class Watched(ImageClassifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:  # memory and kernels are made ready in the first step
                return super().training_step(batch, batch_idx)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().training_step(batch, batch_idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    module = Watched(digits_cnn(), partial(variant, base=partial(torch.optim.SGD, lr=0.1)))
    options = {"accelerator": "gpu", "precision": precision, "log_every_n_steps": 1000, "max_epochs": 1}
    run = trainer(**options)
    run.fit(module, Digits(seed=1))
    assert run.global_step > 10
