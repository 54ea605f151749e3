"""Modules, data and loggers that the command line did not write, as their users have them."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from commands import QUICK, ROOT, fails, fit
from sam_lightning import SAM
from sam_lightning.cli import main
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.training.module import SharpnessAwareModule

SHORT = [*QUICK, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "run"]
OPTIMIZER = ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8, seed: int = 1):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def samples(self):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(self.seed))
        return x, x[:, :1]

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.samples()), batch_size=self.batch_size)

    def training_sample(self, samples, seed):
        return [self.samples()]

    val_dataloader = test_dataloader = train_dataloader


class Model(SharpnessAwareModule):
    def __init__(self, optimizer: OptimizerCallable):
        super().__init__(optimizer=optimizer)
        self.network = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def loss(self, batch):
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))
        self.log("r2", 1 - self.loss(batch))


class Seeded(Model):
    def __init__(self, optimizer: OptimizerCallable, seed: int = 0):
        super().__init__(optimizer)
        self.seed = seed


class Late(Model):
    """A network that is made when training begins."""

    def __init__(self, optimizer: OptimizerCallable):
        super().__init__(optimizer)
        self.network = None

    def configure_model(self):
        if self.network is None:
            self.network = nn.Linear(6, 1)


class Scaled(Model):
    """Groups that need the trainer."""

    def parameter_groups(self):
        return [{"params": list(self.named_parameters()), "lr": 0.1 * self.trainer.world_size}]


A_CLASS = partial(SAM, base=partial(torch.optim.SGD, lr=0.05), rho=0.2)


class Default(Model):
    def __init__(self, optimizer: OptimizerCallable = A_CLASS):
        super().__init__(optimizer)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


A_FUNCTION = partial(sgd)


class Unwritable(Model):
    def __init__(self, optimizer: OptimizerCallable = A_FUNCTION):
        super().__init__(optimizer)


def words(model, *more):
    return ["fit", "--model", f"{__name__}.{model.__name__}", "--data", f"{__name__}.Data", *SHORT, *more]


def test_every_metric_of_an_evaluation_is_printed_whatever_its_name(capsys):
    trained = main(words(Model, *OPTIMIZER))
    loss = trained.trainer.callback_metrics["val_loss"].item()
    assert re.search(rf"^val loss +{loss:.4f}$", capsys.readouterr().out, re.MULTILINE)
    tested = main(["test", "--ckpt_path", "run"])
    out = capsys.readouterr().out
    for name in ("test loss", "r2"):
        value = tested.trainer.callback_metrics[name.replace(" ", "_")].item()
        assert re.search(rf"^{name} +{value:.4f}$", out, re.MULTILINE)


def test_model_and_data_may_have_an_argument_of_one_name():
    trained = main(words(Seeded, *OPTIMIZER, "--model.seed", "3", "--data.seed", "4"))
    content = read_checkpoint(Path("run/checkpoints/last.ckpt"))
    assert content["hyper_parameters"]["seed"] == trained.model.seed == 3
    assert content["datamodule_hyper_parameters"]["seed"] == trained.datamodule.seed == 4


def test_groups_may_need_the_trainer():
    assert main(words(Scaled, *OPTIMIZER)).trainer.global_step == 4


def test_a_network_that_is_made_late_is_measured():
    main(words(Late, *OPTIMIZER))
    cheap = ["--settings.draws", "2", "--settings.steps", "1"]
    main(["sharpness", "--ckpt_path", "run", *cheap])
    measures = json.loads(Path("run/sharpness.json").read_text())["measures"]
    assert measures
    assert all(math.isfinite(row["value"]) for row in measures.values())


def test_a_partial_as_default_is_written_as_its_class_and_read_back():
    trained = main(words(Default))
    written = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert written["class_path"] == "sam_lightning.SAM"
    assert written["init_args"]["rho"] == 0.2
    assert written["init_args"]["base"]["class_path"] == "torch.optim.SGD"
    assert written["init_args"]["base"]["init_args"]["lr"] == 0.05
    tested = main(["test", "--ckpt_path", "run"])
    assert torch.equal(tested.model.network.weight, trained.model.network.weight)
    resumed = main(["fit", "--ckpt_path", "run", "--trainer.max_epochs", "2"])
    group = resumed.trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["rho"]) == (0.05, 0.2)


def test_a_default_that_no_file_can_hold_is_refused_before_training(capsys):
    said = fails(capsys, *words(Unwritable))
    assert "error: --model.optimizer: the default is a Python object" in said
    assert not Path("run").exists()


@pytest.mark.parametrize("logger", ["CSVLogger", "list"])
def test_checkpoints_lie_in_the_run_whatever_logs(capsys, logger):
    Path("two.yaml").write_text(
        "trainer:\n  logger:\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: logs}}\n"
        "  - {class_path: TensorBoardLogger, init_args: {save_dir: logs}}\n"
    )
    more = {
        "CSVLogger": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
        "list": ["-c", "two.yaml"],
    }
    fit(*more[logger])
    assert "checkpoints    runs/digits-sam-seed1/checkpoints: best.ckpt, last.ckpt\n" in capsys.readouterr().out
    assert not list(Path("logs").rglob("*.ckpt"))
    main(["test", "--ckpt_path", "runs/digits-sam-seed1"])


def test_checkpoints_may_have_a_place_of_their_own():
    fit("--trainer.callbacks.dirpath", "mine")
    assert {path.name for path in Path("mine").iterdir()} == {"best.ckpt"}
    assert {path.name for path in Path("runs/digits-sam-seed1/checkpoints").iterdir()} == {"last.ckpt"}


class Plain(LightningModule):
    """Knows nothing of sharpness, and saves its hyperparameters as everybody does."""

    def __init__(self, width: int = 4, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


SHARP = ["--trainer.callbacks+=sam_lightning.training.SharpnessAwareTraining", "--trainer.callbacks.method", "ASAM"]


def test_two_options_make_ones_own_module_sharp(capsys):
    """And it is resumed and measured like any other run."""
    trained = main(words(Plain, *SHARP, "--trainer.callbacks.rho", "0.3", "--trainer.callbacks.every", "2"))
    (optimizer,) = trained.trainer.optimizers
    assert (type(optimizer).__name__, optimizer.every) == ("ASAM", 2)
    assert optimizer.param_groups[0]["rho"] == 0.3
    assert "trains plainly" not in capsys.readouterr().err
    assert type(Plain.load_from_checkpoint("run/checkpoints/last.ckpt", weights_only=True)) is Plain

    for again in (["fit", "--ckpt_path", "run"], words(Plain, *SHARP)):
        with pytest.raises(SystemExit, match=r"trainer.callbacks.rho: 0.3 .*, 0.5 here"):
            main([*again, "--trainer.callbacks.rho", "0.5"])
    resumed = main(["fit", "--ckpt_path", "run", "--trainer.max_epochs", "2"])
    assert type(resumed.trainer.optimizers[0]).__name__ == "ASAM"
    assert resumed.trainer.global_step == 2 * trained.trainer.global_step
    main(["sharpness", "--ckpt_path", "run", "--samples", "32", "--settings.steps", "2", "--settings.draws", "2"])
    assert json.loads(Path("run/sharpness.json").read_text())["samples"] == 64  # what the data module gives


def test_a_module_that_trains_plainly_says_so(capsys):
    main(words(Plain))
    assert "note: Plain trains plainly. For sharp steps: --trainer.callbacks+=" in capsys.readouterr().err
