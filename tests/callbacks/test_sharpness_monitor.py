"""The monitor's signals against both gradients written out, its measures, and its alarm."""

import json
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy, mse_loss

from commands import BASE, ROOT
from commands import QUICK as FEW
from plain_modules import Plain, batches
from regression import SAM_SGD, SGD, Regression, assert_same, loader, make_network, state_of
from sam_lightning.callbacks.sharpness_monitor import SharpnessMonitor, measure_module
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn
from sam_lightning.replay.batch_norm import frozen_running_stats
from sam_lightning.sharpness import Settings, measure
from sam_lightning.studies.execute import execute
from sam_lightning.training import SharpnessAwareTraining

QUICK = Settings(steps=2, draws=2, rho=0.1)
SIGNALS = ("train/sharpness", "train/perturbation_norm", "train/grad_cosine")


def scalars(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}


def logged(trainer, tmp_path, module, monitor, every=2, data=None, **options):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    made = trainer(logger=logger, callbacks=[monitor], log_every_n_steps=every, **options)
    made.fit(module, **(data or {"train_dataloaders": loader()}))
    return scalars(tmp_path)


def classifier(optimizer=SAM_SGD, width=4):
    torch.manual_seed(0)
    return ImageClassifier(digits_cnn(width=width), optimizer)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_signals_are_those_of_both_passes(trainer, tmp_path, accumulate):
    """Against a loop that takes both gradients by itself; normalisation would see other micro-batches."""
    found = logged(
        trainer, tmp_path, Regression(network=make_network(norm=False), micro_batches=accumulate), SharpnessMonitor(0)
    )
    network = make_network(norm=False)
    optimizer = SAM_SGD(list(network.named_parameters()))
    parameters = list(network.parameters())
    expected = []
    for x, y in loader():
        weights = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        before = mse_loss(network(x), y)
        before.backward()
        first = torch.cat([p.grad.flatten() for p in parameters])
        with optimizer.perturbed(), frozen_running_stats(network):
            optimizer.zero_grad()
            after = mse_loss(network(x), y)
            after.backward()
            e = torch.cat([(p.detach() - w).flatten() for p, w in zip(parameters, weights, strict=True)])
        second = torch.cat([p.grad.flatten() for p in parameters])
        optimizer.step()
        cosine = torch.cosine_similarity(first, second, dim=0)
        expected.append([(after - before).item(), e.norm().item(), cosine.item()])
    for signal, values in zip(SIGNALS, zip(*expected[1::2], strict=True), strict=True):
        assert [event.value for event in found[signal]] == pytest.approx(values, rel=1e-4), signal
    assert [event.value for event in found["train/perturbation_norm"]] == pytest.approx([0.1] * 4, rel=1e-4)
    assert all(event.value < 0.9999 for event in found["train/grad_cosine"])
    assert len(found["train/grad_norm"]) == 4


@pytest.mark.parametrize("gamma", [0.5, 0.6, 0.9])
def test_the_cosine_is_of_the_two_gradients_whatever_descends(trainer, gamma):
    made = trainer(
        callbacks=[SharpnessAwareTraining("WSAM", rho=0.5, gamma=gamma), SharpnessMonitor(every_n_epochs=0)],
        max_steps=1,
        log_every_n_steps=1,
    )
    made.fit(Plain(), batches())
    network, (x, y) = Plain(), next(iter(batches()))
    weights = list(network.parameters())
    first = torch.autograd.grad(mse_loss(network.net(x), y), weights)
    norm = torch.sqrt(sum(g.square().sum() for g in first))
    with torch.no_grad():
        for weight, gradient in zip(weights, first, strict=True):
            weight += 0.5 * gradient / norm
    second = torch.autograd.grad(mse_loss(network.net(x), y), weights)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (first, second)]
    expected = torch.cosine_similarity(*flat, dim=0).item()
    assert made.callback_metrics["train/grad_cosine"].item() == pytest.approx(expected, rel=1e-5)


