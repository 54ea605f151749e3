import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def timm():
    for name in ("timm.data", "timm.loss", "timm.optim", "timm.scheduler"):
        pytest.importorskip(name)
    return pytest.importorskip("timm")


def images():
    rows = [(torch.rand(3, 16, 16), i % 4) for i in range(24)]
    return {"train_dataloaders": DataLoader(rows, batch_size=4, shuffle=True)}


def test_recipe_of_vision_transformers(timm, tmp_path):
    """Mixup (by NumPy's random numbers), drop path and dropout (by torch's), a scheduler that Lightning cannot step."""

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
            self.model = timm.models.VisionTransformer(**sizes, drop_path_rate=0.3, proj_drop_rate=0.1)
            self.mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)
            self.loss = timm.loss.SoftTargetCrossEntropy()

        def training_step(self, batch, batch_idx):
            x, y = self.mixup(*batch)  # changes the images in place
            loss = self.loss(self.model(x), y)
            self.log("train/loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self):
            optimizer = timm.optim.create_optimizer_v2(self.model, opt="adamw", lr=1e-2, weight_decay=0.05)
            schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=2, warmup_t=1, warmup_lr_init=1e-3)
            return [optimizer], [{"scheduler": schedule, "interval": "epoch"}]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch + 1)

    def task(made_from=as_it_is):
        return made_from(Classifier)()

    assert_sharp(task, images, tmp_path)
