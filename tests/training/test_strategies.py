"""What no process group is needed for: refusals by class, and m in the log."""

import csv
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from regression import SGD, Regression, loader
from sam_lightning.training import SharpnessAwareTraining
from sam_lightning.training.strategies import StrategyError, refuse_strategy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, "FSDPStrategy does not work here: FSDP1 .* Use ModelParallelStrategy"),
        (DeepSpeedStrategy, "DeepSpeedStrategy does not work here: .* Use ModelParallelStrategy"),
        (XLAStrategy, "XLAStrategy does not work here: it averages gradients .* Use DDPStrategy"),
    ],
)
def test_strategies_that_cannot_work_are_refused_before_they_wrap(strategy, message):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))  # their own packages are not needed for that
    with pytest.raises(StrategyError, match=message):
        refuse_strategy(trainer)


def test_a_subclass_cannot_lose_the_check(trainer):
    class Hooked(Regression):
        def setup(self, stage):
            """A user's own, without super()."""

        def on_fit_start(self):
            """As well."""

        def configure_callbacks(self):
            return [EarlyStopping("train/loss_epoch")]

    fit = trainer()
    fit.fit(Hooked(), loader())
    assert any(isinstance(callback, SharpnessAwareTraining) for callback in fit.callbacks)


def test_m_is_logged_once(trainer, tmp_path):
    sharp = SharpnessAwareTraining(micro_batches=2)
    trainer(logger=CSVLogger(tmp_path), max_epochs=2, callbacks=[sharp]).fit(
        Regression(), loader(batch_size=10, samples=64)
    )  # the last batch has 4
    assert sharp.m_sharpness == 10
    rows = csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines())
    assert [row["m_sharpness"] for row in rows if row["m_sharpness"]] == ["10"]

    plain = SharpnessAwareTraining(None)
    trainer(callbacks=[plain]).fit(Regression(SGD), loader())
    assert plain.m_sharpness is None