def test_watching_changes_nothing(trainer, tmp_path):
    states = []
    for callbacks in ([], [SharpnessMonitor(1, samples=64, settings=QUICK)]):
        module = classifier()
        torch.manual_seed(1)
        trainer(callbacks=callbacks, max_epochs=2, log_every_n_steps=1, limit_train_batches=4).fit(
            module, datamodule=Digits(seed=1)
        )
        states.append({**state_of(module), "random": torch.get_rng_state()})
    assert_same(*states)


def test_a_plain_optimizer_has_measures_and_no_signals(trainer, tmp_path):
    monitor = SharpnessMonitor(1, samples=64, settings=QUICK)
    found = logged(trainer, tmp_path, classifier(SGD), monitor, data={"datamodule": Digits(seed=1)})
    assert not set(SIGNALS) & set(found)
    assert len(found["sharpness/trace"]) == 1


def test_measures_are_those_of_fixed_training_samples(trainer, tmp_path):
    """Every second epoch, on samples that a seed chooses; the trained network measured again gives the same."""
    data = Digits(seed=1, eval_batch_size=40)
    monitor = SharpnessMonitor(every_n_epochs=2, samples=100, settings=QUICK)
    module = classifier()
    found = logged(trainer, tmp_path, module, monitor, data={"datamodule": data}, max_epochs=4, limit_train_batches=4)
    assert [row["epoch"] for row in monitor.history] == [2, 4]
    batches = data.training_sample(100, QUICK.seed)
    assert [len(labels) for _, labels in batches] == [40, 40, 20]
    again = measure(module, lambda batch: cross_entropy(module(batch[0]), batch[1]), batches, QUICK).rows()
    for name, (value, _) in again.items():
        assert monitor.history[1][name] == pytest.approx(value, rel=1e-6), name
        written = [event.value for event in found[f"sharpness/{name}"]]
        assert written == pytest.approx([row[name] for row in monitor.history], rel=1e-6)


def test_training_samples_are_chosen_by_the_seed_alone():
    def of(**options):
        data = Digits(**options)
        data.setup("fit")
        return data

    images, labels = (torch.cat(part) for part in zip(*of(seed=1).training_sample(100, 3), strict=True))
    again, _ = (torch.cat(part) for part in zip(*of(seed=2, batch_size=7).training_sample(100, 3), strict=True))
    other, _ = (torch.cat(part) for part in zip(*of(seed=1).training_sample(100, 4), strict=True))
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    everything = sum(len(part) for _, part in of().training_sample(10**6, 0))
    assert everything == len(of()._train)
    with pytest.raises(RuntimeError, match="call setup"):
        Digits().training_sample(1, 0)
    assert len(labels) == 100


def test_measuring_passes_log_and_count_nothing(trainer, tmp_path):
    class Counting(Regression):
        counted = 0

        def training_step(self, batch, batch_idx):
            self.log("train/mine", 1.0)
            if not self.is_second_pass:
                self.counted += 1
            return super().training_step(batch, batch_idx)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def training_sample(self, samples, seed):
            return list(loader())[:2]

    module = Counting()
    found = logged(trainer, tmp_path, module, SharpnessMonitor(1, settings=QUICK), every=1, data={"datamodule": Data()})
    assert module.counted == len(found["train/mine"]) == 8
    assert not module.is_second_pass


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_history_goes_on_behind_a_checkpoint(trainer, tmp_path):
    def fit(epochs, resume=None):
        monitor = SharpnessMonitor(1, samples=64, settings=QUICK)
        saved = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        made = trainer(max_epochs=epochs, callbacks=[monitor, saved], enable_checkpointing=True, limit_train_batches=4)
        made.fit(classifier(), datamodule=Digits(seed=1), ckpt_path=resume)
        return monitor

    fit(2)
    last = tmp_path / "last.ckpt"
    content = torch.load(last, weights_only=True)["callbacks"]["SharpnessMonitor"]
    assert [row["epoch"] for row in content["history"]] == [1, 2]
    resumed = fit(3, last)
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3]
    assert resumed._first_loss == content["first_loss"] == pytest.approx(2.5, abs=0.5)  # of ten classes, untrained


def warned(trainer, tmp_path, rho, epochs=2):
    def optimizer(parameters):
        return SAM_SGD(parameters, rho=rho)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = trainer(callbacks=[SharpnessMonitor(0)], max_epochs=epochs, log_every_n_steps=5)
        made.fit(classifier(optimizer), datamodule=Digits(seed=1))
    return [str(found.message) for found in caught if "too large" in str(found.message)]


