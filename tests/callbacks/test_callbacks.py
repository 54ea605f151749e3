"""Callbacks: what they write, what they refuse, and that nothing but primitives is saved."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from regression import SAM_SGD, Regression, loader, resumable
from sam_lightning.callbacks import EpochHistory, HyperparameterPage, RandomStates, WeightHistograms
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn
from sam_lightning.training import SharpnessAwareTraining


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0}).Reload()


def test_histograms_of_chosen_weights(trainer, tmp_path):
    name = "network.0.weight"
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = Regression()
    first = module.network[0].weight.detach().clone()
    trainer(max_epochs=5, logger=logger, callbacks=[WeightHistograms([name], every_n_epochs=2)]).fit(module, loader())
    written = events(tmp_path).Histograms(f"weights/{name}")
    assert [event.step for event in written] == [0, 16, 32]  # at the start, after epochs 2 and 4
    assert written[0].histogram_value.num == first.numel()
    assert written[0].histogram_value.sum == pytest.approx(first.sum().item(), rel=1e-5)


def test_a_wrong_name_is_refused_with_the_nearest(trainer):
    with pytest.raises(ValueError, match=r"no parameter 'network\.0\.wieght'; the nearest are network\.0\.weight"):
        trainer(callbacks=[WeightHistograms(["network.0.wieght"])]).fit(Regression(), loader())
    with pytest.raises(ValueError, match="every_n_epochs must be an integer >= 1, got 0"):
        WeightHistograms([], every_n_epochs=0)


@pytest.mark.filterwarnings("error:WeightHistograms writes to TensorBoard")
def test_histograms_need_a_tensorboard_logger(trainer, tmp_path):
    histograms = WeightHistograms(["network.0.weight"])
    with pytest.warns(UserWarning, match="WeightHistograms writes to TensorBoard loggers only, and there is none"):
        trainer(logger=CSVLogger(tmp_path), callbacks=[histograms]).fit(Regression(), loader())
    loggers = [CSVLogger(tmp_path), *(TensorBoardLogger(tmp_path, name, version="") for name in "ab")]
    trainer(logger=loggers, callbacks=[histograms]).fit(Regression(), loader())
    for name in "ab":
        assert len(events(tmp_path / name).Histograms("weights/network.0.weight")) == 2


def page(folder):
    """A run's entry as TensorBoard reads it: its columns as the page sorts and names them, its values, its metrics."""
    summaries = events(folder).summary_metadata
    experiment = parse_experiment_plugin_data(summaries["_hparams_/experiment"].plugin_data.content)
    start = parse_session_start_info_plugin_data(summaries["_hparams_/session_start_info"].plugin_data.content)
    infos = sorted(experiment.hparam_infos, key=lambda info: info.name)
    values = [start.hparams[info.name] for info in infos]
    values = [getattr(value, value.WhichOneof("kind")) for value in values]
    columns = dict(zip([info.display_name for info in infos], values, strict=True))
    return columns, [info.name.tag for info in experiment.metric_infos]


FIRST = ["method", "rho", "learning rate", "batch size", "seed", "epochs", "data", "network"]


def test_the_page_of_hyperparameters_shows_settings_and_metrics(trainer, tmp_path, monkeypatch):
    """As TensorBoard reads them, after a fit and a test with files of their own."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    network = {"class_path": "sam_lightning.models.digits_cnn", "init_args": {"width": 4}}
    optimizer = {"class_path": "sam_lightning.SAM", "init_args": {"base": {"class_path": "torch.optim.SGD"}}}
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/accuracy", mode="max")
    for stage in ("fit", "test"):
        module = ImageClassifier(digits_cnn(width=4), SAM_SGD)
        module.save_hyperparameters(
            {"network": network, "optimizer": optimizer, "smoothing": 0.1, "_instantiator": "x", "unset": None}
        )
        logger = TensorBoardLogger(tmp_path, name="", version="")
        options = {"logger": logger, "enable_checkpointing": True, "callbacks": [HyperparameterPage(), best]}
        best = ModelCheckpoint(tmp_path / "none")  # the test keeps none
        getattr(trainer(**options), stage)(module, datamodule=Digits(batch_size=128))
    columns, metrics = page(tmp_path)
    assert list(columns)[:8] == FIRST
    assert list(columns.values())[:8] == ["SAM", 0.1, 0.05, 128, "7", 1, "Digits", "digits_cnn"]
    rest = {"network": "digits_cnn", "network.width": 4, "optimizer": "SAM", "optimizer.base": "SGD", "smoothing": 0.1}
    assert columns.items() >= rest.items() | {("data.validation", "split")}
    assert not [name for name in columns if "_instantiator" in name or "class_path" in name or "unset" in name]
    assert metrics == ["best/val/accuracy", "val/accuracy", "val/loss", "test/accuracy", "test/loss"]
    accumulator = events(tmp_path)
    assert len(accumulator.Scalars("val/accuracy")) == len(accumulator.Scalars("test/accuracy")) == 1
    assert accumulator.Scalars("best/val/accuracy")[0].value == accumulator.Scalars("val/accuracy")[0].value


class Foreign(LightningModule):
    """A module that knows nothing of this package, with metrics by other names."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("valid_loss", self.training_step(batch, batch_idx))
        self.log("r2", float(self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)]


