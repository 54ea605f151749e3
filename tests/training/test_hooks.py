"""Lightning's promises hold with sharp steps as in plain training: hooks, schedules, options, averaging callbacks."""

import copy
import pickle
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from plain_modules import RHO, Plain, batches, distance, sharp_loop
from sam_lightning import MSAM, SAM
from sam_lightning.optim import late
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining

BACKWARD = {"on_before_backward", "on_after_backward"}  # once a pass


def both(trainer, kind, epochs=1, val=None, callbacks=(), **options):
    """What plain and sharp training of a new module end with."""
    ends = []
    for sharp in ([], [SharpnessAwareTraining(SAM, rho=RHO)]):
        module = kind()
        made = trainer(max_epochs=epochs, callbacks=[*sharp, *(make() for make in callbacks)], **options)
        made.fit(module, batches(), val)
        ends.append((made, module))
    return ends


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(ends):
    return [next(c for c in made.callbacks if isinstance(c, Rates)).seen for made, _ in ends]


STEPS = {"optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step", "backward"}
HOOKS = {name for name in dir(LightningModule) if name.startswith("on_")} - {"on_gpu"} | STEPS


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_hook_is_called_as_often_and_in_the_same_order(trainer, accumulate):
    """All of the module's own, without a `super()` in those that watch."""
    orders = []

    class Hooked(Plain):
        def __init__(self):
            super().__init__()
            orders.append([])

        def validation_step(self, batch, batch_idx):
            return None

    def counted(name):
        original = getattr(LightningModule, name)
        acts = not name.startswith("on_") or "batch_transfer" in name

        def hook(self, *args, **kwargs):
            orders[-1].append(name)
            return original(self, *args, **kwargs) if acts else None

        return hook

    for name in HOOKS:
        setattr(Hooked, name, counted(name))
    both(trainer, Hooked, 2, batches(), accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
    plain, sharp = ([name for name in order if name not in BACKWARD | {"backward"}] for order in orders)
    assert plain == sharp
    assert {"optimizer_step", "optimizer_zero_grad", "on_before_zero_grad", "configure_gradient_clipping"} <= set(sharp)
    plain, sharp = (Counter(name for name in order if name in BACKWARD) for order in orders)
    assert sharp == {name: 2 * count for name, count in plain.items()}


def test_a_schedule_in_optimizer_step_is_followed(trainer):
    class Warm(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 100)
            optimizer.step(closure=optimizer_closure)

    plain, sharp = rates(both(trainer, Warm, 2, callbacks=[Rates]))
    assert plain == sharp == [pytest.approx(0.001 * step) for step in range(1, 9)]


MISSING = {"kind": "plateau", "monitor": "nothing"}
BY_EPOCH = {"kind": "step", "interval": "epoch"}


class Scheduled(Plain):
    config: dict

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        make = {"plateau": partial(ReduceLROnPlateau, patience=0, mode="max"), "step": partial(StepLR, step_size=1)}
        scheduler = make[self.config["kind"]](optimizer)
        rest = {key: value for key, value in self.config.items() if key != "kind"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **rest}}

    def validation_step(self, batch, batch_idx):
        self.log("val_rising", float(self.current_epoch))
        self.log("val_flat", 0.5)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "step", "interval": "step"},
        {"kind": "step", "interval": "step", "frequency": 3},
        {"kind": "step", "interval": "epoch", "frequency": 2},
        {"kind": "plateau", "monitor": "val_rising"},
        {"kind": "plateau", "monitor": "val_flat"},
        {"kind": "plateau", "monitor": "val_flat", "frequency": 2},
        {"kind": "plateau", "monitor": "train_loss", "interval": "step", "frequency": 3},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_schedules_are_stepped_when_lightning_would(trainer, config):
    class Mine(Scheduled):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", torch.tensor(-1.0 * self.global_step))
            return super().training_step(batch, batch_idx)

    Mine.config = config
    plain, sharp = rates(both(trainer, Mine, 5, batches(), callbacks=[Rates]))
    assert plain == sharp
    assert (len(set(sharp)) > 1) == (config.get("monitor") != "val_rising")


def test_a_plateau_without_its_metric_is_lightnings_error(trainer):
    class Missing(Scheduled):
        config = MISSING

    for _ in range(2):
        with pytest.raises(Exception, match="metric nothing which is not available"):
            both(trainer, Missing, 1, batches())


def test_own_ways_to_step_a_schedule_and_to_clip(trainer):
    class Own(Plain):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=2 * self.current_epoch + 2)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for parameter in self.parameters():
                parameter.grad.zero_()

    with pytest.warns(UserWarning, match="epoch parameter"):
        ends = both(trainer, Own, 3, callbacks=[Rates])
    plain, sharp = rates(ends)
    assert plain == sharp
    assert sharp[-1] == 0.1 * 0.5**6
    assert distance(ends[1][1], Plain()) == 0  # all that descends was clipped away


