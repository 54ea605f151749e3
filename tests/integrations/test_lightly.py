import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    """The library, with the modules that are used here."""
    for name in ("lightly.loss", "lightly.models.modules", "lightly.models.utils", "lightly.utils.scheduler"):
        pytest.importorskip(name)
    return pytest.importorskip("lightly")


def views():
    """Six batches of four pairs of views."""
    return {
        "train_dataloaders": DataLoader([(torch.rand(3, 8, 8), torch.rand(3, 8, 8)) for _ in range(24)], batch_size=4)
    }


def moco(lightly, moves_teacher_in):
    """MoCo of lightly's own heads and loss: a momentum teacher, and a queue of keys in the library's criterion."""

    class MoCo(LightningModule):
        def __init__(self):
            super().__init__()
            head = lightly.models.modules.MoCoProjectionHead(8, 8, 4)
            self.student = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
            )
            self.teacher = copy.deepcopy(self.student)
            lightly.models.utils.deactivate_requires_grad(self.teacher)
            self.criterion = lightly.loss.NTXentLoss(memory_bank_size=(16, 4))

        def move_teacher(self):
            momentum = lightly.utils.scheduler.cosine_schedule(self.current_epoch, 10, 0.9, 1)
            lightly.models.utils.update_momentum(self.student, self.teacher, m=momentum)

        def on_train_batch_start(self, batch, batch_idx):
            if moves_teacher_in == "on_train_batch_start":
                self.move_teacher()

        def training_step(self, batch, batch_idx):
            if moves_teacher_in == "training_step":
                self.move_teacher()
            query = self.student(batch[0])
            with torch.no_grad():
                key = self.teacher(batch[1])
            loss = self.criterion(query, key)
            self.log("train_loss_ssl", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    return lambda made_from=as_it_is: made_from(MoCo)()


@pytest.mark.parametrize("moves_teacher_in", ["training_step", "on_train_batch_start"])
def test_queue_and_teacher(lightly, moves_teacher_in, tmp_path):
    task = moco(lightly, moves_teacher_in)
    says = "as a teacher that follows" if moves_teacher_in == "training_step" else None
    sharp = assert_sharp(task, views, tmp_path, says=says)
    assert sharp.module.criterion.memory_bank.bank_ptr.item() == 2 * 6 * 4 % 16
