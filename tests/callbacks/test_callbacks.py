"""Callbacks: what they write, what they refuse, and that nothing but primitives is saved."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from regression import SAM_SGD, Regression, loader
from sam_lightning.callbacks import EpochHistory, HyperparameterPage, RandomStates, WeightHistograms
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn


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


def test_the_page_of_hyperparameters_shows_settings_and_metrics(trainer, tmp_path):
    """As TensorBoard reads them, after a fit and a test with files of their own."""
    for stage in ("fit", "test"):
        module = ImageClassifier(digits_cnn(width=4), SAM_SGD)
        module.save_hyperparameters({"rho": 0.1, "nested": {"lr": 0.05}, "_instantiator": "x"})
        logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
        run = trainer(logger=logger, callbacks=[HyperparameterPage()])
        getattr(run, stage)(module, datamodule=Digits())
    summaries = events(tmp_path).summary_metadata
    experiment = parse_experiment_plugin_data(summaries["_hparams_/experiment"].plugin_data.content)
    names = [info.name.tag for info in experiment.metric_infos]
    assert names == ["test/accuracy", "val/accuracy", "test/loss", "val/loss"]
    start = parse_session_start_info_plugin_data(summaries["_hparams_/session_start_info"].plugin_data.content)
    assert {"rho", "nested.lr", "data.batch_size"} <= set(start.hparams)
    assert not [name for name in start.hparams if "_instantiator" in name]
    accumulator = events(tmp_path)
    assert len(accumulator.Scalars("val/accuracy")) == len(accumulator.Scalars("test/accuracy")) == 1


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