def test_an_epoch_that_is_cut_short_ends_as_in_plain_training(trainer):
    class Cut(Scheduled):
        config = BY_EPOCH

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    plain, sharp = rates(both(trainer, Cut, 3, callbacks=[Rates]))
    assert plain == sharp


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.filterwarnings("ignore:SWA is currently")
def test_weights_averaged_by_lightning_are_the_average(trainer):
    """Its last epoch runs forward only, for BatchNorm: no step may be taken in it."""
    swa = partial(StochasticWeightAveraging, swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    (plain, _), (sharp, module) = both(trainer, partial(Plain, norm=True), 4, callbacks=[swa])
    assert plain.global_step == sharp.global_step
    average = next(c for c in sharp.callbacks if isinstance(c, StochasticWeightAveraging))._average_model
    weights = zip(average.parameters(), module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_an_exponential_average_follows_sharp_steps(trainer):
    (_, _), (made, module) = both(trainer, Plain, 2, callbacks=[WeightAveraging])
    assert made.global_step == 8
    assert distance(module, Plain()) > 0


def test_a_radius_follows_its_schedule_and_saves_passes(trainer):
    calls = []

    class Counting(Plain):
        def training_step(self, batch, batch_idx):
            calls.append(self.global_step)
            return super().training_step(batch, batch_idx)

    trainer(max_epochs=2, callbacks=[SharpnessAwareTraining(SAM, rho=RHO, radius=late(0.5))]).fit(Counting(), batches())
    assert calls == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_a_method_with_one_pass(trainer):
    calls = []

    class Counting(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            calls.append(loss.item())
            return loss

    made = trainer(callbacks=[SharpnessAwareTraining(MSAM, rho=0.3)], log_every_n_steps=1)
    module = Counting(norm=True)
    made.fit(module, batches())
    assert len(calls) == made.global_step == 4
    assert module.net[1].num_batches_tracked == 4
    assert made.callback_metrics["train/loss_perturbed"].item() == pytest.approx(calls[-1])
    assert "train/loss" not in made.callback_metrics


def test_rho_0_is_plain_training_bit_for_bit(trainer):
    plain, sharp = Plain(norm=True, dropout=0.3), Plain(norm=True, dropout=0.3)
    for module, callbacks in ((plain, []), (sharp, [SharpnessAwareTraining(SAM, rho=0.0)])):
        torch.manual_seed(5)
        trainer(max_epochs=2, callbacks=callbacks).fit(module, batches())
    assert distance(plain, sharp) == 0


def test_the_twin_package_trains_the_same_module():
    """Half of the public modules import Lightning by its other name."""
    pl = pytest.importorskip("pytorch_lightning")

    class Twin(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Plain().net

        training_step, configure_optimizers = Plain.training_step, Plain.configure_optimizers

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    module, expected = Twin(), Plain()
    made = pl.Trainer(max_epochs=1, callbacks=[SharpnessAwareTraining(SAM, rho=RHO)], **options)
    made.fit(module, batches())
    sharp_loop(expected, batches())
    assert distance(module.net, expected.net) < 1e-14
    assert made.global_step == 4
    sharp = SharpnessAwareTraining("SAM", micro_batches=2)
    for copied in (pickle.loads(pickle.dumps(sharp)), copy.deepcopy(sharp)):
        assert isinstance(copied, pl.Callback)
        assert copied.micro_batches == 2


def test_a_child_module_logs_once_too(trainer):
    class Child(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1).double()
            self.heard = []

        def log(self, name, value):
            self.heard.append(name)

    class Parent(SharpnessAwareModule):
        def __init__(self):
            super().__init__()
            self.net = Child()

        def training_step(self, batch, batch_idx):
            self.net.log("x", 1.0)
            return (self.net.layer(batch[0]) - batch[1]).square().mean()

        configure_optimizers = Plain.configure_optimizers

    module = Parent()
    trainer().fit(module, batches())
    assert module.net.heard == ["x"] * 4


def test_a_method_that_perturbs_now_and_then_is_logged_all_the_same(trainer):
    """Steps 0, 5, ... are perturbed, steps 4, 9, ... are logged."""
    made = trainer(max_epochs=3, callbacks=[SharpnessAwareTraining("SAM", every=5)], log_every_n_steps=5)
    module = Plain()
    made.fit(module, batches())
    assert {"train/loss", "train/loss_perturbed"} <= made.callback_metrics.keys()


def test_a_name_that_the_module_logs_in_a_later_hook_is_its_own(trainer):
    class Logging(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("lr", 0.5, prog_bar=True)

    made = trainer(callbacks=[SharpnessAwareTraining(SAM, rho=RHO)], log_every_n_steps=1)
    made.fit(Logging(), batches())
    assert made.callback_metrics["lr"] == 0.5


def test_skipping_batches_of_a_group_warns_of_nothing(trainer):
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both(trainer, Skipping, accumulate_grad_batches=2)
    assert not [str(w.message) for w in caught if "plain" in str(w.message)]
