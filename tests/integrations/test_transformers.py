import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def transformers():
    return pytest.importorskip("transformers")


def sentences():
    rows = [
        {
            "input_ids": torch.randint(20, (6,)),
            "attention_mask": torch.ones(6, dtype=int),
            "labels": torch.tensor(i % 2),
        }
        for i in range(24)
    ]
    return {"train_dataloaders": DataLoader(rows, batch_size=4, shuffle=True)}


def test_classifier_with_warm_up(transformers, tmp_path):
    """Dropout, groups without weight decay, clipping by the Trainer, a linear warm-up stepped after every batch."""

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **shape)
            self.model = transformers.BertForSequenceClassification(config)

        def training_step(self, batch, batch_idx):
            output = self.model(**batch)
            self.log("train/loss", output.loss)
            return output.loss

        def configure_optimizers(self):
            named = list(self.model.named_parameters())
            groups = [
                {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
            steps = self.trainer.estimated_stepping_batches
            schedule = transformers.get_linear_schedule_with_warmup(
                optimizer, num_warmup_steps=4, num_training_steps=steps
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def task(made_from=as_it_is):
        return made_from(Classifier)()

    clipped = {"gradient_clip_val": 0.5}
    assert_sharp(task, sentences, tmp_path, **clipped)