def test_a_radius_that_is_too_large_is_told_once_with_evidence(trainer, tmp_path):
    (message,) = warned(trainer, tmp_path, rho=20.0)
    assert message.startswith("rho = 20 looks too large for this network: at step 3")  # in the second epoch
    assert "||e|| = 20," in message
    assert "cosine between the two gradients" in message
    assert not warned(trainer, tmp_path, rho=0.05)
    assert not warned(trainer, tmp_path, rho=20.0, epochs=1)


def test_a_perturbed_loss_that_is_not_finite_counts(trainer, tmp_path):
    monitor = SharpnessMonitor(0)
    monitor._first_loss = 2.0
    made = trainer(callbacks=[monitor])
    made.fit_loop.epoch_progress.current.completed = 1
    made.strategy.optimizers = [SAM_SGD(list(make_network().named_parameters()))]
    monitor._signals = {"train/perturbation_norm": torch.tensor(1.0), "train/grad_cosine": torch.tensor(0.1)}
    for _ in range(2):
        monitor._warn_if_too_far(made, 0.1, float("nan"))
    monitor._warn_if_too_far(made, 0.1, 0.2)  # one that is not breaks the row
    for _ in range(2):
        monitor._warn_if_too_far(made, 0.1, float("inf"))
    with pytest.warns(UserWarning, match="to inf at w"):
        monitor._warn_if_too_far(made, 0.1, float("inf"))


def test_what_it_cannot_watch_is_refused(trainer):
    with pytest.raises(ValueError, match="every_n_epochs must be an integer >= 0, got -1"):
        SharpnessMonitor(every_n_epochs=-1)
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        SharpnessMonitor(samples=0)


def test_any_module_on_any_loader_is_measured_on_the_same_samples_each_time(trainer):
    monitor = SharpnessMonitor(1, samples=16, settings=QUICK)
    sharp = SharpnessAwareTraining("SAM", rho=0.0)
    shuffled = batches(shuffle=True)
    frozen = Plain(dropout=0.5)
    frozen.configure_optimizers = lambda: torch.optim.SGD(frozen.parameters(), lr=0.0)
    trainer(callbacks=[sharp, monitor], max_epochs=2).fit(frozen, shuffled)
    first, second = ({k: v for k, v in row.items() if k != "epoch"} for row in monitor.history)
    assert first == second
    assert first["trace"] != 0


class NotFinite(Plain):
    """Its loss is not finite while it is measured, at finite weights."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if vars(self).get("_is_measured") else loss


class WrongCurvature(Plain):
    """Torch's second derivatives of weight_norm are wrong."""

    def __init__(self):
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.net[0])
        with torch.no_grad():
            self.net[0].parametrizations.weight.original1.mul_(torch.rand(6, 4) + 0.5)


@pytest.mark.parametrize("module", [NotFinite, WrongCurvature])
def test_a_measurement_that_fails_is_told_once_and_training_goes_on(trainer, module):
    monitor = SharpnessMonitor(1, samples=16, settings=QUICK)
    made = trainer(callbacks=[SharpnessAwareTraining("SAM", rho=0.01), monitor], max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module(), batches())
    said = [str(found.message) for found in caught if "training goes on" in str(found.message)]
    assert len(said) == 1
    assert said[0].startswith("sharpness is not measured after epoch 1, and training goes on: ")
    assert made.global_step == 12
    assert monitor.history == []


def test_measures_reach_a_studys_results(tmp_path):
    monitor = SharpnessMonitor(1, samples=64, settings=QUICK)
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml", *FEW]
    execute([*words, "--trainer.max_epochs", "2", "--seed_everything", "1"], tmp_path, [monitor])
    rows = json.loads((tmp_path / "result.json").read_text())["sharpness"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["trace"] > 0 for row in rows)


def test_a_measured_module_is_as_before(trainer):
    module = Plain()
    before = dict(vars(module))
    for _ in range(2):
        measure_module(module, [next(iter(batches()))], QUICK)
    assert vars(module) == before
