"""What only a GPU shows."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from sam_lightning import ASAM, GSAM, MSAM, SAM, WSAM, FriendlySAM, LookSAM, VaSSO
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn

pytestmark = pytest.mark.gpu


class NeverWaits(Callback):
    """Makes every wait for the GPU an error, from the second batch's start to its end, and so on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx > 0:  # memory and kernels are made ready in the first step
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", [SAM, ASAM, MSAM, WSAM, GSAM, FriendlySAM, LookSAM, VaSSO])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_never_waits_for_the_gpu(trainer, method, precision):
    """But in steps that log, and at an epoch's end."""
    optimizer = partial(method, base=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    module = ImageClassifier(digits_cnn(), optimizer)
    options = {"accelerator": "gpu", "precision": precision, "log_every_n_steps": 1000, "max_epochs": 1}
    run = trainer(**options, callbacks=[NeverWaits()])
    run.fit(module, Digits(seed=1))
    assert run.global_step > 10