def test_any_module_and_all_of_its_tensorboards_have_the_page(trainer, tmp_path):
    loggers = [CSVLogger(tmp_path), *(TensorBoardLogger(tmp_path, name, version="") for name in "ab")]
    options = {"logger": loggers, "callbacks": [HyperparameterPage()], "max_epochs": 2}
    trainer(**options).fit(Foreign(), loader(), loader(batch_size=32))
    for name in "ab":
        columns, metrics = page(tmp_path / name)
        assert columns == {
            "method": "AdamW",
            "rho": 0,
            "learning rate": 0.01,
            "batch size": 8,
            "epochs": 2,
            "data": "TensorDataset",
            "network": "Foreign",
        }
        assert metrics == ["r2", "valid_loss", "test_loss"]
    trainer(logger=CSVLogger(tmp_path), callbacks=[HyperparameterPage()]).fit(Foreign(), loader())


def test_the_page_shows_the_radius_and_not_a_rho_of_the_bases(trainer, tmp_path):
    class Adadelta(Foreign):
        def configure_optimizers(self):
            return torch.optim.Adadelta(self.parameters(), rho=0.8)

    callbacks = [HyperparameterPage(), SharpnessAwareTraining(rho=0.1)]
    trainer(logger=TensorBoardLogger(tmp_path, "", version=""), callbacks=callbacks).fit(Adadelta(), loader(), loader())
    columns, _ = page(tmp_path)
    assert columns["rho"] == 0.1


def test_random_states_round_trip_through_a_safe_checkpoint(trainer, tmp_path):
    callback = RandomStates()
    torch.save(callback.state_dict(), tmp_path / "states.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()  # the global state is the subject
    resumed = RandomStates()
    resumed.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    resumed.on_train_start(None, None)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0])
    assert np.array_equal(drawn[1], again[1])
    assert drawn[2] == again[2]
    resumed.on_train_start(None, None)  # restores once only
    assert random.random() != again[2]


class Validated(Regression):
    """Logs its epoch's number as a validation metric, in every second epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/epoch", float(self.current_epoch + 1))

    def val_dataloader(self):
        return loader()


def test_history_has_a_row_per_epoch_with_what_was_measured_in_it(trainer, tmp_path):
    history = EpochHistory()
    fitted = trainer(max_epochs=4, check_val_every_n_epoch=2, callbacks=[history])
    module = Validated()
    losses = []
    log = module.log
    module.log = lambda name, value, *args, **kwargs: (
        losses.append(value) if name == "train/loss_epoch" else None,
        log(name, value, *args, **kwargs),
    )
    fitted.fit(module, loader())
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3, 4]
    assert [row["train/loss_epoch"] for row in history.epochs] == pytest.approx(losses, rel=1e-6)
    assert len(set(losses)) == 4
    assert [row.get("val/epoch") for row in history.epochs] == [None, 2, None, 4]
    assert all(row["seconds"] > 0 for row in history.epochs)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_history_goes_on_behind_a_checkpoint(trainer, tmp_path):
    def fit(epochs, folder, resume=None):
        history = EpochHistory()
        checkpoints = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True)
        callbacks = [history, checkpoints]
        options = {"enable_checkpointing": True, "callbacks": callbacks, "check_val_every_n_epoch": 2}
        torch.manual_seed(0)
        trainer(max_epochs=epochs, **options).fit(Validated(), loader(), ckpt_path=resume)
        return [{key: value for key, value in row.items() if key != "seconds"} for row in history.epochs]

    fit(3, "resumed")
    last = tmp_path / "resumed/last.ckpt"
    saved = torch.load(last, weights_only=True)["callbacks"]["EpochHistory"]["epochs"]
    assert [row["epoch"] for row in saved] == [1, 2, 3]
    assert all("train/loss_epoch" in row for row in saved)  # of the newest epoch, too
    assert fit(5, "resumed", last) == fit(5, "straight")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_history_has_the_losses_and_metrics_of_any_module(trainer, accumulated):
    """It validates in every second epoch, and logs no training loss."""
    history, losses = EpochHistory(), []

    class Told(Foreign):
        def training_step(self, *args):
            loss = super().training_step(*args)
            if self.trainer.training:  # validation uses it, too
                losses.append(loss.item())
            return loss

    options = {"max_epochs": 4, "check_val_every_n_epoch": 2, "callbacks": [history]}
    trainer(accumulate_grad_batches=accumulated, **options).fit(Told(), loader(), loader(batch_size=32))
    assert [row["train/loss_epoch"] for row in history.epochs] == pytest.approx(
        [np.mean(losses[i : i + 8]) for i in range(0, 32, 8)]
    )
    assert [row.get("r2") for row in history.epochs] == [None, 1, None, 3]
    assert [
        sorted({*row} - {"epoch", "seconds", "train/loss_epoch", "gradients_per_step"}) for row in history.epochs[:2]
    ] == [
        [],
        ["r2", "valid_loss"],
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_epoch_resumed_in_its_middle_has_the_loss_of_the_whole(trainer, tmp_path):
    def fit(steps, resume=None):
        history = EpochHistory()
        torch.manual_seed(0)
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"max_steps": steps, "enable_checkpointing": True, "callbacks": [history, checkpoints]}
        trainer(**options).fit(Foreign(), resumable(), ckpt_path=resume)
        return history.epochs

    whole = fit(8)
    resumed = fit(8, tmp_path / "step=3.ckpt")
    assert resumed[0]["train/loss_epoch"] == pytest.approx(whole[0]["train/loss_epoch"], rel=1e-6)
