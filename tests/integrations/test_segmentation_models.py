import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def smp():
    return pytest.importorskip("segmentation_models_pytorch")


def images():
    rows = [(torch.rand(3, 32, 32), torch.randint(2, (1, 32, 32)).float()) for _ in range(12)]
    return {
        "train_dataloaders": DataLoader(rows, batch_size=4, shuffle=True),
        "val_dataloaders": DataLoader(rows[:2], batch_size=2),
    }


def test_outputs_gathered_by_hand(smp, tmp_path):
    """As the library's examples do it: a dictionary from the step, its parts in a list, IoU at the epoch's end."""

    class Segmentation(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
            self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
            self.outputs = []

        def shared_step(self, batch):
            image, mask = batch
            logits = self.model(image)
            counts = smp.metrics.get_stats((logits.sigmoid() > 0.5).long(), mask.long(), mode="binary")
            return {"loss": self.loss_fn(logits, mask), "counts": counts}

        def training_step(self, batch, batch_idx):
            output = self.shared_step(batch)
            self.outputs.append(output["counts"])
            return output

        def on_train_epoch_end(self):
            counts = [torch.cat(part) for part in zip(*self.outputs, strict=True)]
            self.log("train_iou", smp.metrics.iou_score(*counts, reduction="micro-imagewise"))
            self.log("train_images", float(len(counts[0])))
            self.outputs.clear()

        def validation_step(self, batch, batch_idx):
            self.log("valid_loss", self.shared_step(batch)["loss"])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=1e-5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}

    def task(made_from=as_it_is):
        return made_from(Segmentation)()

    sharp = assert_sharp(task, images, tmp_path, doors=["callback", "base class behind"])
    assert sharp.trainer.callback_metrics["train_images"] == 12
